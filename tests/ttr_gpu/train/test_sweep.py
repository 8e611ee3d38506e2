"""Sweeps: what is tried, the table, and that a killed one goes on with nothing run twice."""

import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from small_runs import SMALL, records, weights

from ttr_gpu.errors import UserError
from ttr_gpu.train import sweep as sweep_module
from ttr_gpu.train.checkpoint import list_checkpoints
from ttr_gpu.train.run import RunOptions
from ttr_gpu.train.sweep import read_trials, run_sweep

GRID = """
[parameters]
"train.lr" = [0.01, 0.001]
[parameters.model]
num_layers = [1, 2]
time_bias = ["log"]
"""
RANDOM = """
method = "random"
trials = 200
seed = 3
[parameters]
"train.lr" = { min = 1e-4, max = 1e-1, log = true }
"train.weight_decay" = { min = 0.0, max = 0.5 }
"train.warmup_steps" = { min = 1, max = 4 }
"model.window" = [4, 8]
"""


def written(tmp_path, text):
    path = tmp_path / "lr.toml"
    path.write_text(text)
    return path


def sweep(data, tmp_path, text, **options):
    said = []
    run = RunOptions(data, preset="nano", out=tmp_path / "runs", assignments=(*SMALL, "train.steps=20"), **options)
    stopped = run_sweep(run, written(tmp_path, text), lambda: (said.append, None))
    return stopped, said


def test_a_grid_is_every_combination(tmp_path):
    trials = read_trials(written(tmp_path, GRID))
    assert [trial.assignments for trial in trials] == [
        (f"train.lr={lr}", f"model.num_layers={layers}", "model.time_bias=log")
        for lr in (0.01, 0.001)
        for layers in (1, 2)
    ]
    assert [trial.name for trial in trials] == ["trial-000", "trial-001", "trial-002", "trial-003"]


def test_a_random_search_draws_from_ranges_and_is_the_same_each_time(tmp_path):
    trials = read_trials(written(tmp_path, RANDOM))
    assert trials == read_trials(written(tmp_path, RANDOM))
    assert trials != read_trials(written(tmp_path, RANDOM.replace("seed = 3", "seed = 4")))
    # Of more trials, the first are the same: a search can be lengthened under another name.
    assert trials == read_trials(written(tmp_path, RANDOM.replace("200", "300")))[:200]
    rates, decays, warmups, windows = (np.array(column) for column in zip(*(t.values.values() for t in trials)))  # noqa: B905
    assert 1e-4 <= rates.min() < 3e-4 < 3e-2 < rates.max() <= 1e-1
    assert np.median(np.log10(rates)) == pytest.approx(-2.5, abs=0.3), "evenly in the logarithm"
    assert np.median(decays) == pytest.approx(0.25, abs=0.06)
    assert set(warmups.tolist()) == {1, 2, 3, 4}
    assert set(windows.tolist()) == {4, 8}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[parameters]\n"train.lrr" = [1]', "lr.toml: unknown key 'train.lrr'; did you mean train.lr?"),
        ('[parameters]\n"train.lr" = 0.1', "train.lr: got 0.1, expected a list"),
        ('[parameters]\n"train.lr" = {min = 1, max = 2}', "ranges are for method 'random'"),
        ('trials = 3\n[parameters]\n"train.lr" = [1]', "trials: only of method 'random'"),
        ('method = "random"\n[parameters]\n"train.lr" = [1]', "expected how often"),
        ('method = "random"\ntrials = 2\n[parameters]\n"train.lr" = {min = 2, max = 1}', "expected min < max"),
        ('method = "random"\ntrials = 2\n[parameters]\n"train.lr" = {min = 0, max = 1, log = true}', "both above 0"),
        ('method = "random"\ntrials = 2\n[parameters]\n"train.lr" = {min = 0, most = 1}', "expected a list of"),
        ('method = "bayes"\n[parameters]\n"train.lr" = [1]', "method: got 'bayes'"),
        ("trails = 3\n[parameters]\n", "lr.toml: "),
        ("", "parameters: "),
        ("[parameters", "lr.toml: "),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_line(data, tmp_path, text, message):
    with pytest.raises(UserError, match=r"^--sweep: ") as error:
        sweep(data, tmp_path, text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_every_trial_is_checked_before_the_first_is_run(data, tmp_path):
    with pytest.raises(UserError, match=r"num_heads: got 3|multiple of num_heads \(3\)"):
        sweep(data, tmp_path, '[parameters]\n"model.num_heads" = [2, 3]')
    assert not (tmp_path / "runs").exists()


def test_a_grid_runs_prints_a_table_and_is_not_run_twice(data, tmp_path):
    stopped, said = sweep(data, tmp_path, GRID)
    assert stopped is None
    folder = tmp_path / "runs" / "lr"
    results = [json.loads((folder / f"trial-00{i}.json").read_text()) for i in range(4)]
    losses = [result["best_loss"] for result in results]
    assert len(set(losses)) == 4
    header, *rows = said[-5:]
    assert header.split() == [
        *("trial", "ended", "best", "loss", "at", "step", "time"), "train.lr", "model.num_layers", "model.time_bias",
    ]  # fmt: skip
    assert [row.split()[0] for row in rows] == [f"trial-00{i}" for i in np.argsort(losses)]
    assert rows[0].split()[1] == "finished"
    for i, (lr, layers) in enumerate([(0.01, 1), (0.01, 2), (0.001, 1), (0.001, 2)]):
        config = json.loads((folder / f"trial-00{i}" / "config.json").read_text())
        assert (config["train"]["lr"], config["model"]["num_layers"]) == (lr, layers)
        row = next(row for row in rows if row.split()[0] == f"trial-00{i}")
        assert f"{losses[i]:.4f}" in row
    times = [path.stat().st_mtime_ns for path in sorted(folder.glob("trial-*/metrics.jsonl"))]
    _, again = sweep(data, tmp_path, GRID)
    assert sum("ended before" in line for line in again) == 4
    assert again[-5:] == said[-5:]
    assert times == [path.stat().st_mtime_ns for path in sorted(folder.glob("trial-*/metrics.jsonl"))]


def test_another_sweep_does_not_go_on_with_this_one(data, tmp_path):
    sweep(data, tmp_path, '[parameters]\n"train.lr" = [0.01]')
    with pytest.raises(
        UserError, match=r"its trials differ from those that .*lr was begun with; choose another --name"
    ):
        sweep(data, tmp_path, '[parameters]\n"train.lr" = [0.02]')
    (tmp_path / "runs" / "taken").mkdir()
    with pytest.raises(UserError, match="exists already and is no sweep"):
        sweep(data, tmp_path, '[parameters]\n"train.lr" = [0.02]', name="taken")


def test_a_trial_that_diverges_is_said_and_the_others_are_run(data, tmp_path):
    text = '[parameters]\n"train.lr" = [1e30, 0.001]\n"train.clip_norm" = [1e30]'
    stopped, said = sweep(data, tmp_path, text)
    assert stopped is None
    assert [row.split()[1] for row in said[-2:]] == ["finished", "diverged"]
    result = json.loads((tmp_path / "runs" / "lr" / "trial-000.json").read_text())
    assert "first appears in" in result["why"]


def test_a_slurm_array_task_runs_its_own_trial(data, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    _, said = sweep(data, tmp_path, GRID)
    folder = tmp_path / "runs" / "lr"
    assert [path.name for path in sorted(folder.glob("trial-*.json"))] == ["trial-002.json"]
    assert [row.split()[1] for row in said[-4:]] == ["finished", "open", "open", "open"]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    with pytest.raises(UserError, match="SLURM_ARRAY_TASK_ID: got 4, expected a trial: sbatch --array=0-3"):
        sweep(data, tmp_path, GRID)


def test_array_tasks_that_begin_at_the_same_moment_share_the_folder(data, tmp_path, monkeypatch):
    """While one task makes the sweep's folder, another begins and ends: the first goes on in what that has made."""
    write, others = sweep_module._write, []

    def write_late(path, content):
        if path.name == "sweep.json" and not others:
            others.append("2")
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
            sweep(data, tmp_path, GRID)
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
        write(path, content)

    monkeypatch.setattr(sweep_module, "_write", write_late)
    sweep(data, tmp_path, GRID)
    assert others
    folder = tmp_path / "runs" / "lr"
    assert [path.name for path in sorted(folder.glob("trial-*.json"))] == ["trial-001.json", "trial-002.json"]
    assert [path.name for path in folder.parent.iterdir()] == ["lr"], "nothing half-made is left"


def test_processes_that_train_together_are_refused(data, tmp_path, monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setenv("MPI_LOCALNRANKS", "2")
    with pytest.raises(UserError, match=r"--sweep: got 2 processes of mpirun of MPICH, .* expected one"):
        sweep(data, tmp_path, GRID)
    assert not (tmp_path / "runs").exists()


def command(data, tmp_path, text):
    words = [sys.executable, "-m", "ttr_cli.main", "train", str(data), "--preset", "nano"]
    words += ["--out", str(tmp_path / "runs")]
    for assignment in (*SMALL, "train.steps=400", "train.checkpoint_every=20", "train.patience=0"):
        words += ["--set", assignment]
    return [*words, "--sweep", str(written(tmp_path, text))]


def begun(words, what, **options):
    """A process that has printed a line that matches; output is unbuffered line by line."""
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        **options,
    )  # fmt: skip
    for line in process.stdout:
        if re.search(what, line):
            return process
    raise AssertionError(process.stderr.read())


def test_a_killed_sweep_goes_on(data, tmp_path):
    """Killed in its second trial: the first is skipped, the second resumed, and all ends as if it had not been."""
    text = '[parameters]\n"train.lr" = [0.01, 0.003, 0.001]'
    process = begun(command(data, tmp_path, text), r"trial-001 of 3")
    assert any(line.startswith("step ") for line in process.stdout)
    run = tmp_path / "runs" / "lr" / "trial-001"
    while not list_checkpoints(run):
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -9
    assert not (tmp_path / "runs" / "lr" / "trial-001.json").exists()
    done = subprocess.run(command(data, tmp_path, text), capture_output=True, text=True, timeout=600, check=True)
    assert "trial-000: ended before" in done.stdout
    assert f"resuming {run} after step " in done.stdout
    (tmp_path / "whole").mkdir()
    subprocess.run(command(data, tmp_path / "whole", text), capture_output=True, timeout=600, check=True)
    for name in ("trial-000", "trial-001", "trial-002"):
        mine, its = (place / "runs" / "lr" / name for place in (tmp_path, tmp_path / "whole"))
        np.testing.assert_array_equal(weights(mine), weights(its))
        assert records(mine) == records(its)


def test_a_signal_saves_and_ends_the_sweep_and_others_keep_off_its_trial(data, tmp_path):
    text = '[parameters]\n"train.lr" = [0.01, 0.003]\n"train.steps" = [1000000]\n"train.evaluate_every" = [1000000]'
    process = begun(command(data, tmp_path, text), r"^step ")
    other = begun(command(data, tmp_path, text), r"^step ")
    for each, code in ((process, 130), (other, 143)):
        each.send_signal(code - 128)
        out, err = each.communicate(timeout=60)
        assert each.returncode == code, err
        assert "the sweep goes on where it stands" in out
    for name in ("trial-000", "trial-001"):
        assert list_checkpoints(tmp_path / "runs" / "lr" / name)
        assert not (tmp_path / "runs" / "lr" / f"{name}.json").exists()
    # The second took the trial that nobody was running.
    assert records(tmp_path / "runs" / "lr" / "trial-001")

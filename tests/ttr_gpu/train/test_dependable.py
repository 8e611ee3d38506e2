"""Nothing is lost: killed, interrupted, out of disk, resumed from what is left, a run ends with the same bits."""

import errno
import os
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file
from small_runs import SMALL, records, resume, run, weights

from ttr_gpu.errors import UserError
from ttr_gpu.train.checkpoint import find_checkpoint, list_checkpoints, open_checkpoint
from ttr_gpu.train.run import RunOptions, train
from ttr_gpu.train.trainer import Trainer

KILLS = int(os.environ.get("TTR_KILLS", "5"))


def assert_same_end(got, expected):
    """Weights, averages, optimizer state and metrics, all to the bit."""
    mine, its = find_checkpoint(got), find_checkpoint(expected)
    assert mine.name == its.name
    files = sorted(path.name for path in its.glob("*.safetensors"))
    assert files == sorted(path.name for path in mine.glob("*.safetensors"))
    for file in files:
        arrays = load_file(its / file)
        for name, array in load_file(mine / file).items():
            np.testing.assert_array_equal(array, arrays[name], err_msg=f"{file}: {name}")
    for kind in ("step", "validation", "spike"):
        assert records(got, kind) == records(expected, kind)
    states = [dict(open_checkpoint(path).state, seconds=None) for path in (mine, its)]
    assert states[0] == states[1]


def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(data, tmp_path):
    options = (
        f"train.steps={60 * KILLS}", "train.checkpoint_every=3", "train.evaluate_every=25", "train.patience=0",
        "train.ema=0.9", "model.precision=float16", "train.loss_scale=16777216", "train.loss_scale_growth=20",
        "train.spike_threshold=2",
    )  # fmt: skip
    run(data, tmp_path / "whole", *options)
    rng, killed, while_writing = random.Random(5), 0, 0
    folder = tmp_path / "runs" / "run"
    command = [sys.executable, "-m", "ttr_cli.main", "train", str(data), "--out", str(tmp_path / "runs")]
    fresh = ["--preset", "nano", "--name", "run"]
    for assignment in (*SMALL, *options):
        fresh += ["--set", assignment]
    while True:
        begun = bool(list_checkpoints(folder))
        if not begun:
            shutil.rmtree(folder, ignore_errors=True)
        process = subprocess.Popen(
            [*command, *(["--resume", "auto"] if begun else fresh)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        if killed == KILLS:
            break
        assert any(line.startswith("step") for line in process.stdout), process.stderr.read()
        if killed % 2:
            while process.poll() is None and not list(folder.glob("checkpoints/.step-*.partial-*")):
                pass
            time.sleep(rng.uniform(0, 0.005))
        else:
            time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.communicate()
        assert process.returncode == -9, "the job is too small: it ended before it was killed"
        killed += 1
        while_writing += bool(list(folder.glob("checkpoints/.step-*")))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert_same_end(folder, tmp_path / "whole" / "run")
    assert while_writing, "no kill fell into the writing of a checkpoint"
    assert not list(folder.glob("checkpoints/.*")), "what they left behind is cleared away"


def damage(checkpoint):
    file = checkpoint / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def test_resume_auto_names_and_skips_damaged_checkpoints(data, tmp_path):
    options = ("train.checkpoint_every=5", "train.keep_last=99")
    run(data, tmp_path / "whole", *options)
    run(data, tmp_path / "runs", *options)
    folder = tmp_path / "runs" / "run"
    *_, good, bad, worse = list_checkpoints(folder)
    damage(bad)
    damage(worse)
    said = []
    train(RunOptions(data, out=tmp_path / "runs", resume="auto"), said.append)
    skipped = [line for line in said if "skipped a damaged checkpoint" in line]
    assert [str(worse) in skipped[0], str(bad) in skipped[1], len(skipped)] == [True, True, 2]
    assert "optimizer.safetensors" in skipped[0]
    assert any(f"after step {int(good.name[5:])}" in line for line in said)
    assert_same_end(folder, tmp_path / "whole" / "run")
    open_checkpoint(worse)  # written anew
    for checkpoint in list_checkpoints(folder):
        damage(checkpoint)
    with pytest.raises(UserError, match="holds no checkpoint that is whole"):
        train(RunOptions(data, out=tmp_path / "runs", resume="auto"), said.append)
    with pytest.raises(UserError, match="wrong checksum"):
        resume(data, folder)


def test_a_full_disk_leaves_the_last_good_checkpoint(data, tmp_path, monkeypatch):
    options = ("train.checkpoint_every=5", "train.evaluate_every=5")
    run(data, tmp_path / "whole", *options)
    import safetensors.numpy

    saved = []
    original = safetensors.numpy.save_file

    def save_file(arrays, path, metadata=None):
        saved.append(path)
        if len(saved) == 6:
            # As a disk that fills up in the middle of a file.
            path.write_bytes(b"\0" * 1000)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(arrays, path, metadata)

    monkeypatch.setattr(safetensors.numpy, "save_file", save_file)
    with pytest.raises(UserError, match=r"step-00000015: checkpoint not saved, .*No space left on device"):
        run(data, tmp_path / "full", *options)
    folder = tmp_path / "full" / "run"
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000005", "step-00000010"]
    assert open_checkpoint(find_checkpoint(folder)).state["step"] == 10
    resume(data, folder)
    assert_same_end(folder, tmp_path / "whole" / "run")


def test_an_evaluation_cut_short_is_made_up_for(data, tmp_path, monkeypatch):
    options = ("train.evaluate_every=5", "train.patience=2", "train.lr=0.05", "train.steps=200")
    run(data, tmp_path / "whole", *options)
    evaluate, calls = Trainer.evaluate, []

    def interrupted(trainer, *arguments):
        calls.append(arguments)
        if len(calls) == 3:
            trainer._received.append(15)
        return evaluate(trainer, *arguments)

    monkeypatch.setattr(Trainer, "evaluate", interrupted)
    outcome, _ = run(data, tmp_path / "cut", *options)
    assert (outcome.reason, outcome.progress.step, outcome.progress.evaluated_step) == ("SIGTERM", 15, 10)
    folder = tmp_path / "cut" / "run"
    outcome, _ = resume(data, folder)
    assert outcome.reason == "early"
    assert_same_end(folder, tmp_path / "whole" / "run")
    # What has stopped early stays stopped.
    outcome, said = resume(data, folder)
    assert outcome.reason == "early"
    assert not any(line.startswith("step") for line in said)


@pytest.mark.parametrize(
    ("assignment", "why"),
    [
        ("train.tokens_per_batch=128", "cannot change train.tokens_per_batch from 64 to 128, since the order"),
        ("train.accumulate=2", "cannot change train.accumulate from 1 to 2, since the order"),
        ("train.seed=1", "cannot change train.seed from 0 to 1"),
        ("train.optimizer=muon", "cannot change train.optimizer from adamw to muon, since what it remembers"),
        ("train.ema=0.9", "cannot change train.ema from None to 0.9, since the average began"),
    ],
)
def test_what_cannot_change_is_refused_with_the_reason(data, tmp_path, assignment, why):
    run(data, tmp_path, "train.steps=2")
    with pytest.raises(UserError, match=why):
        resume(data, tmp_path / "run", assignment)


def test_records_after_the_resumed_step_are_replaced(data, tmp_path):
    options = ("train.checkpoint_every=5", "train.keep_last=99", "train.steps=12")
    run(data, tmp_path, *options)
    before = records(tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    resume(data, tmp_path / "run" / "checkpoints" / "step-00000005")
    assert records(tmp_path / "run") == before
    assert [record["step"] for record in before] == list(range(1, 13))
    assert len(weights(tmp_path / "run"))

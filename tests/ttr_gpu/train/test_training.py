"""The whole of training on small data: learning, resuming, accumulation, interruption, divergence, checkpoints."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from small_runs import SMALL, run, weights

from ttr_gpu.data.dataset import open_dataset
from ttr_gpu.data.options import PreprocessOptions
from ttr_gpu.data.preprocess import preprocess
from ttr_gpu.errors import TrainingDiverged, UserError
from ttr_gpu.memory import available_bytes, resident_bytes
from ttr_gpu.train.checkpoint import find_checkpoint, open_checkpoint
from ttr_gpu.train.config import choose_preset, config_keys, key_table, resolve_config
from ttr_gpu.train.metrics import duration, read_metrics
from ttr_gpu.train.run import RunOptions, train
from ttr_gpu.train.schedule import learning_rate


def tensorboard_scalars(folder: Path, tag: str) -> dict[int, float]:
    """What TensorBoard would show: step -> value. A record is its length, a checksum, an Event, a checksum."""
    from tensorboardX.proto.event_pb2 import Event

    shown = {}
    for path in (folder / "tensorboard").iterdir():
        content, at = path.read_bytes(), 0
        while at < len(content):
            size = int.from_bytes(content[at : at + 8], "little")
            event = Event.FromString(content[at + 12 : at + 12 + size])
            shown.update((event.step, value.simple_value) for value in event.summary.value if value.tag == tag)
            at += 16 + size
    return shown


def test_learns_and_leaves_a_run_behind(data, tmp_path):
    outcome, said = run(data, tmp_path, "train.steps=150", "train.lr=0.01", "model.time_components=0")
    text = "\n".join(said)
    assert outcome.reason in ("finished", "early")
    assert "below the best floor" in text
    folder = tmp_path / "run"
    assert (folder / "plots" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "log.txt", "checkpoints", "plots", "tensorboard",
    }  # fmt: skip
    steps = [r for r in read_metrics(folder) if r["kind"] == "step"]
    shown = tensorboard_scalars(folder, "step/loss")
    assert shown == pytest.approx({r["step"]: r["loss"] for r in steps}, rel=1e-6)
    assert [r["step"] for r in steps] == list(range(1, outcome.progress.step + 1))
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]
    assert sum(line.startswith("step") for line in said) == outcome.progress.step, "one line per step"
    for word in ("parameters", "memory", "device", "about", "GFLOP/s"):
        assert word in "\n".join(said[:6])
    described = json.loads((folder / "config.json").read_text())
    assert described["data"]["fingerprint"] == open_dataset(data).fingerprint


def test_a_gpu_trains_the_losses_of_the_cpu(data, tmp_path, cupy, monkeypatch):
    # The bindings of cuBLAS, which the stand-in for CuPy does without.
    monkeypatch.setitem(sys.modules, "nvmath", sys.modules.get("nvmath", ModuleType("nvmath")))
    monkeypatch.setattr("ttr_gpu.train.plan.measure_gemm_peak", lambda *_, **__: 1e12)
    options = "model.dropout.residual=0.2", "train.steps=6", "train.evaluate_every=3", "train.accumulate=2"
    _, said = run(data, tmp_path / "gpu", *options, device="gpu")
    assert any(line.startswith("device     GPU 0, ") for line in said)
    run(data, tmp_path / "cpu", *options, device="cpu")
    gpu, cpu = ([r["loss"] for r in read_metrics(tmp_path / place / "run") if "loss" in r] for place in ("gpu", "cpu"))
    assert len(gpu) == 8
    np.testing.assert_allclose(gpu, cpu, rtol=1e-5)
    np.testing.assert_allclose(weights(tmp_path / "gpu" / "run"), weights(tmp_path / "cpu" / "run"), atol=1e-5)
    train(RunOptions(data, resume=str(tmp_path / "gpu" / "run"), assignments=("train.steps=8",), device="gpu"), print)


def test_resumed_and_uninterrupted_runs_end_with_the_same_bits(data, tmp_path):
    options = ("model.dropout.residual=0.2", "train.evaluate_every=7", "train.patience=0")
    run(data, tmp_path / "whole", *options)
    # Half of it: the schedule is that of the whole run, stopped at an evaluation.
    run(data, tmp_path / "half", *options, "train.checkpoint_every=7", "train.keep_last=99")
    half = tmp_path / "half" / "run"
    for checkpoint in sorted((half / "checkpoints").iterdir())[1:]:
        shutil.rmtree(checkpoint)
    said: list[str] = []
    train(RunOptions(data, resume=str(half)), said.append)
    assert "after step 7" in "\n".join(said)
    np.testing.assert_array_equal(weights(half), weights(tmp_path / "whole" / "run"))


def test_accumulated_batches_equal_a_large_one(data, tmp_path):
    common = ("train.steps=1", "train.clip_norm=1e9", "model.dropout={attention=0.0, feed_forward=0.0, residual=0.0}")
    gradients = []
    from ttr_gpu.train import trainer as module

    class Kept(module.Optimizer):
        def update(self, step, rate, norm, scale=1.0):
            gradients.append(self.model.flat.gradients * scale)
            super().update(step, rate, norm, scale)

    original, module.Optimizer = module.Optimizer, Kept
    try:
        run(data, tmp_path / "a", *common, "train.tokens_per_batch=64", "train.accumulate=4")
        # The same windows: packed next-fit, four batches hold at most what one of four times the size does.
        losses = read_metrics(tmp_path / "a" / "run")[0]
        run(data, tmp_path / "b", *common, f"train.tokens_per_batch={losses['tokens']}")
    finally:
        module.Optimizer = original
    np.testing.assert_allclose(gradients[0], gradients[1], rtol=1e-3, atol=2e-6)


def test_divergence_names_step_layer_and_remedy(data, tmp_path):
    with pytest.raises(TrainingDiverged) as error:
        run(data, tmp_path, "train.lr=1e30", "train.clip_norm=1e30")
    message = str(error.value)
    assert "step 2" in message or "step 3" in message
    assert "first appears in" in message
    assert "train.lr" in message


def test_early_stopping_keeps_the_best(data, tmp_path):
    outcome, said = run(
        data, tmp_path, "train.steps=2000", "train.lr=0.05", "train.evaluate_every=5", "train.patience=3"
    )
    assert outcome.reason == "early"
    progress = outcome.progress
    assert progress.step == progress.best_step + 15
    assert find_checkpoint(tmp_path / "run", best=True).name == f"step-{progress.best_step:08d}"
    assert any("stopping early" in line for line in said)


def test_old_checkpoints_are_pruned_but_not_the_best(data, tmp_path):
    run(data, tmp_path, "train.checkpoint_every=2", "train.keep_last=2", "train.evaluate_every=20")
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000018", "step-00000020"]


def start(data, out, *more):
    command = [
        sys.executable,
        "-m",
        "ttr_cli.main",
        "train",
        str(data),
        "--preset",
        "nano",
        "--out",
        str(out),
        "--name",
        "r",
    ]
    for assignment in (*SMALL, "train.steps=100000", "train.evaluate_every=100000"):
        command += ["--set", assignment]
    process = subprocess.Popen([*command, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step"):
            return process
    raise AssertionError(process.stderr.read())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_interruption_saves_and_says_how_to_go_on(data, tmp_path, number, code):
    process = start(data, tmp_path)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert f"ttr-gpu train {data} --resume {tmp_path / 'r'}" in out
    step = open_checkpoint(find_checkpoint(tmp_path / "r")).state["step"]
    said: list[str] = []
    outcome = train(
        RunOptions(data, resume="auto", out=tmp_path, assignments=(f"train.steps={step + 3}",)), said.append
    )
    assert outcome.progress.step == step + 3


def test_a_killed_run_leaves_no_half_checkpoint(data, tmp_path):
    process = start(data, tmp_path, "--set", "train.checkpoint_every=1")
    time.sleep(1.0)
    process.kill()
    process.communicate()
    for path in (tmp_path / "r" / "checkpoints").glob("step-*"):
        assert open_checkpoint(path).state["step"] >= 1
    open_checkpoint(find_checkpoint(tmp_path / "r"))


def test_damaged_checkpoints_are_refused(data, tmp_path):
    run(data, tmp_path)
    path = find_checkpoint(tmp_path / "run")
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="wrong checksum"):
        open_checkpoint(path)
    with pytest.raises(UserError, match="no such folder"):
        find_checkpoint(tmp_path / "nothing")


def test_a_full_disk_stops_with_one_line_and_leaves_nothing(data, tmp_path):
    # A limit on the size of files fails a write as a full disk does.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"checkpoint not saved.*File too large"):
            run(data, tmp_path, "model.embed_dim=64", "model.hidden_dim=256")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_resume_refuses_other_data(data, tmp_path):
    run(data, tmp_path)
    (tmp_path / "in.csv").write_text("sequence,time,type\n" + "".join(f"{i // 40},{i},{i % 3}\n" for i in range(400)))
    preprocess(PreprocessOptions([str(tmp_path / "in.csv")], tmp_path / "other.zarr"), lambda line: None)
    with pytest.raises(UserError, match="got vocabulary size 3, expected 5"):
        train(RunOptions(tmp_path / "other.zarr", resume=str(tmp_path / "run")), print)
    with pytest.raises(UserError, match=r"only train\.\* may change"):
        train(RunOptions(data, resume=str(tmp_path / "run"), assignments=("model.embed_dim=8",)), print)


def resolve(*assignments, preset="nano", file=None):
    return resolve_config({"vocabulary_size": 9}, preset, file, list(assignments))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.lrr=1", "did you mean train.lr?"),
        ("lr=1", "did you mean train.lr?"),
        ("model.embed_dims=8", "did you mean model.embed_dim?"),
        ("train.lr=fast", "train.lr: got 'fast'"),
        ("train.lr=-1", "train.lr: got -1"),
        ("train.lr", "expected key=value"),
        ("model.num_heads=7", "expected a multiple of num_heads (7)"),
        ("model.precision=float8", "model.precision: got 'float8'"),
        ("model.dropout.attention=1.5", "model.dropout.attention: got 1.5"),
    ],
)
def test_wrong_assignments(assignment, message):
    with pytest.raises(UserError) as error:
        resolve(assignment)
    assert message in str(error.value)


def test_without_a_preset_the_data_choose_one():
    assert choose_preset("text", 10) == ("tiny", {})
    sizes = [choose_preset("events", targets)[0] for targets in (2, 39_000, 94_000, 10**7)]
    assert sizes == ["pico", "pico", "nano", "tiny"]
    for targets in (1, 3, 500, 39_000, 94_000, 10**7):
        preset, defaults = choose_preset("events", targets)
        config = resolve_config({"vocabulary_size": 9}, preset, None, ["train.ema=none"], defaults)
        assert config.model.dropout.attention == 0 < config.model.dropout.residual
        assert config.train.ema is None, "--set wins"
        # A batch that the data can fill, and enough steps for few data.
        assert config.train.max_length <= config.train.tokens_per_batch <= targets
        assert config.train.epochs * targets / config.train.tokens_per_batch >= 0.9 * min(800, 10 * targets)


def test_precedence_and_files(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[model]\nnum_layers = 3\n[train]\nlr = 0.5\nepochs = 2\n")
    config = resolve("train.lr=0.25", file=file)
    assert (config.model.num_layers, config.train.lr, config.train.epochs) == (3, 0.25, 2.0)
    assert config.model.embed_dim == 64, "from the preset"
    file.write_text("[train]\nlearning_rate = 1\n")
    with pytest.raises(UserError, match=r"run\.toml: unknown key 'train.learning_rate'"):
        resolve(file=file)
    file.write_text("[train\n")
    with pytest.raises(UserError, match=r"run\.toml"):
        resolve(file=file)
    with pytest.raises(UserError, match="did you mean 'nano'"):
        resolve(preset="nanoo")


def test_none_is_a_word_where_it_is_one():
    config = resolve("model.time_bias=none", "train.recompute=none", "model.window=none", "train.steps=None")
    assert (config.model.time_bias, config.train.recompute) == ("none", "none")
    assert (config.model.window, config.train.steps) == (None, None)


def test_every_key_is_listed():
    assert [row[0] for row in key_table()] == config_keys()
    assert "model.dropout.attention" in config_keys()


def test_schedule():
    rates = [learning_rate(s, peak=1.0, warmup=10, total=100, min_ratio=0.1) for s in range(1, 101)]
    assert rates[:10] == pytest.approx([s / 10 for s in range(1, 11)])
    assert rates[54] == pytest.approx(0.1 + 0.9 * 0.5, abs=1e-9)
    assert rates[99] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(rates[10:]))


def test_small_things():
    assert [duration(s) for s in (0.4, 61, 3723)] == ["0:00", "1:01", "1:02:03"]
    assert resident_bytes() > 1 << 20
    assert available_bytes() > 1 << 20

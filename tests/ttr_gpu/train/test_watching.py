"""Spikes are found and their sequences named; waiting for data is measured; plots are drawn."""

import json
import time

import numpy as np
import pytest
from small_runs import run

from ttr_gpu.data.batches import TrainingBatches
from ttr_gpu.data.dataset import open_dataset
from ttr_gpu.data.options import PreprocessOptions
from ttr_gpu.data.preprocess import preprocess
from ttr_gpu.train.checkpoint import find_checkpoint, open_checkpoint
from ttr_gpu.train.metrics import read_metrics
from ttr_gpu.train.plot import plot_decay, plot_training
from ttr_gpu.train.spikes import SpikeDetector


def test_detector_finds_what_stands_out_and_nothing_else():
    rng = np.random.default_rng(0)
    detector = SpikeDetector(8.0)
    found = [
        detector.look(float(3 + 0.1 * rng.standard_normal()), float(np.exp(rng.standard_normal()))) for _ in range(500)
    ]
    assert found == [None] * 500
    spike = detector.look(6.0, 1.0)
    assert (spike.what, spike.value) == ("loss", 6.0)
    assert spike.median == pytest.approx(3.0, abs=0.1)
    assert detector.look(3.0, 1.0) is None, "a spike hardly moves what it is compared with"
    assert detector.look(3.0, 1e6).what == "gradient norm"
    assert detector.look(0.5, 1e-9) is None, "far below is no spike"
    assert detector.look(3.0, None) is None


def test_detector_waits_for_steps_and_can_be_off():
    detector = SpikeDetector(8.0)
    assert [detector.look(1.0, 1.0) for _ in range(15)] + [detector.look(99.0, 99.0)] == [None] * 16
    assert detector.look(99.5, 1.0) is not None
    off = SpikeDetector(0.0)
    assert [off.look(1.0, 1.0) for _ in range(40)] + [off.look(99.0, 99.0)] == [None] * 41


@pytest.fixture(scope="module")
def regular(tmp_path_factory):
    """Types that count up, but for one sequence in which they count down; and the number of that one."""
    folder = tmp_path_factory.mktemp("regular")
    rows = ["sequence,time,type"]
    for s in range(60):
        step = -1 if s == 20 else 1
        rows += [f"{s:03d},{i},{(s + step * i) % 5}" for i in range(20)]
    (folder / "in.csv").write_text("\n".join(rows))
    preprocess(PreprocessOptions([str(folder / "in.csv")], folder / "data.zarr"), lambda line: None)
    split = open_dataset(folder / "data.zarr").split("train")
    tokens, _ = split.read(0, split.token_count)
    steps = [(int(tokens[begin + 1]) - int(tokens[begin])) % 5 for begin in split.offsets[:-1]]
    (odd,) = [number for number, step in enumerate(steps) if step != max(set(steps), key=steps.count)]
    return folder / "data.zarr", odd


def test_a_spike_names_the_sequence_that_caused_it(regular, tmp_path):
    data, odd = regular
    options = ("train.steps=150", "train.lr=0.02", "train.spike_threshold=6", "train.patience=0")
    # All gaps are alike here: their likelihood grows without end, and would hide the types.
    _, said = run(data, tmp_path, *options, "model.time_components=0")
    spikes = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "spike"]
    steps = {record["step"]: record for record in read_metrics(tmp_path / "run") if record["kind"] == "step"}
    assert spikes
    # When it has been learned how types follow each other.
    late = [record for record in spikes if record["what"] == "loss" and record["step"] > 60]
    caused = [record for record in late if odd in record["sequences"]]
    assert caused
    assert max(late, key=lambda record: record["value"]) in caused
    for record in caused:
        assert record["sequences"][0] == odd
        assert record["losses"][0] > 2 * record["losses"][1]
        assert record["value"] == steps[record["step"]]["loss"] > 1.5 * record["median"]
    (line,) = [line for line in said if line.startswith(f"---- step {caused[0]['step']}: loss")]
    assert f"with the highest loss: {odd} (" in line


def test_waiting_for_data_is_measured(data, tmp_path, monkeypatch):
    fetch = TrainingBatches.__next__

    def slow(batches):
        time.sleep(0.05)
        return fetch(batches)

    monkeypatch.setattr(TrainingBatches, "__next__", slow)
    _, said = run(data, tmp_path, "train.steps=5")
    steps = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "step"]
    assert all(0.05 <= record["wait_seconds"] <= record["seconds"] for record in steps)
    shares = [round(100 * record["wait_seconds"] / record["seconds"]) for record in steps]
    lines = [line for line in said if line.startswith("step")]
    assert all(f"wait {share:2d} %" in line for line, share in zip(lines, shares, strict=True))


def test_plots_of_runs(data, tmp_path):
    for name in ("a", "b"):
        run(data, tmp_path, "train.steps=20", "model.num_layers=2", name=name)
    # A step that was skipped has no norm.
    metrics = tmp_path / "a" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    next(line for line in lines if line["kind"] == "step")["gradient_norm"] = None
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = plot_training([tmp_path / "a", tmp_path / "b"], tmp_path / "plots" / "training.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
    checkpoint = open_checkpoint(find_checkpoint(tmp_path / "a"))
    assert plot_decay(checkpoint, tmp_path / "decay.png").read_bytes()[:4] == b"\x89PNG"
    run(data, tmp_path, "train.steps=2", "model.time_bias=none", name="c")
    assert plot_decay(open_checkpoint(find_checkpoint(tmp_path / "c")), tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()

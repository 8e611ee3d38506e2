"""Spikes are found and their sequences named; waiting for data is measured; plots are drawn."""

import io
import json
import re
import struct
import sys
import time

import numpy as np
import pytest
from small_runs import SMALL, records, resume, run, weights

from ttr_gpu.config import ModelConfig
from ttr_gpu.data.batches import TrainingBatches
from ttr_gpu.data.dataset import open_dataset
from ttr_gpu.data.options import PreprocessOptions
from ttr_gpu.data.preprocess import preprocess
from ttr_gpu.errors import UserError
from ttr_gpu.model import TransformerModel
from ttr_gpu.nn import Sequences
from ttr_gpu.train.checkpoint import find_checkpoint, open_checkpoint
from ttr_gpu.train.live import LiveTable
from ttr_gpu.train.metrics import read_metrics
from ttr_gpu.train.plot import plot_decay, plot_periods, plot_training
from ttr_gpu.train.run import RunOptions, train
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
    assert plot_periods(checkpoint, tmp_path / "periods.png").read_bytes()[:4] == b"\x89PNG"
    run(data, tmp_path, "train.steps=2", "model.time_features=none", name="d")
    assert plot_periods(open_checkpoint(find_checkpoint(tmp_path / "d")), tmp_path / "none.png") is None


def test_periods_are_those_of_the_features(data, tmp_path):
    """After one period a feature is what it was, in the unit of the times."""
    model = TransformerModel(
        ModelConfig(vocabulary_size=5, embed_dim=16, num_heads=2, num_layers=1, time_scale=3.0, time_span=600.0)
    )
    time = model.embedding.time
    for frequency in time.frequency:
        frequency.value *= np.float32(1.1)
    for kind, index in (("absolute", 0), ("gap", 1)):
        periods = time.periods()[kind]
        assert len(periods) == 31
        for feature, period in enumerate(periods, 1):
            # A gap of a period, or a time that is a period later.
            starts = np.array([0, 2], np.int32)
            _, at_zero = time.forward(Sequences(starts, np.zeros(2)))
            _, later = time.forward(Sequences(starts, np.array([0.0, period])))
            width = model.config.time_features_dim
            values = [saved.project.x[1, width * index + feature] for saved in (at_zero, later)]
            assert values[0] == pytest.approx(values[1], abs=2e-3), (kind, feature)


def test_periods_behind_the_pace_are_in_the_unit_of_the_times():
    config = ModelConfig(
        vocabulary_size=5, embed_dim=16, num_heads=2, num_layers=1, time_scale=3.0, time_span=600.0, time_pace=7.0
    )
    time = TransformerModel(config).embedding.time
    index, width = time.kinds.index("pace"), config.time_features_dim
    for feature, period in enumerate(time.periods()["pace"], 1):
        # The second event at the pace, and a period later.
        values = [
            time.forward(Sequences(np.array([0, 2], np.int32), np.array([0.0, at])))[1].project.x[1]
            for at in (7.0, 7.0 + period)
        ]
        assert values[0][width * index + feature] == pytest.approx(values[1][width * index + feature], abs=2e-3)


def test_watch_records_every_layer_and_changes_nothing(data, tmp_path):
    options = ("train.steps=9", "model.num_layers=2", "model.dropout.residual=0.2", "train.accumulate=2")
    _, said = run(data, tmp_path / "watched", *options, watch=4)
    run(data, tmp_path / "plain", *options)
    assert records(tmp_path / "watched" / "run") == records(tmp_path / "plain" / "run")
    np.testing.assert_array_equal(weights(tmp_path / "watched" / "run"), weights(tmp_path / "plain" / "run"))
    watched = records(tmp_path / "watched" / "run", "watch")
    assert [record["step"] for record in watched] == [4, 8]
    model = open_checkpoint(find_checkpoint(tmp_path / "plain" / "run")).load_model()
    names = [p.name for p in model.parameters]
    for record in watched:
        assert list(record["gradients"]) == list(record["parameters"]) == names
        parts = ("attention", "attention.output", "feed_forward")
        assert list(record["activations"]) == ["embedding", *(f"blocks.{i}.{part}" for i in (0, 1) for part in parts)]
        assert all(0 < s["rms"] <= s["largest"] for kind in ("gradients", "activations") for s in record[kind].values())
    squares = sum(p.value.size * record["gradients"][p.name]["rms"] ** 2 for p in model.parameters)
    steps = {record["step"]: record for record in records(tmp_path / "watched" / "run")}
    assert squares**0.5 == pytest.approx(steps[8]["gradient_norm"], rel=1e-4), "the parts of the whole gradient"
    assert len([line for line in said if "size (rms) of activations" in line]) == 2
    events = b"".join(path.read_bytes() for path in (tmp_path / "watched" / "run" / "tensorboard").iterdir())
    assert b"watch/gradients/blocks.1.feed_forward.up.weight/rms" in events


def test_watched_gradients_are_without_the_loss_scale(data, tmp_path):
    options = ("train.steps=2", "train.loss_scale=1024")
    seen = {}
    for precision in ("float32", "float16"):
        run(data, tmp_path, *options, f"model.precision={precision}", name=precision, watch=1)
        seen[precision] = records(tmp_path / precision, "watch")[0]["gradients"]["head.weight"]["rms"]
    assert seen["float16"] == pytest.approx(seen["float32"], rel=0.02)


def test_tensorboard_holds_every_step_once(data, tmp_path):
    """Read back by the library's own reader of the format; a resumed run forgets what came after."""
    run(data, tmp_path, "train.checkpoint_every=5", "train.keep_last=9", "train.steps=12", "train.evaluate_every=12")
    resume(data, tmp_path / "run" / "checkpoints" / "step-00000005")
    first, second = (events(path) for path in sorted((tmp_path / "run" / "tensorboard").iterdir()))
    assert scalars(first, "step/loss") == {r["step"]: r["loss"] for r in records(tmp_path / "run")}
    assert list(scalars(second, "step/loss")) == list(range(6, 13))
    (start,) = [event for event in second if event.HasField("session_log")]
    assert start.step == 6


def events(path):
    """Events of a file of records: length, its checksum, the event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        found.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return found


def scalars(events, tag):
    found = {}
    for event in events:
        for value in event.summary.value:
            if value.tag == tag:
                assert event.step not in found
                found[event.step] = pytest.approx(value.simple_value, rel=1e-6)
    return found


def test_a_terminal_shows_a_table_and_log_txt_keeps_the_lines(data, tmp_path):
    from rich.console import Console

    console = Console(file=io.StringIO(), force_terminal=True, width=120, legacy_windows=False)
    live = LiveTable(console)
    options = RunOptions(
        data, preset="nano", out=tmp_path, name="run", assignments=(*SMALL, "train.steps=40"), log_every=10
    )
    train(options, live.line, live)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    header = next(line for line in shown.splitlines() if "loss" in line and "tok/s" in line)
    assert header.split() == ["step", "loss", "lr", "norm", "tok/s", "%", "peak", "memory", "wait", "ETA"]
    last = records(tmp_path / "run")[-1]
    row = next(line for line in reversed(shown.splitlines()) if "40/40" in line)
    assert f"{last['loss']:.4f}" in row
    assert f"{last['lr']:.2e}" in row
    assert shown.index("model ") < shown.index("tok/s") < shown.rindex("run         ")
    assert not any(line.lstrip().startswith("step 40/40  loss") for line in shown.splitlines())
    kept = [line for line in (tmp_path / "run" / "log.txt").read_text().splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in kept] == ["1/40", "10/40", "20/40", "30/40", "40/40"]
    for name in ("loss", "lr", "norm", "tok/s", "% peak", "GiB", "wait", "ETA"):
        assert all(name in line for line in kept)


class Fake:
    """What wandb and trackio have in common, and what each was told."""

    def __init__(self):
        self.begun, self.logged, self.finished, self.metrics = [], [], 0, []

    def init(self, **options):
        self.begun.append(options)
        return self

    def define_metric(self, name, step_metric):
        self.metrics.append((name, step_metric))

    def log(self, values, step=None):
        self.logged.append((values.get("step", step), values))

    def finish(self):
        self.finished += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_what_metrics_jsonl_has(data, tmp_path, monkeypatch, name):
    fake = Fake()
    monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    run(data, tmp_path, "train.steps=6", "train.checkpoint_every=3", "train.keep_last=9", tracker=name)
    resume(data, tmp_path / "run" / "checkpoints" / "step-00000003", tracker=name)
    first, again = fake.begun
    assert first["name"] == "run"
    assert first["resume"] == "allow"
    assert first["project"] == ("mine" if name == "wandb" else "ttr-gpu")
    assert first["config"]["train"]["steps"] == 6
    assert fake.finished == 2
    if name == "wandb":
        assert first["id"] == again["id"]
        assert fake.metrics == [("*", "step"), ("*", "step")]
    losses = [(step, values["step/loss"]) for step, values in fake.logged if "step/loss" in values]
    expected = [(record["step"], record["loss"]) for record in records(tmp_path / "run")]
    assert losses == [*expected, *expected[3:]]
    assert any("validation/loss" in values for _, values in fake.logged)


def test_a_tracker_that_fails_is_named_and_training_goes_on(data, tmp_path, monkeypatch):
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = fake.log

    def failing(values, step=None):
        if values["step"] == 3:
            raise ConnectionError("no route to host")
        log(values, step)

    fake.log = failing
    outcome, said = run(data, tmp_path, "train.steps=6", tracker="wandb")
    assert outcome.reason == "finished"
    (line,) = [line for line in said if "no route to host" in line]
    assert "wandb" in line
    assert "training goes on without it" in line
    assert max(step for step, _ in fake.logged) == 2


def test_a_tracker_that_is_not_there_is_said_before_the_run(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match=r"trackio is not installed .*pip install 'ttr-gpu\[trackio\]'"):
        run(data, tmp_path, tracker="trackio")
    assert not (tmp_path / "run").exists()

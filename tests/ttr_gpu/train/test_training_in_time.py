"""Training on types and gaps together: both are learned and reported, the unit of time does not matter, and neither the
test split nor the order of the file has a say."""

import json
import math

import numpy as np
import pytest
from small_runs import records, run

from ttr_gpu.data.dataset import open_dataset
from ttr_gpu.data.options import PreprocessOptions
from ttr_gpu.data.preprocess import preprocess
from ttr_gpu.infer.evaluation import evaluate_split
from ttr_gpu.infer.floors import gap_floors, lowest
from ttr_gpu.model import TransformerModel
from ttr_gpu.train.checkpoint import find_checkpoint, open_checkpoint
from ttr_gpu.train.trainer import Trainer

OPTIONS = ("train.steps=120", "train.lr=0.01", "train.patience=0", "train.evaluate_every=30")


def alternating(folder, unit=1.0, types=True, digits=None):
    """Types 0, 1, 2 in turn; after each another typical gap, over three orders of magnitude."""
    rng = np.random.default_rng(0)
    rows = ["sequence,time,type" if types else "sequence,time"]
    for s in range(60):
        time, kind = 0.0, int(rng.integers(3))
        for _ in range(20):
            rows.append(f"{s},{time * unit!r}" + (f",{kind}" if types else ""))
            gap = float(np.exp(3.0 * kind + 0.3 * rng.standard_normal()))
            time += gap if digits is None else round(gap, digits)
            kind = (kind + 1) % 3
    folder.mkdir()
    (folder / "in.csv").write_text("\n".join(rows))
    preprocess(PreprocessOptions([str(folder / "in.csv")], folder / "data.zarr"), lambda line: None)
    return folder / "data.zarr"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alternating")
    path = alternating(folder / "data")
    _, said = run(path, folder, *OPTIONS)
    return path, folder / "run", said


def evaluate(path, folder, trained=True):
    checkpoint = open_checkpoint(find_checkpoint(folder))
    model = checkpoint.load_model() if trained else TransformerModel(checkpoint.config.model)
    return evaluate_split(model, open_dataset(path).split("test"), tokens_per_batch=64, max_length=32)


def test_types_and_gaps_are_learned_together(trained):
    path, folder, said = trained
    result = evaluate(path, folder)
    dataset = open_dataset(path)
    floor = lowest(gap_floors(dataset.split("train"), dataset.split("test"), 0.5), "time")
    # Knowing the type, the gap is log-normal with sigma 0.3: its entropy on average over the three kinds of gap.
    truth = 3.0 + math.log(0.3) + 0.5 * math.log(2 * math.pi * math.e)
    assert result.cross_entropy < 0.1
    assert truth - 0.2 < result.time_nll < truth + 0.4 < floor.value - 0.5
    text = "\n".join(said)
    assert "first event of a sequence not scored, no survival term" in text
    assert "gap to it" in text


def test_parts_of_the_loss_are_recorded(trained):
    _, folder, said = trained
    for kind in ("step", "validation"):
        for record in records(folder, kind):
            assert record["loss"] == pytest.approx(record["type_loss"] + record["time_loss"], rel=1e-5)
    first = records(folder)[0]
    (line,) = [line for line in said if line.startswith("step   1/")]
    assert f"(type {first['type_loss']:.4f}, time {first['time_loss']:.4f})" in line


def test_the_scale_of_time_is_in_the_checkpoint(trained):
    path, folder, _ = trained
    dataset = open_dataset(path)
    split = dataset.split("train")
    _, times = split.read(0, split.token_count)
    gaps = np.delete(np.diff(times), split.offsets[1:-1] - 1)
    config = open_checkpoint(find_checkpoint(folder)).config.model
    assert config.time_log_mean == pytest.approx(np.log(gaps).mean(), rel=1e-9)
    assert config.time_log_std == pytest.approx(np.log(gaps).std(), rel=1e-9)
    assert config.time_zero_gap == pytest.approx(gaps.min() / 2, rel=1e-9)


def test_a_run_in_another_unit_is_the_same_run(trained, tmp_path):
    """Preprocessed, trained and evaluated in seconds instead of hours: every loss is log 3600 higher."""
    path, folder, _ = trained
    seconds = alternating(tmp_path / "data", unit=3600.0)
    run(seconds, tmp_path, *OPTIONS)
    before, after = evaluate(path, folder), evaluate(seconds, tmp_path / "run")
    # Other content, other order of the data; and the typical gap, which Time2Vec is scaled by, is known to 0.6 %.
    first = [evaluate(*each, trained=False) for each in ((path, folder), (seconds, tmp_path / "run"))]
    assert first[1].time_nll - first[0].time_nll == pytest.approx(math.log(3600), abs=0.01)
    assert after.time_nll - before.time_nll == pytest.approx(math.log(3600), abs=0.05)
    assert after.cross_entropy == pytest.approx(before.cross_entropy, abs=0.05)


def test_events_without_types_are_trained_on_time_alone(tmp_path):
    path = alternating(tmp_path / "data", types=False)
    _, said = run(path, tmp_path, *OPTIONS)
    text = "\n".join(said)
    assert "next type" not in text
    assert "n-gram" not in text
    assert "(type" not in text
    assert "gap to it" in text
    assert "below the best floor (log-normal)" in text
    result = evaluate(path, tmp_path / "run")
    assert result.cross_entropy == 0.0
    steps = records(tmp_path / "run")
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5


def test_only_the_validation_split_decides(trained, tmp_path, monkeypatch):
    """Early stopping and the choice of the best step look at validation; the test split is read once, at the end."""
    path, _, _ = trained
    looked_at = []
    plain = Trainer.evaluate

    def watched(trainer, split_name, limit_tokens=None):
        looked_at.append((split_name, trainer.progress.step))
        return plain(trainer, split_name, limit_tokens)

    monkeypatch.setattr(Trainer, "evaluate", watched)
    outcome, _ = run(path, tmp_path, "train.lr=0.05", "train.patience=2", "train.evaluate_every=5", "train.steps=200")
    assert outcome.reason == "early"
    assert looked_at[-1][0] == "test"
    assert [name for name, _ in looked_at[:-1]] == ["validation"] * (len(looked_at) - 1)
    # The checkpoint that was tested is the best on validation.
    validated = records(tmp_path / "run", "validation")
    best = min(validated, key=lambda record: record["loss"])
    assert find_checkpoint(tmp_path / "run", best=True).name == f"step-{best['step']:08d}"


def test_splits_are_not_in_file_order(tmp_path):
    """Sequences in the order of their first event, as crawled data often are: a split in file order would test on
    those that began last, whose remaining time, and so whose gaps, are shorter."""
    rows = ["sequence,time,type"]
    rows += [f"{s:03d},{100 * s + i},0" for s in range(300) for i in range(3)]
    (tmp_path / "in.csv").write_text("\n".join(rows))
    preprocess(PreprocessOptions([str(tmp_path / "in.csv")], tmp_path / "data.zarr"), lambda line: None)
    dataset = open_dataset(tmp_path / "data.zarr")
    for name in dataset.splits:
        split = dataset.split(name)
        starts = split.read(0, split.token_count)[1][split.offsets[:-1]] / 100
        assert abs(starts.mean() - 149.5) < 45, name
        assert starts.max() - starts.min() > 200, name


@pytest.mark.parametrize(("digits", "grid"), [(0, 1.0), (2, 0.01), (None, None)])
def test_the_grid_of_the_clock_is_found(tmp_path, digits, grid):
    dataset = open_dataset(alternating(tmp_path / "data", digits=digits))
    if grid is None:
        assert dataset.gap["grid"] is None
    else:
        assert dataset.gap["grid"] == pytest.approx(grid, rel=1e-12)


def test_a_coarser_grid_than_the_unit_is_found(tmp_path):
    dataset = open_dataset(alternating(tmp_path / "data", unit=60.0, digits=0))
    assert json.loads(json.dumps(dataset.gap))["grid"] == 60.0

"""The survival term in training: its loss by hand, the whole gradient against finite differences, windows with the last
event in them, and runs that say what they count."""

import importlib.util
import json
import math
import sys
from types import ModuleType

import numpy as np
import pytest
from model_batches import packed

from ttr_gpu.backend import CENSORED
from ttr_gpu.config import ModelConfig
from ttr_gpu.data.batches import TrainingBatches, evaluation_batches
from ttr_gpu.data.dataset import open_dataset
from ttr_gpu.data.options import PreprocessOptions
from ttr_gpu.data.preprocess import preprocess
from ttr_gpu.errors import UserError
from ttr_gpu.infer.evaluation import evaluate_in_detail, evaluate_split
from ttr_gpu.model import TransformerModel
from ttr_gpu.train.checkpoint import find_checkpoint, open_checkpoint
from ttr_gpu.train.metrics import read_metrics
from ttr_gpu.train.run import RunOptions, train

END = 100.0
SMALL = (
    "model.embed_dim=16", "model.hidden_dim=32", "model.num_heads=2", "model.num_layers=1", "train.max_length=16",
    "train.tokens_per_batch=64", "train.lr=0.01", "train.patience=0",
)  # fmt: skip


def make(folder, observation=f"0,{END}", sequences=80):
    """Sequences that end one by one with a chance of a tenth after each event: gaps alone never show it."""
    rng = np.random.default_rng(0)
    rows = ["sequence,time,type"]
    for s in range(sequences):
        time = 0.0
        while True:
            time += float(rng.exponential(1.0))
            rows.append(f"{s},{time!r},{rng.integers(2)}")
            if time > 0.5 * END or rng.random() < 0.1:
                break
    (folder / "in.csv").write_text("\n".join(rows))
    preprocess(
        PreprocessOptions([str(folder / "in.csv")], folder / "data.zarr", observation=observation), lambda line: None
    )
    return folder / "data.zarr"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make(tmp_path_factory.mktemp("observed"))


def model_of(**changes):
    config = {
        "vocabulary_size": 11, "embed_dim": 16, "hidden_dim": 24, "num_layers": 2, "num_heads": 4, "time_scale": 3.0,
        "time_span": 500.0, "time_features_dim": 6, "time_components": 3, "time_log_mean": 1.2, "time_log_std": 0.7,
        "time_min_sigma": 0.3,
    }  # fmt: skip
    model = TransformerModel(ModelConfig(**{**config, **changes}), seed=1, precision_name="float64")
    model.time_head.weight.value *= 20
    return model


def censored_batch():
    """Ends of the first and the last of three sequences, one long after its last event, one not at all."""
    batch = packed([7, 1, 12], 11)
    for at, wait in ((6, 300.0), (19, 0.0)):
        batch.targets[at], batch.target_times[at] = CENSORED, batch.times[at] + wait
    return batch


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_loss_is_the_sum_over_events_and_ends_per_event(weight):
    model, batch = model_of(), censored_batch()
    loss, saved = model.loss_forward(batch, time_weight=weight, gradients=False)
    gaps = model.next_gap(model.outputs(batch))
    scored = batch.targets >= 0
    nats = gaps[scored].nll((batch.target_times - batch.times)[scored]).sum()
    survival = -gaps[np.array([6, 19])].log_survival(np.array([300.0, 0.0])).sum()
    assert survival > 0.1
    assert float(saved.time_loss) == pytest.approx((nats + survival) / scored.sum(), rel=1e-9)
    assert float(loss) == pytest.approx(float(saved.type_loss) + weight * float(saved.time_loss), rel=1e-12)
    plain = censored_batch()
    plain.targets[[6, 19]] = -1
    _, without = model.loss_forward(plain, gradients=False)
    assert float(without.type_loss) == pytest.approx(float(saved.type_loss), rel=1e-12), "no type is scored there"
    assert float(without.time_loss) == pytest.approx(nats / scored.sum(), rel=1e-9)


def test_gradients_agree_with_finite_differences():
    model, batch = model_of(), censored_batch()
    model.flat.values[...] *= 2.0
    for p in model.embedding.parameters:
        p.value[...] *= 20.0 if p.decay else 1.0
    model.zero_gradients()
    _, saved = model.loss_forward(batch, time_weight=0.7)
    model.loss_backward(1.0, saved)
    rng = np.random.default_rng(0)
    for p in model.parameters:
        direction, before, losses = rng.standard_normal(p.value.shape), p.value.copy(), []
        for step in (1e-6, -1e-6):
            p.value[...] = before + step * direction
            losses.append(float(model.loss_forward(batch, time_weight=0.7, gradients=False)[0]))
        p.value[...] = before
        expected = (losses[0] - losses[1]) / 2e-6
        assert float((p.gradient * direction).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-7), p.name


def test_another_unit_of_time_does_not_move_the_survival_term():
    batch = censored_batch()
    hours, seconds = model_of(), model_of(time_scale=3.0 * 3600, time_span=500.0 * 3600,
                                          time_log_mean=1.2 + math.log(3600))  # fmt: skip
    at = np.array([6, 19])
    before = hours.evaluate_batch(batch).time_losses[at]
    batch.times, batch.target_times = batch.times * 3600, batch.target_times * 3600
    np.testing.assert_allclose(seconds.evaluate_batch(batch).time_losses[at], before, rtol=1e-6, atol=1e-12)


def test_on_a_gpu_it_is_the_same_loss_and_gradient(gpu, monkeypatch):
    if importlib.util.find_spec("cupyx") is None:
        # The stand-in for CuPy has no special functions.
        special, erfc = ModuleType("cupyx.scipy.special"), np.vectorize(math.erfc, otypes=[np.float64])
        special.erfc = lambda x: gpu.xp.asarray(erfc(x.get()))
        monkeypatch.setitem(sys.modules, "cupyx.scipy.special", special)
    found = []
    for backend in ({"backend": gpu}, {}):
        model = TransformerModel(ModelConfig(vocabulary_size=11, embed_dim=16, hidden_dim=24, num_heads=4, num_layers=1,
                                             time_components=3), seed=1, **backend)  # fmt: skip
        model.zero_gradients()
        loss, saved = model.loss_forward(censored_batch())
        model.loss_backward(1.0, saved)
        gradients = model.flat.gradients
        found.append((float(loss), gradients.get() if backend else gradients))
    assert found[0][0] == pytest.approx(found[1][0], rel=5e-6)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-3, atol=1e-5)


def test_a_head_that_is_given_the_type_refuses():
    with pytest.raises(ValueError, match="censored: got positions, expected None"):
        model_of(time_given_type=True).loss_forward(censored_batch())


@pytest.mark.parametrize("max_length", [7, 64])
def test_windows_hold_every_last_event_once(data, max_length):
    split = open_dataset(data).split("train")
    with TrainingBatches(
        split, fingerprint="f", tokens_per_batch=64, max_length=max_length, survival=True
    ) as training:  # fmt: skip
        epoch = [next(training) for _ in range(training.steps_per_epoch)]
    ordered = evaluation_batches(split, tokens_per_batch=64, max_length=max_length, survival=True)
    plain = evaluation_batches(split, tokens_per_batch=64, max_length=max_length)
    tokens, times = split.read(0, split.token_count)
    for batches in (epoch, list(ordered)):
        ends, targets = [], 0
        for batch in batches:
            at = np.flatnonzero(batch.targets == CENSORED)
            window = np.searchsorted(batch.cu_seqlens, at, "right") - 1
            assert (batch.cu_seqlens[window + 1] - 1 == at).all(), "the last of their windows"
            last = split.offsets[batch.sequence_ids[window] + 1] - 1
            np.testing.assert_array_equal(batch.times[at], times[last])
            np.testing.assert_array_equal(batch.tokens[at], tokens[last])
            np.testing.assert_allclose(batch.target_times[at], split.observed_until)
            ends += batch.sequence_ids[window].tolist()
            targets += int((batch.targets >= 0).sum())
        assert sorted(ends) == list(range(split.sequences))
        assert targets == split.token_count - split.sequences
    assert not any((batch.targets == CENSORED).any() for batch in plain)


def test_both_evaluations_agree(data):
    dataset = open_dataset(data)
    model = TransformerModel(ModelConfig(vocabulary_size=2, embed_dim=16, hidden_dim=16, num_layers=1, num_heads=2,
                                         time_components=3, time_log_mean=0.0), seed=1)  # fmt: skip
    options = {"tokens_per_batch": 256, "max_length": 128, "survival": True}
    quick, detailed = (each(model, dataset.split("test"), **options) for each in (evaluate_split, evaluate_in_detail))
    assert quick.survival == pytest.approx(detailed.survival, rel=1e-4)
    assert quick.time_nll == pytest.approx(detailed.time_nll, rel=1e-4)
    assert quick.protocol == detailed.protocol
    assert quick.loss(0.5) == pytest.approx(quick.cross_entropy + 0.5 * (quick.time_nll + quick.survival))


def test_a_run_that_counts_survival_learns_that_sequences_end(data, tmp_path):
    survival = {}
    for name, *more in (("without",), ("with", "train.survival=true")):
        said = []
        train(
            RunOptions(data, "nano", assignments=(*SMALL, "train.steps=150", *more), out=tmp_path, name=name),
            said.append,
        )  # fmt: skip
        model = open_checkpoint(find_checkpoint(tmp_path / name, best=True)).load_model()
        test = open_dataset(data).split("test")
        survival[name] = evaluate_in_detail(model, test, tokens_per_batch=256, max_length=64, survival=True)
        counted = "with the survival term up to the end of observation"
        assert (counted in "\n".join(said)) == bool(more)
        assert any(line.startswith("survival ") for line in said) == bool(more)
    # Without, nothing says that a gap may be longer than any that was seen.
    assert survival["with"].survival < 0.7 * survival["without"].survival
    assert survival["with"].nll < survival["without"].nll
    last = [r for r in read_metrics(tmp_path / "with") if r["kind"] == "validation"][-1]
    assert last["loss"] == pytest.approx(last["type_loss"] + last["time_loss"] + last["survival"], rel=1e-6)
    assert json.loads((tmp_path / "with" / "config.json").read_text())["train"]["survival"] is True


@pytest.mark.parametrize(
    ("observed", "assignments", "message"),
    [
        (False, (), r"train\.survival: .* does not say when observation ended; preprocess it with --observation"),
        (True, ("model.time_components=0",), r"train\.survival: this model does not model time"),
        (True, ("model.time_given_type=true",), r"train\.survival: cannot be combined with model\.time_given_type"),
    ],
)
def test_what_cannot_count_it_is_refused(data, tmp_path, observed, assignments, message):
    path = data if observed else make(tmp_path, observation=None, sequences=20)
    with pytest.raises(UserError, match=message):
        train(
            RunOptions(path, "nano", assignments=(*SMALL, "train.survival=true", *assignments), out=tmp_path / "runs"),
            print,
        )  # fmt: skip


def test_a_run_does_not_change_its_mind(data, tmp_path):
    train(RunOptions(data, "nano", assignments=(*SMALL, "train.steps=2"), out=tmp_path, name="run"), lambda line: None)
    with pytest.raises(UserError, match=r"--resume: cannot change train\.survival from False to True"):
        train(RunOptions(data, resume=str(tmp_path / "run"), assignments=("train.survival=true",)), print)

"""Schedules, Muon, averages of weights."""

from itertools import pairwise

import numpy as np
import pytest
from model_batches import packed
from small_runs import records, resume, run, weights

from ttr_gpu.config import ModelConfig
from ttr_gpu.model import TransformerModel
from ttr_gpu.train.averages import Averages
from ttr_gpu.train.checkpoint import find_checkpoint, open_checkpoint
from ttr_gpu.train.config import TrainConfig
from ttr_gpu.train.muon import hidden_matrices, muon, orthogonal
from ttr_gpu.train.optimizer import Optimizer
from ttr_gpu.train.schedule import learning_rate


def rates(schedule, **changes):
    options = {"peak": 1.0, "warmup": 10, "total": 100, "min_ratio": 0.1, "decay": 0.3, "schedule": schedule, **changes}
    return [learning_rate(step, **options) for step in range(1, 101)]


def test_every_schedule_warms_up():
    for schedule in ("cosine", "wsd", "constant"):
        assert rates(schedule)[:10] == pytest.approx([step / 10 for step in range(1, 11)])


def test_wsd_is_stable_and_then_decays():
    got = rates("wsd")
    assert set(got[9:70]) == {1.0}
    assert got[84] == pytest.approx(0.1 + 0.9 * (1 - 0.5**0.5))
    assert got[99] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(got[69:]))
    assert rates("wsd", decay=1.0)[54] == pytest.approx(0.1 + 0.9 * (1 - 0.5**0.5)), "never before the warm-up ends"


def test_constant_stays():
    assert set(rates("constant")[9:]) == {1.0}


@pytest.mark.parametrize("shape", [(12, 12), (7, 20), (20, 7)])
def test_orthogonal_keeps_directions_and_evens_out_sizes(shape):
    matrix = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    got = orthogonal(matrix)
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    sizes = np.einsum("ij,ik,kj->j", u, got, v.T)
    assert got.shape == shape
    assert sizes.min() > 0.5
    assert sizes.max() < 1.3
    np.testing.assert_allclose(u.T @ got @ v.T, np.diag(sizes), atol=1e-4)


def test_muon_is_its_formula():
    rng = np.random.default_rng(1)
    w, g, m = (rng.standard_normal((6, 10)) for _ in range(3))
    momentum = 0.9 * m + 0.1 * 0.5 * g
    expected = w * (1 - 0.01 * 0.2) - 0.01 * 0.2 * 10**0.5 * orthogonal(0.9 * momentum + 0.1 * 0.5 * g)
    muon(w, g, m, learning_rate=0.01, beta=0.9, weight_decay=0.2, gradient_scale=0.5)
    np.testing.assert_allclose(m, momentum, rtol=1e-12)
    np.testing.assert_allclose(w, expected, rtol=1e-12)


def small_model():
    shape = {"embed_dim": 16, "hidden_dim": 24, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    return TransformerModel(ModelConfig(vocabulary_size=11, time_span=500.0, **shape), seed=3)


def test_muon_takes_the_matrices_of_blocks_and_adamw_the_rest():
    updated = {}
    for name in ("adamw", "muon"):
        model = small_model()
        optimizer = Optimizer(model, TrainConfig(optimizer=name, clip_norm=1e9))
        loss, saved = model.loss_forward(packed([20, 3, 17], 11))
        model.loss_backward(float(loss), saved)
        optimizer.update(1, 1e-2, optimizer.gradient_norm())
        updated[name] = {p.name: p.value for p in model.parameters}
        state = optimizer.state()
    muons = {p.name for p, _ in hidden_matrices(model)}
    assert muons == {p.name for block in model.blocks for p in block.parameters if p.decay}
    for name, value in updated["adamw"].items():
        assert np.array_equal(value, updated["muon"][name]) == (name not in muons), name
        kinds = {key.rpartition("/")[2] for key in state if key.rpartition("/")[0] == name}
        assert kinds == ({"momentum"} if name in muons else {"first", "second"})
    for p, parts in hidden_matrices(model):
        rows = [row for part in parts for row in range(*part.indices(len(p.value)))]
        assert rows == list(range(len(p.value))), f"{p.name}: every row once"


def test_muon_learns_and_resumes_exactly(data, tmp_path):
    options = ("train.optimizer=muon", "train.lr=0.01", "train.steps=60", "train.checkpoint_every=30")
    run(data, tmp_path / "whole", *options, "train.keep_last=99", "train.schedule=wsd")
    whole = tmp_path / "whole" / "run"
    losses = [record["loss"] for record in records(whole)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    before = weights(whole)
    resume(data, whole / "checkpoints" / "step-00000030")
    np.testing.assert_array_equal(weights(whole), before)


def test_averages_are_their_formula():
    model = small_model()
    averages = Averages(model, 0.5)
    first = model.flat.values.copy()
    model.flat.values[...] += 1.0
    averages.update(1)
    np.testing.assert_allclose(averages.values, first + 1 - 2 / 11, rtol=1e-6, atol=1e-6)
    model.flat.values[...] += 1.0
    averages.update(100)
    np.testing.assert_allclose(averages.values, 0.5 * (first + 1 - 2 / 11) + 0.5 * (first + 2), rtol=1e-6, atol=1e-6)
    trained = model.flat.values.copy()
    with averages.in_model():
        np.testing.assert_array_equal(model.flat.values, averages.values)
    np.testing.assert_array_equal(model.flat.values, trained)


def test_averages_are_evaluated_saved_and_resumed(data, tmp_path):
    options = (
        "train.ema=0.9",
        "train.checkpoint_every=10",
        "train.evaluate_every=10",
        "train.keep_last=99",
        "train.lr=0.01",
    )
    _, said = run(data, tmp_path, *options)
    folder = tmp_path / "run"
    assert sum("with averaged weights" in line for line in said) == 2
    for record in records(folder, "validation"):
        assert record["loss"] != record["loss_without_average"]
    checkpoint = open_checkpoint(find_checkpoint(folder))
    averaged, plain = checkpoint.load_model(), checkpoint.load_model(averaged=False)
    assert not np.array_equal(averaged.flat.values, plain.flat.values)
    resume(data, folder / "checkpoints" / "step-00000010")
    again = open_checkpoint(find_checkpoint(folder))
    np.testing.assert_array_equal(again.load_model().flat.values, averaged.flat.values)
    np.testing.assert_array_equal(again.load_model(averaged=False).flat.values, plain.flat.values)


# --- widths (muP)

WIDTHS = (32, 64, 128, 256)


def model_of_width(width, base):
    shape = {"embed_dim": width, "hidden_dim": 2 * width, "num_layers": 2, "num_heads": width // 16}
    return TransformerModel(
        ModelConfig(vocabulary_size=50, time_span=500.0, time_components=4, mup_base_width=base, **shape), seed=3
    )


def sizes_after_steps(width, base, optimizer, steps=6):
    """Root mean squares of how steps on one batch have changed each layer's activations, and of the logits."""
    model, batch = model_of_width(width, base), packed([40, 24, 64], 50)
    before = {name: x.copy() for name, x in model.activations(batch)}
    trainer = Optimizer(model, TrainConfig(optimizer=optimizer))
    for step in range(1, steps + 1):
        model.zero_gradients()
        _, saved = model.loss_forward(batch)
        model.loss_backward(1.0, saved)
        trainer.update(step, 0.02, trainer.gradient_norm())
    changes = {name: x - before[name] for name, x in model.activations(batch)}
    changes["logits"] = model.logits(batch)
    return {name: float(np.sqrt((x**2).mean())) for name, x in changes.items()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_coordinate_check(optimizer):
    """With muP a few steps change every layer's activations by the same at any width; without, by more and more."""
    growth = {}
    for base in (32, None):
        sizes = [sizes_after_steps(width, base, optimizer) for width in WIDTHS]
        growth[base] = {name: sizes[-1][name] / sizes[0][name] for name in sizes[0]}
        if base:
            for name in sizes[0]:
                values = [each[name] for each in sizes]
                assert max(values) < 2.0 * min(values), f"{name}: {values}"
    assert growth[None]["blocks.1.feed_forward"] > 1.5 * growth[32]["blocks.1.feed_forward"]
    assert growth[None]["logits"] > 2 * growth[32]["logits"]


def test_at_its_base_width_nothing_changes_and_elsewhere_only_matrices():
    plain, base, wide = model_of_width(64, None), model_of_width(64, 64), model_of_width(64, 16)
    np.testing.assert_array_equal(plain.flat.values, base.flat.values)
    assert {p.rate for p in base.parameters} == {1.0}
    for p, q in zip(plain.parameters, wide.parameters, strict=True):
        head = p.name in ("head.weight", "time_head.weight")
        np.testing.assert_array_equal(q.value, 0.25 * p.value if head else p.value, err_msg=p.name)
        assert q.rate == (0.25 if head or (p.name.startswith("blocks.") and p.value.ndim == 2) else 1.0), p.name


def test_groups_are_updated_at_their_own_rates():
    model = model_of_width(64, 16)
    config = TrainConfig(clip_norm=1e9, eps=1e-30, weight_decay=0.5)
    optimizer = Optimizer(model, config)
    model.flat.gradients[...] = np.random.default_rng(0).choice([-1.0, 1.0], model.flat.values.size)
    before = {p.name: p.value.copy() for p in model.parameters}
    optimizer.update(1, 0.01, optimizer.gradient_norm())
    for p in model.parameters:
        # Adam's first step is the gradient's sign; the decay is that of the whole rate.
        expected = before[p.name] * (1 - 0.005 * p.decay) - 0.01 * p.rate * p.gradient
        np.testing.assert_allclose(p.value, expected, rtol=1e-4, atol=1e-6, err_msg=p.name)


def test_a_tied_head_cannot_follow_the_width():
    with pytest.raises(ValueError, match="tied_head: got true, expected false with mup_base_width"):
        ModelConfig(vocabulary_size=5, tied_head=True, mup_base_width=64)

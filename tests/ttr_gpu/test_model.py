"""The whole model: gradients against finite differences, ten golden losses, precisions, dropout, packing."""

import json
from pathlib import Path

import numpy as np
import pytest
from model_batches import packed

from ttr_gpu.config import PRESETS, DropoutConfig, ModelConfig
from ttr_gpu.model import TransformerModel
from ttr_gpu.nn import DropoutKey
from ttr_kernels.adamw import adamw

GOLDEN = Path(__file__).with_name("golden_losses.json")


def config(**changes):
    fields = {
        "vocabulary_size": 11, "embed_dim": 16, "hidden_dim": 24, "num_layers": 2, "num_heads": 4, "time_scale": 3.0,
        "time_span": 500.0, "time_features_dim": 6,
    }  # fmt: skip
    return ModelConfig(**{**fields, **changes})


VARIANTS = {
    "default": {},
    "linear bias, absolute features": {"time_bias": "linear", "time_features": "absolute"},
    "no time": {"time_bias": "none", "time_features": "none"},
    "grouped heads, window, tied head": {"num_kv_heads": 2, "window": 5, "tied_head": True},
    "dropout": {"dropout": DropoutConfig(attention=0.2, feed_forward=0.1, residual=0.3)},
    "gaps": {"time_components": 3, "time_log_mean": 1.2, "time_log_std": 0.7, "time_min_sigma": 0.3},
    "gaps, tied head, one component": {"time_components": 1, "tied_head": True, "time_bias": "linear"},
    "gaps given the type": {"time_components": 3, "time_given_type": True, "time_log_std": 1.5, "time_min_sigma": 0.1},
    "rope by time": {"rope": "time", "time_components": 2, "time_bias": "none"},
    "performer": {"attention": "performer", "attention_features": 12, "time_bias": "linear", "num_kv_heads": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_agree_with_finite_differences(variant):
    model = TransformerModel(config(**VARIANTS[variant]), seed=1, precision_name="float64")
    # Initial weights are small: larger ones bring every term of the gradient into play, and keep the first norm (which
    # divides by the embedding's size) from bending within a step of the difference.
    model.flat.values[...] *= 2.0
    for p in model.embedding.parameters:
        p.value[...] *= 20.0 if p.decay else 1.0
    batch = packed([7, 1, 12], 11)
    options = {"dropout": DropoutKey(3, 8), "label_smoothing": 0.05, "z_loss": 1e-3}
    model.flat.gradients.fill(np.nan)
    _, saved = model.loss_forward(batch, **options)
    model.loss_backward(1.0, saved, accumulate=False)
    rng = np.random.default_rng(0)
    for p in model.parameters:
        direction = rng.standard_normal(p.value.shape)
        before = p.value.copy()
        losses = []
        for step in (1e-6, -1e-6):
            p.value[...] = before + step * direction
            losses.append(model.loss_forward(batch, gradients=False, **options)[0])
        p.value[...] = before
        numeric = (losses[0] - losses[1]) / 2e-6
        analytic = np.vdot(p.gradient, direction)
        assert analytic == pytest.approx(numeric, rel=1e-5, abs=1e-8), p.name
        assert np.abs(p.gradient).max() > 0, f"{p.name} has no gradient at all"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_first_backward_writes_what_it_would_add_to_zeros(variant, precision):
    found = []
    for accumulate in (True, False):
        model = TransformerModel(config(**VARIANTS[variant], precision=precision), seed=1)
        model.flat.gradients.fill(np.nan)
        if accumulate:
            model.zero_gradients()
        for batch, adds in ((packed([7, 1, 12], 11), accumulate), (packed([5], 11), True)):
            _, saved = model.loss_forward(batch, DropoutKey(3, 8))
            model.loss_backward(0.5, saved, accumulate=adds)
        found.append(model.flat.gradients)
    added, written = found
    np.testing.assert_allclose(written, added, rtol=1e-6, atol=1e-9)


def ten_losses(precision="float32"):
    model = TransformerModel(config(precision=precision), seed=4)
    moments = np.zeros_like(model.flat.values), np.zeros_like(model.flat.values)
    losses = []
    for step in range(1, 11):
        model.zero_gradients()
        loss, saved = model.loss_forward(packed([20, 3, 17], 11, seed=1))
        model.loss_backward(1.0, saved)
        adamw(model.flat.values, model.flat.gradients, *moments, learning_rate=3e-3, step=step)
        model.values_changed()
        losses.append(float(loss))
    return losses


def test_ten_golden_losses():
    np.testing.assert_allclose(ten_losses(), json.loads(GOLDEN.read_text()), rtol=2e-6)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_follows_float32(precision):
    np.testing.assert_allclose(ten_losses(precision), json.loads(GOLDEN.read_text()), rtol=2e-2)


def test_same_seed_gives_the_same_bits():
    assert ten_losses() == ten_losses()


def test_sequences_in_a_pack_do_not_see_each_other():
    model = TransformerModel(config(), seed=2)
    both = packed([9, 6], 11, ignored=0.0)
    starts = np.array([0, 6], np.int32)
    alone = type(both)(both.tokens[9:], both.times[9:], starts, both.targets[9:], both.target_times[9:])
    np.testing.assert_allclose(model.evaluate_batch(both)[0][9:], model.evaluate_batch(alone)[0], rtol=1e-5)


def test_the_future_does_not_change_the_past():
    model = TransformerModel(config(), seed=2)
    batch = packed([12], 11, ignored=0.0)
    before = model.evaluate_batch(batch).losses
    batch.tokens[8:] = (batch.tokens[8:] + 1) % 11
    batch.times[8:] += 1e4
    after = model.evaluate_batch(batch).losses
    np.testing.assert_array_equal(before[:8], after[:8])
    assert not np.array_equal(before[8:], after[8:])


def test_time_matters():
    model = TransformerModel(config(), seed=2)
    batch = packed([12], 11, ignored=0.0)
    before = model.evaluate_batch(batch).losses
    batch.times[5] += 0.5 * (batch.times[6] - batch.times[5])
    assert not np.array_equal(before[5:], model.evaluate_batch(batch)[0][5:])


def test_logits_are_those_of_the_loss():
    model = TransformerModel(config(), seed=2)
    batch = packed([12, 5], 11, ignored=0.0)
    logits = model.logits(batch, rows=np.array([3, 16]))
    expected = np.logaddexp.reduce(logits, axis=1) - logits[[0, 1], batch.targets[[3, 16]]]
    np.testing.assert_allclose(model.evaluate_batch(batch)[0][[3, 16]], expected, rtol=1e-5)


def test_dropout_key_decides_the_masks():
    model = TransformerModel(config(dropout=DropoutConfig(attention=0.2, feed_forward=0.2, residual=0.2)), seed=2)
    batch = packed([30], 11)
    first, again, other = (model.loss_forward(batch, DropoutKey(1, step))[0] for step in (5, 5, 6))
    assert first == again
    assert first != other
    assert model.loss_forward(batch)[0] == model.loss_forward(batch, gradients=False)[0]


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda m: m.embedding.table.value.fill(np.nan), "parameter embedding.token.weight"),
        (lambda m: m.blocks[1].attention.qkv.value.__setitem__(slice(32, 48), 3e38), "blocks.1.attention"),
        (lambda m: m.blocks[0].feed_forward.down.value.fill(3e38), "blocks.0.feed_forward"),
        (lambda m: m.head.weight.value.fill(3e38), "head"),
    ],
)
def test_the_first_layer_that_is_not_finite_is_found(spoil, expected):
    model = TransformerModel(config(), seed=2)
    batch = packed([9], 11)
    assert model.find_nonfinite(batch) is None
    spoil(model)
    with np.errstate(all="ignore"):
        assert model.find_nonfinite(batch).startswith(expected)


def test_flops_count_matrices_and_pairs():
    model = TransformerModel(config(window=4))
    matrices = 2 * ((3 * 16 * 16) + 16 * 16 + 3 * 16 * 24) + 12 * 16 + 11 * 16
    pairs = sum(min(i + 1, 4) for i in range(10))
    assert model.flops(packed([10], 11)) == 6 * matrices * 10 + 14 * pairs * 16 * 2


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid(preset):
    ModelConfig(vocabulary_size=50257, **PRESETS[preset])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "time_bias: got 'log', expected 'linear' or 'none' with attention 'performer'"),
        ({"time_bias": "linear", "window": 5}, "window: got 5, expected none with attention 'performer'"),
        (
            {"time_bias": "none", "dropout": DropoutConfig(attention=0.1)},
            r"dropout\.attention: got 0\.1, expected 0 with attention 'performer'",
        ),
    ],
)
def test_performer_attention_refuses_what_it_cannot_do(changes, message):
    with pytest.raises(ValueError, match=message):
        config(attention="performer", **changes)


def test_performer_attention_comes_close_to_softmax():
    """The same weights, softmax and random features; the more of these, the closer."""
    exact = TransformerModel(config(time_bias="linear"), seed=2)
    for block in exact.blocks:
        # Small queries and keys: what features approximate well.
        block.attention.qkv.value[:32] *= 0.3
    batch = packed([40, 12], 11)
    errors = []
    for features in (16, 4096):
        linear = TransformerModel(
            config(time_bias="linear", attention="performer", attention_features=features), seed=2
        )
        linear.flat.values[...] = exact.flat.values
        errors.append(np.abs(linear.logits(batch) - exact.logits(batch)).max() / np.abs(exact.logits(batch)).max())
    assert errors[1] < 0.05
    assert errors[1] < errors[0] / 4

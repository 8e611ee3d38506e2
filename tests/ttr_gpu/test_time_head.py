"""The time head: an exact density in the data's own unit, its floor, zero gaps, and nothing seen of what comes next."""

import math

import numpy as np
import pytest
from model_batches import packed
from test_model import config

from ttr_gpu.model import TransformerModel
from ttr_gpu.nn.gap_distribution import GapDistribution
from ttr_gpu.train.spikes import worst_sequences

GAPS = {"time_components": 5, "time_log_mean": 1.5, "time_log_std": 1.2, "time_zero_gap": 0.25}


def model_of(precision=None, seed=3, **changes):
    model = TransformerModel(config(**{**GAPS, **changes}), seed=seed, precision_name=precision)
    # Weights of a head that has learned something.
    model.time_head.weight.value *= 20
    return model


def scored(batch):
    return batch.targets >= 0


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
def test_losses_are_those_of_the_distribution(precision):
    model, batch = model_of(precision), packed([20, 3, 17], 11)
    losses = model.evaluate_batch(batch).time_losses
    distribution = model.next_gap(model.outputs(batch))
    expected = np.where(scored(batch), distribution.nll(batch.target_times - batch.times), 0.0)
    np.testing.assert_allclose(losses, expected, rtol=1e-12 if precision == "float64" else 1e-4, atol=1e-4)


def test_the_density_integrates_to_one_over_the_data_sets_own_time():
    model, batch = model_of("float64"), packed([6], 11, ignored=0.0)
    log_gaps = np.linspace(-150, 150, 100_001)
    distribution = model.next_gap(model.outputs(batch))
    for row in range(6):
        density = np.exp(-distribution[np.full(len(log_gaps), row)].nll(np.exp(log_gaps)))
        assert np.trapezoid(density * np.exp(log_gaps), log_gaps) == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize(("precision", "tolerance"), [("float64", 1e-9), ("float32", 2e-5)])
def test_another_unit_of_time_shifts_the_loss_by_its_logarithm(precision, tolerance):
    batch = packed([20, 3, 17], 11)
    batch.target_times[7] = batch.times[7]  # a gap of zero
    hours = model_of(precision)
    seconds = model_of(
        precision, time_log_mean=1.5 + math.log(3600), time_zero_gap=0.25 * 3600, time_scale=3.0 * 3600,
        time_span=500.0 * 3600,
    )  # fmt: skip
    before = hours.evaluate_batch(batch)
    batch.times, batch.target_times = 3600 * batch.times, 3600 * batch.target_times
    after = seconds.evaluate_batch(batch)
    shift = (after.time_losses - before.time_losses)[scored(batch)]
    np.testing.assert_allclose(shift, math.log(3600), rtol=tolerance)
    np.testing.assert_allclose(after.losses, before.losses, rtol=1e-5)


def test_the_next_time_does_not_move_the_prediction_of_it():
    model, batch = model_of(), packed([12, 9], 11, ignored=0.0)
    before = model.next_gap(model.outputs(batch))
    losses = model.evaluate_batch(batch).time_losses
    batch.times[8:12] += 1e3
    batch.target_times[7:] += 1e3
    after = model.next_gap(model.outputs(batch))
    for name in ("weight_logits", "means", "log_scales"):
        np.testing.assert_array_equal(getattr(before, name)[:8], getattr(after, name)[:8])
    assert not np.array_equal(before.means[8], after.means[8]), "later predictions do see it"
    assert abs(model.evaluate_batch(batch).time_losses[7] - losses[7]) > 0.1, "and the loss is of that gap"


def test_unix_times_keep_their_milliseconds():
    """Gaps of some milliseconds in 2026: in float32 a time would step by 128 s, and every gap be zero."""
    model = model_of(time_features="gap", time_bias="log", time_log_mean=-6.0, time_scale=1e-3)
    batch = packed([30, 11], 11)
    batch.times *= 1e-3
    batch.target_times *= 1e-3
    near = model.evaluate_batch(batch)
    batch.times += 1.78e9
    batch.target_times += 1.78e9
    far = model.evaluate_batch(batch)
    # float64 itself steps by 2.4e-7 s there.
    np.testing.assert_allclose(far.time_losses, near.time_losses, rtol=1e-2, atol=5e-3)
    np.testing.assert_allclose(far.losses, near.losses, rtol=1e-3)


def test_a_gap_of_zero_is_scored_as_the_rule_says():
    model, batch = model_of(), packed([12], 11, ignored=0.0)
    batch.target_times[4] = batch.times[4]
    got = model.evaluate_batch(batch).time_losses
    batch.target_times[4] = batch.times[4] + GAPS["time_zero_gap"]
    np.testing.assert_allclose(model.evaluate_batch(batch).time_losses, got, rtol=1e-5)


def test_gaps_that_are_not_scored_may_be_anything():
    model, batch = model_of(), packed([12], 11, ignored=0.0)
    batch.targets[5] = -1
    losses, gradients = [], []
    for anything in (batch.times[5] + 1.0, -1e300, np.nan):
        batch.target_times[5] = anything
        model.zero_gradients()
        loss, saved = model.loss_forward(batch)
        model.loss_backward(1.0, saved)
        losses.append(float(loss))
        gradients.append(model.flat.gradients.copy())
    assert np.isfinite(losses[0])
    assert losses[0] == losses[1] == losses[2]
    np.testing.assert_array_equal(gradients[0], gradients[2])


def test_sigma_has_a_floor():
    model, batch = model_of(time_min_sigma=0.05), packed([12], 11, ignored=0.0)
    model.time_head.bias.value[10:] = -1e3
    scales = np.exp(model.next_gap(model.outputs(batch)).log_scales)
    np.testing.assert_allclose(scales, 0.05, rtol=1e-4)
    assert np.isfinite(model.evaluate_batch(batch).time_losses).all()


def test_parts_of_the_loss_add_up_with_their_weight():
    model, batch = model_of(), packed([20, 3, 17], 11)
    _, saved = model.loss_forward(batch)
    for weight in (0.0, 1.0, 0.25):
        loss, weighted = model.loss_forward(batch, time_weight=weight)
        assert (weighted.type_loss, weighted.time_loss) == (saved.type_loss, saved.time_loss)
        assert float(loss) == pytest.approx(float(saved.type_loss) + weight * float(saved.time_loss), rel=1e-6)
        model.zero_gradients()
        model.loss_backward(1.0, weighted)
        assert (np.abs(model.time_head.weight.gradient).max() > 0) == (weight > 0)


def test_losses_are_means_over_events_not_over_sequences():
    model, batch = model_of(), packed([30, 2], 11, ignored=0.0)
    batch.target_times[30:] += 1e4
    scores = model.evaluate_batch(batch)
    _, saved = model.loss_forward(batch)
    assert float(saved.time_loss) == pytest.approx(scores.time_losses.mean(), rel=1e-5)
    assert float(saved.type_loss) == pytest.approx(scores.losses.mean(), rel=1e-5)
    per_sequence = 0.5 * (scores.time_losses[:30].mean() + scores.time_losses[30:].mean())
    assert abs(float(saved.time_loss) - per_sequence) > 0.01, "the two differ here"


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_follows_float32(precision):
    losses = []
    for name in ("float32", precision):
        model, batch = TransformerModel(config(**GAPS, precision=name), seed=3), packed([20, 3, 17], 11)
        loss, saved = model.loss_forward(batch)
        model.zero_gradients()
        model.loss_backward(1.0, saved)
        losses.append((float(loss), np.linalg.norm(model.time_head.weight.gradient)))
    np.testing.assert_allclose(losses[1], losses[0], rtol=3e-2)


def test_a_model_without_a_head_says_so():
    model = TransformerModel(config(), seed=1)
    with pytest.raises(ValueError, match=r"model\.time_components is 0"):
        model.next_gap(model.outputs(packed([4], 11)))


def test_cells_of_a_grid_have_all_the_probability():
    rng = np.random.default_rng(0)
    logits, means = rng.standard_normal((1, 4)), rng.standard_normal((1, 4))
    distribution = GapDistribution(logits, means, np.log(rng.uniform(0.01, 1.0, (1, 4))))
    step = 0.25
    gaps = np.arange(100_000) * step
    cells = distribution[np.zeros(len(gaps), int)].cell_nll(gaps, step)
    assert cells.min() >= math.log(step)
    assert np.exp(-cells).sum() * step == pytest.approx(1.0, rel=1e-6)
    # Far out, where the distribution function is 1 to the last place, cells still differ.
    narrow = GapDistribution(np.zeros((2, 1)), np.zeros((2, 1)), np.full((2, 1), math.log(0.1)))
    far = narrow.cell_nll(np.array([3.0, 1 / 3.0]), 0.001)
    np.testing.assert_allclose(far, narrow.nll(np.array([3.0, 1 / 3.0])), rtol=1e-2)
    # A fine grid's is the plain one.
    few = np.array([0.5, 1.5, 7.25])
    rows = distribution[np.zeros(3, int)]
    np.testing.assert_allclose(rows.cell_nll(few, 1e-5), rows.nll(few), atol=1e-4)


def test_a_spike_is_blamed_on_the_sequence_with_the_unlikely_gap():
    model = model_of()
    batch = packed([6, 6, 6], 11, ignored=0.0)
    batch.target_times[8] += 1e12
    batch.sequence_ids = np.array([7, 8, 9])
    assert worst_sequences(model, [batch])[0][0] == 8


def test_given_the_type_the_gap_depends_on_it_and_the_marginal_mixes_all_types():
    model, batch = model_of("float64", time_given_type=True), packed([9, 4], 11, ignored=0.0)
    outputs = model.outputs(batch)
    logits = model.next_logits(outputs)
    probabilities = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    gaps = batch.target_times - batch.times
    given = [model.next_gap(outputs, np.full(13, kind, np.int32)) for kind in range(11)]
    assert np.ptp([each.quantile(0.5)[0] for each in given]) > 0.1
    marginal = model.next_gap(outputs)
    expected = sum(probabilities[:, kind] * each.cdf(gaps) for kind, each in enumerate(given))
    np.testing.assert_allclose(marginal.cdf(gaps), expected, rtol=1e-9)
    density = sum(probabilities[:, kind] * np.exp(-each.nll(gaps)) for kind, each in enumerate(given))
    np.testing.assert_allclose(np.exp(-marginal.nll(gaps)), density, rtol=1e-9)
    # The loss is that of the type that came.
    own = np.array([given[kind].nll(gaps)[row] for row, kind in enumerate(batch.targets)])
    np.testing.assert_allclose(model.evaluate_batch(batch).time_losses, own, rtol=1e-9)


def test_the_marginal_of_many_types_is_over_the_likeliest(monkeypatch):
    model, batch = model_of("float64", time_given_type=True), packed([5], 11, ignored=0.0)
    model.head.weight.value *= 100
    outputs = model.outputs(batch)
    exact = model.next_gap(outputs)
    monkeypatch.setattr("ttr_gpu.nn.time_head.MARGINAL_TYPES", 9)
    assert model.next_gap(outputs).means.shape == (5, 9 * 5)
    np.testing.assert_allclose(model.next_gap(outputs).quantile(0.5), exact.quantile(0.5), rtol=0.02)


def test_a_head_given_the_type_does_not_see_it_in_the_types_loss():
    """The next type enters the gap's distribution alone: with another one, the likelihood of types stays."""
    model, batch = model_of(time_given_type=True), packed([9], 11, ignored=0.0)
    before = model.next_logits(model.outputs(batch))
    batch.targets[:] = (batch.targets + 1) % 11
    np.testing.assert_array_equal(model.next_logits(model.outputs(batch)), before)


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_rope_by_time_sees_differences_of_times_alone(precision):
    model = model_of(precision, rope="time", time_features="none", time_bias="none")
    batch = packed([12, 5], 11, ignored=0.0)
    before = model.evaluate_batch(batch)
    batch.times += 1.78e9
    batch.target_times += 1.78e9
    after = model.evaluate_batch(batch)
    # float64 knows times then to 2.4e-7; float32 would to 128.
    np.testing.assert_allclose(after.losses, before.losses, rtol=1e-4)
    np.testing.assert_allclose(after.time_losses, before.time_losses, rtol=1e-4)
    batch.times[3] += 0.4 * (batch.times[4] - batch.times[3])
    moved = model.evaluate_batch(batch)
    assert np.abs(moved.losses[3:12] - after.losses[3:12]).max() > 1e-4, "time is what turns"
    np.testing.assert_array_equal(moved.losses[:3], after.losses[:3])


def test_rope_by_time_of_regular_events_is_rope_by_position():
    batch = packed([12, 5], 11, ignored=0.0)
    batch.times[:] = 3.0 * np.arange(17)  # time_scale apart
    batch.target_times[:] = batch.times + 3.0
    options = {"time_features": "none", "time_bias": "none"}
    by_time, by_position = (model_of("float64", rope=rope, **options) for rope in ("time", "position"))
    np.testing.assert_allclose(
        by_time.evaluate_batch(batch).losses, by_position.evaluate_batch(batch).losses, rtol=1e-9
    )  # fmt: skip

"""How far a sequence is behind a steady pace: the feature, its gradient, and decoding that goes on with it."""

import numpy as np
import pytest
from model_batches import packed

from ttr_gpu.config import ModelConfig
from ttr_gpu.infer.event_stream import EventStream
from ttr_gpu.model import TransformerModel
from ttr_gpu.nn.continuation import Continuation
from ttr_gpu.nn.sequences import Sequences
from ttr_gpu.nn.time2vec import time_kinds


def config(**changes):
    return ModelConfig(
        vocabulary_size=11, embed_dim=16, hidden_dim=24, num_layers=2, num_heads=2, time_features_dim=6, time_pace=7.0,
        **{"time_features": "gap", "time_components": 2, **changes},
    )  # fmt: skip


def test_time_since_a_sequence_began():
    times = np.array([3.0, 4, 9, 100, 100.5, 7])
    sequences = Sequences(np.array([0, 3, 5, 5, 6], np.int32), times)
    np.testing.assert_array_equal(sequences.elapsed(), [0, 1, 6, 0, 0.5, 0])
    # The first began at 1, the second is new, the third has no new position, the fourth began at 0.
    before, first = np.array([2, 0, 4, 1]), np.array([1.0, np.nan, 5, 0])
    going_on = Continuation(sequences.cu_seqlens, times, before, first, first)
    np.testing.assert_array_equal(going_on.elapsed(), [2, 3, 8, 0, 0.5, 7])


def test_what_is_embedded_of_time():
    assert time_kinds("none", 0.0) == []
    assert time_kinds("none", 2.0) == ["pace"]
    assert time_kinds("both", 2.0) == ["absolute", "gap", "pace"]


def test_a_shift_of_all_times_changes_nothing_and_a_late_event_does():
    model, batch = TransformerModel(config(), seed=2), packed([12], 11)
    before = model.evaluate_batch(batch).losses
    batch.times[:] += 4096.0
    batch.target_times[:] += 4096.0
    np.testing.assert_allclose(model.evaluate_batch(batch).losses, before, rtol=1e-5)
    other = TransformerModel(config(time_bias="none", time_features="none", time_components=0), seed=2)
    alone = packed([12], 11, seed=4)
    still = other.evaluate_batch(alone).losses
    alone.times[6:] += 50.0
    moved = other.evaluate_batch(alone).losses
    np.testing.assert_array_equal(moved[:6], still[:6])
    assert not np.array_equal(moved[6:], still[6:])


def test_gradients_of_the_pace_features():
    model = TransformerModel(config(time_features="none"), seed=1, precision_name="float64")
    batch = packed([9, 6], 11)
    model.zero_gradients()
    _, saved = model.loss_forward(batch)
    model.loss_backward(1.0, saved)
    rng, step = np.random.default_rng(0), 1e-6
    checked = [p for p in model.parameters if ".pace." in p.name or p.name == "embedding.time.weight"]
    assert len(checked) == 3
    for p in checked:
        direction = rng.normal(size=p.value.shape)
        exact = float((p.gradient * direction).sum())
        losses = []
        for sign in (1, -2):
            p.value += sign * step * direction
            losses.append(float(model.loss_forward(batch, gradients=False)[0]))
        p.value += step * direction
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(exact, rel=1e-4, abs=1e-9), p.name


@pytest.mark.parametrize("window", [None, 4])
def test_decoding_goes_on_with_the_pace(window, tmp_path):
    model, batch = TransformerModel(config(window=window), seed=3), packed([14, 10], 11)
    whole = model.outputs(batch)
    cache = model.new_cache(2, 20)
    assert cache.fused is None
    lengths, rings = (6, 3), np.array([0, 1])
    begin = batch.cu_seqlens[:2]
    rows = np.concatenate([np.arange(b, b + n) for b, n in zip(begin, lengths, strict=True)])
    starts = np.array([0, 6, 9], np.int32)
    got = model.prefill_outputs(batch.tokens[rows], batch.times[rows], starts, cache, rings, rows=4)
    np.testing.assert_allclose(got, whole[rows[starts[1:] - 1]], rtol=0, atol=2e-5)
    for step in range(7):
        rows = begin + np.array(lengths) + step
        got = model.decode_outputs(batch.tokens[rows], batch.times[rows], cache, rings)
        np.testing.assert_allclose(got, whole[rows], rtol=0, atol=2e-5)
    cache.copy(0, np.array([1]))
    row = np.array([13])
    got = model.decode_outputs(batch.tokens[row], batch.times[row], cache, np.array([1]))
    np.testing.assert_allclose(got, whole[row], rtol=0, atol=2e-5)
    # A stream that was saved knows when it began.
    stream, other = (EventStream(model, capacity=20) for _ in range(2))
    for position in range(8):
        stream.push(int(batch.tokens[position]), float(batch.times[position]))
    stream.save(tmp_path / "stream")
    other.load(tmp_path / "stream")
    for each in (stream, other):
        each.push(int(batch.tokens[8]), float(batch.times[8]))
    np.testing.assert_array_equal(other.next().types, stream.next().types)
    logits = model.next_logits(whole[8:9]).astype(np.float64)[0]
    expected = np.exp(logits - logits.max())
    np.testing.assert_allclose(stream.next().types, expected / expected.sum(), rtol=0, atol=1e-5)

"""The kernels of linear attention on the emulator, beyond the table of cases: several tiles of features and columns,
decoding in pieces, keys whose features differ by many orders of magnitude."""

import emulator
import numpy as np
import pytest

from ttr_kernels.attention import TimeBias
from ttr_kernels.common.arrays import FLOAT64
from ttr_kernels.common.cuda.launch import use_executor
from ttr_kernels.linear_attention import (
    LinearAttentionState,
    linear_attention_backward,
    linear_attention_extend,
    linear_attention_forward,
    orthogonal_features,
)

pytestmark = pytest.mark.skipif(bool(emulator.missing()), reason=str(emulator.missing()))
YEAR = 365.25 * 86400


@pytest.fixture(params=[("plain", 0), ("check", 1)], ids=lambda p: f"{p[0]}-{p[1]}")
def on_emulator(request):
    with use_executor(emulator.EmulatorExecutor(*request.param)), emulator.poisoned_empty():
        yield


def normal(*shape):
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def bias(dtype):
    return TimeBias(np.array([0.5, 0.1], dtype), np.array([120.0, 900.0], dtype), "linear")


def event_times(length):
    return 1.7e9 + np.cumsum(np.random.default_rng(0).exponential(60.0, length))


@pytest.mark.parametrize(("dim", "count"), [(72, 80), (64, 65)])
def test_several_tiles_of_features_and_columns(dim, count, on_emulator):
    length = 70
    q, k, v, dout = normal(length, 2, dim), normal(length, 1, dim), normal(length, 1, dim), normal(length, 2, dim + 1)
    features, times = orthogonal_features(count, dim, 0), event_times(length)
    results = []
    for dtype in (np.float32, FLOAT64):
        inputs = (x.astype(dtype) for x in (q, k, v, features))
        out, saved = linear_attention_forward(
            *inputs, cu_seqlens=np.array([0, length], np.int32), times=times, time_bias=bias(dtype)
        )
        *gradients, decay = linear_attention_backward(dout[..., :dim].astype(dtype), saved)
        results.append([out, *gradients, *decay])
    for got, expected in zip(*results, strict=True):
        np.testing.assert_allclose(got, expected, atol=3e-5 * np.abs(expected).max())


@pytest.mark.parametrize("decays", [False, True])
def test_decoding_in_pieces_equals_the_forward(decays, on_emulator):
    length, dim, count = 170, 8, 24
    q, k, v = normal(length, 2, dim), normal(length, 1, dim), normal(length, 1, dim)
    # Before 1970: an empty state's time, which does not count, is later.
    times = event_times(length) - 2.5e9
    times[90:] += 10 * YEAR
    options = {"time_bias": bias(np.float32) if decays else None}
    features = orthogonal_features(count, dim, 1)
    starts = np.array([0, length], np.int32)
    whole, _ = linear_attention_forward(q, k, v, features, cu_seqlens=starts, times=times, **options)
    state, begin = LinearAttentionState.empty(3, 2, count, dim), 0
    for pieces in (1, 1, 70, 2, 1, 65, 1, 29):
        rows = slice(begin, begin + pieces)
        # Beside a sequence that gets nothing, unless each gets one.
        rings, counts = (np.array([1]), [pieces]) if pieces == 1 else (np.array([2, 1]), [0, pieces])
        out = linear_attention_extend(
            q[rows], k[rows], v[rows], features, state, rings=rings, times=times[rows], **options,
            cu_seqlens=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        )  # fmt: skip
        np.testing.assert_allclose(out, whole[rows], atol=2e-5)
        begin += pieces
    assert begin == length
    assert not state.sums[[0, 2]].any()
    assert np.isneginf(state.shift[[0, 2]]).all()


def test_steps_of_heads_as_wide_as_two_strips(on_emulator):
    length, dim, count = 3, 256, 10
    q, k, v = normal(2 * length, 2, dim), normal(2 * length, 2, dim + 1)[..., 1:], normal(2 * length, 2, dim)
    options = {"times": event_times(2 * length), "time_bias": bias(np.float32)}
    features = orthogonal_features(count, dim, 1)
    starts = np.array([0, length, 2 * length], np.int32)
    whole, _ = linear_attention_forward(q, k, v, features, cu_seqlens=starts, **options)
    state = LinearAttentionState.empty(2, 2, count, dim)
    for step in range(length):
        rows = np.array([step, length + step])
        options["times"] = event_times(2 * length)[rows]
        out = linear_attention_extend(
            q[rows], k[rows], v[rows], features, state, cu_seqlens=np.arange(3, dtype=np.int32), **options
        )
        np.testing.assert_allclose(out, whole[rows], atol=2e-5)


@pytest.mark.parametrize("size", [0.01, 8.0, 40.0, 1000.0])
def test_queries_and_keys_of_any_size_stay_finite(size, on_emulator):
    q, k, v = normal(150, 2, 8), normal(150, 2, 8), normal(150, 2, 8)
    q *= size
    # Small keys before large ones and after them; those of the last chunk are all large.
    k *= size * np.where(np.arange(150) // 40 % 2 == 1, 1.0, 0.05).astype(np.float32)[:, None, None]
    starts = np.array([0, 150], np.int32)
    features = orthogonal_features(16, 8, 0)
    out, saved = linear_attention_forward(q, k, v, features, cu_seqlens=starts)
    gradients = linear_attention_backward(np.ones_like(out), saved)[:3]
    assert all(np.isfinite(array).all() for array in (out, *gradients))
    # A mean of values.
    assert np.abs(out).max() <= np.abs(v).max() * 1.001
    state = LinearAttentionState.empty(1, 2, 16, 8)
    for row in (0, 45, 85):
        position, one = slice(row, row + 1), np.array([0, 1], np.int32)
        step = linear_attention_extend(q[position], k[position], v[position], features, state, cu_seqlens=one)
        assert np.abs(step).max() <= np.abs(v).max() * 1.001

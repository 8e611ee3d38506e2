"""Linear attention: how it approximates attention, that it decodes what it computes, features, and what is refused."""

import numpy as np
import pytest

from ttr_kernels.attention import TimeBias, attention
from ttr_kernels.linear_attention import (
    LinearAttentionState,
    linear_attention_backward,
    linear_attention_extend,
    linear_attention_forward,
    orthogonal_features,
)

YEAR = 365.25 * 86400


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def bias(rate, tau, heads=2, dtype=np.float32):
    return TimeBias(np.full(heads, rate, dtype), np.full(heads, tau, dtype), "linear")


def event_times(length, seed=0):
    return 1.7e9 + np.cumsum(np.random.default_rng(seed).exponential(60.0, length))


def mean_error(count, seeds=6, dim=16, length=60):
    """Of the output, over the exact one's size, in the mean over several draws of the features."""
    q, k, v = normal(3, 1, length, 2, dim, dtype=np.float64) * np.reshape([0.5, 0.5, 1.0], (3, 1, 1, 1, 1))
    times, decay = event_times(length)[None], bias(1.0, 600.0, dtype=np.float64)
    exact = attention(q, k, v, times=times, time_bias=decay)
    errors = []
    for seed in range(seeds):
        features = orthogonal_features(count, dim, seed, np.float64)
        out, _ = linear_attention_forward(q, k, v, features, times=times, time_bias=decay)
        errors.append(np.sqrt(((out - exact) ** 2).mean() / (exact**2).mean()))
    return float(np.mean(errors))


def test_the_error_falls_with_the_root_of_the_number_of_features():
    errors = {count: mean_error(count) for count in (16, 64, 256, 1024)}
    for count in (16, 64, 256):
        assert 1.5 < errors[count] / errors[4 * count] < 2.7, errors
    assert errors[1024] < 0.06


def test_weights_are_unbiased():
    """E φ(q)·φ(k) / M = exp(scale · q·k): numerator and denominator are unbiased, their ratio nearly."""
    q, k = 0.5 * normal(2, 8, dtype=np.float64)
    scale, total, draws = 0.5, 0.0, 400
    for seed in range(draws):
        features = orthogonal_features(64, 8, seed, np.float64)
        phi = [np.exp(np.sqrt(scale) * x @ features.T - scale * (x @ x) / 2) for x in (q, k)]
        total += phi[0] @ phi[1] / 64
    assert total / draws == pytest.approx(np.exp(scale * q @ k), rel=0.05)


def test_equal_logits_leave_the_exact_law_of_decay():
    """With keys of zero every weight is its decay, whatever the features: that part is no approximation."""
    length, rate, tau = 150, 0.7, 900.0
    zeros, v = np.zeros((1, length, 1, 4), np.float32), np.eye(length, dtype=np.float32)[None, :, None, :4]
    times = event_times(length)[None]
    features = orthogonal_features(8, 4, 0)
    out, _ = linear_attention_forward(zeros, zeros, v, features, times=times, time_bias=bias(rate, tau, 1))
    law = np.tril(np.exp(-rate * np.maximum(times[0][:, None] - times[0], 0) / tau))
    np.testing.assert_allclose(out[0, :, 0], (law / law.sum(axis=1, keepdims=True))[:, :4], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("decay", [None, bias(0.5, 120.0)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_decoding_in_pieces_of_any_size_equals_the_forward(dtype, decay):
    if decay is not None and dtype == np.float64:
        decay = bias(0.5, 120.0, dtype=dtype)
    length = 200
    q, k, v = normal(length, 2, 8, dtype=dtype), *normal(2, length, 1, 8, dtype=dtype)
    # Before 1970: an empty state's time, which does not count, is later.
    times = event_times(length) - 2.5e9
    times[90:] += 10 * YEAR
    features = orthogonal_features(24, 8, 1, dtype)
    starts = np.array([0, length], np.int32)
    whole, _ = linear_attention_forward(q, k, v, features, cu_seqlens=starts, times=times, time_bias=decay)
    state = LinearAttentionState.empty(3, 2, 24, 8, dtype)
    rng, begin = np.random.default_rng(0), 0
    while begin < length:
        count = min(int(rng.choice([1, 1, 1, 2, 40, 70])), length - begin)
        rows = slice(begin, begin + count)
        out = linear_attention_extend(
            q[rows], k[rows], v[rows], features, state, rings=np.array([1]), times=times[rows], time_bias=decay,
            cu_seqlens=np.array([0, count], np.int32),
        )  # fmt: skip
        np.testing.assert_allclose(out, whole[rows], atol=2e-5 if dtype == np.float32 else 1e-12)
        begin += count
    assert not state.sums[[0, 2]].any()


def test_a_cleared_state_knows_nothing_of_what_it_held():
    q, k, v = normal(3, 4, 2, 8)
    features, starts, decay = orthogonal_features(16, 8, 0), np.array([0, 2, 4], np.int32), bias(0.5, 120.0)
    used, fresh = (LinearAttentionState.empty(2, 2, 16, 8) for _ in range(2))
    options = {"cu_seqlens": starts, "time_bias": decay}
    linear_attention_extend(50 * q, 9 * k, v, features, used, times=np.full(4, 1e12), **options)
    used.clear(np.array([0, 1]))
    for counts in ([1, 1], [2, 2]):
        count = sum(counts)
        options["cu_seqlens"] = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        options["times"] = np.arange(5.0, 5.0 + count)
        outs = [
            linear_attention_extend(q[:count], k[:count], v[:count], features, state, **options)
            for state in (used, fresh)
        ]
        np.testing.assert_array_equal(*outs)


@pytest.mark.parametrize("size", [0.01, 1.0, 8.0, 40.0, 1000.0])
def test_queries_and_keys_of_any_size_stay_finite(size):
    q, k, v = normal(3, 1, 150, 2, 16)
    q *= size
    # Small keys before large ones and after them; those of the last chunk are all large.
    k *= size * np.where(np.arange(150) // 40 % 2 == 1, 1.0, 0.05).astype(np.float32)[None, :, None, None]
    features = orthogonal_features(32, 16, 0)
    out, saved = linear_attention_forward(q, k, v, features)
    gradients = linear_attention_backward(np.ones_like(out), saved)[:3]
    assert all(np.isfinite(array).all() for array in (out, *gradients))
    # A mean of values.
    assert np.abs(out).max() <= np.abs(v).max() * 1.001
    state = LinearAttentionState.empty(1, 2, 32, 16)
    for row in (0, 45, 85):
        own, one = (slice(None), slice(row, row + 1)), np.array([0, 1], np.int32)
        step = linear_attention_extend(*(x[own][0] for x in (q, k, v)), features, state, cu_seqlens=one)
        assert np.abs(step).max() <= np.abs(v).max() * 1.001


def test_the_future_does_not_change_the_past():
    q, k, v = normal(3, 1, 200, 2, 16)
    features = orthogonal_features(32, 16, 0)
    before, _ = linear_attention_forward(q, k, v, features)
    k[:, 128:] *= 30
    after, _ = linear_attention_forward(q, k, v, features)
    np.testing.assert_array_equal(before[:, :128], after[:, :128])


def test_features_are_orthogonal_normal_and_follow_from_their_seed():
    features = orthogonal_features(4096, 16, 5, np.float64)
    block = features[32:48] @ features[32:48].T
    np.testing.assert_allclose(block, np.diag(np.diag(block)), atol=1e-12)
    np.testing.assert_allclose(features.mean(axis=0), 0, atol=0.1)
    np.testing.assert_allclose(features.T @ features / 4096, np.eye(16), atol=0.1)
    # A fourth moment of 3: normal, not of constant length.
    assert (features**4).mean() == pytest.approx(3.0, rel=0.1)
    np.testing.assert_array_equal(orthogonal_features(100, 16, 5, np.float64), features[:100])
    assert np.abs(orthogonal_features(100, 16, 6, np.float64) - features[:100]).max() > 1
    # A checkpoint keeps the seed alone: these numbers must not change.
    np.testing.assert_allclose(features[0, :3], GOLDEN, atol=1e-9)


GOLDEN = [0.693575253010596, 2.1528406686035217, -0.07112063498795643]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": normal(8, 7)}, ValueError, r"features: got shape \(8, 7\)"),
        ({"features": normal(8, 8, dtype=np.float64)}, TypeError, "features: got dtype float64, expected float32"),
        ({"features": normal(0, 8)}, ValueError, "features: got none"),
        (
            {"time_bias": TimeBias(np.ones(2, np.float32), np.ones(2, np.float32), "log")},
            ValueError,
            "exponential",
        ),
        ({"times": None}, ValueError, "times: got None"),
        ({"k": normal(1, 5, 3, 8), "v": normal(1, 5, 3, 8)}, ValueError, "k: got 3 heads, expected a divisor of the 2"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    inputs = {
        **dict.fromkeys("qkv", normal(1, 5, 2, 8)), "features": normal(8, 8), "times": np.zeros((1, 5)),
        "time_bias": bias(1, 1),
    }  # fmt: skip
    linear_attention_forward(**inputs)
    with pytest.raises(error, match=message):
        linear_attention_forward(**{**inputs, **changes})

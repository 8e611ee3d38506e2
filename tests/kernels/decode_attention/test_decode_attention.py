"""Decoding attention beside attention over whole sequences, exact gaps, and what is refused."""

import numpy as np
import pytest

from ttr_kernels.attention import TimeBias, attention
from ttr_kernels.common.arrays import BFLOAT16, FLOAT16
from ttr_kernels.decode_attention import decode_attention
from ttr_kernels.decode_attention.cpu_pieces import KEYS

YEAR = 365.25 * 86400


def sequence(length, heads=4, kv_heads=2, dim=16, seed=0):
    rng = np.random.default_rng([seed, length])
    q = rng.standard_normal((length, heads, dim)).astype(np.float32)
    k, v = rng.standard_normal((2, length, kv_heads, dim)).astype(np.float32)
    return q, k, v, 1.7e9 + np.cumsum(rng.exponential(3600.0, length))


def ring_of(array, length, capacity):
    """A ring buffer (1, capacity, ...) after the first `length` positions of the array have been written."""
    ring = np.full((1, capacity, *array.shape[1:]), np.nan, array.dtype)
    for position in range(length):
        ring[0, position % capacity] = array[position]
    return ring


@pytest.mark.parametrize("kind", ["linear", "log", None])
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16, FLOAT16])
def test_agrees_with_windowed_attention_at_every_position(dtype, kind):
    window, length = 2 * KEYS + 5, 7 * KEYS
    q, k, v, times = sequence(length)
    q, k, v = (array.astype(dtype) for array in (q, k, v))
    bias = kind and TimeBias(np.full(4, 0.4, np.float32), np.full(4, 7200.0, np.float32), kind)
    whole = attention(q[None], k[None], v[None], window=window, times=times[None], time_bias=bias)[0]
    tolerance = {np.float32: 2e-6}.get(dtype, 2e-2 if dtype == BFLOAT16 else 2e-3)
    for position in (0, 1, KEYS - 1, KEYS, window - 1, window, window + 1, 3 * window, length - 1):
        rings = [ring_of(array, position + 1, window) for array in (k, v, times)]
        out = decode_attention(
            q[position : position + 1], *rings[:2], np.array([position + 1]), times=times[position : position + 1],
            key_times=rings[2], time_bias=bias,
        )  # fmt: skip
        difference = np.abs(out[0].astype(np.float64) - whole[position].astype(np.float64)).max()
        assert difference <= tolerance * np.abs(whole.astype(np.float64)).max(), position


@pytest.mark.parametrize("kind", ["linear", "log"])
def test_a_gap_of_years_leaves_the_newest_keys_told_apart(kind):
    # Milliseconds apart, years after the rest: the rest has no weight, and the milliseconds have not been rounded away.
    times = np.concatenate([np.arange(50.0), 30 * YEAR + np.array([0.0, 1e-3, 4e-3])])
    zeros, v = np.zeros((1, 53, 1, 4), np.float32), np.zeros((1, 53, 1, 4), np.float32)
    v[0, 50:, 0] = np.eye(4)[:3]
    rate, tau = np.full(1, 40.0, np.float32), np.full(1, 1e-3, np.float32)
    out = decode_attention(
        zeros[:, 0], zeros, v, np.array([53]), times=times[-1:], key_times=times[None],
        time_bias=TimeBias(rate, tau, kind),
    )[0, 0]  # fmt: skip
    u = (times[-1] - times[50:]) / 1e-3
    law = np.exp(-40.0 * u) if kind == "linear" else (1 + u) ** -40.0
    np.testing.assert_allclose(out[:3], law / law.sum(), rtol=1e-3, atol=1e-12)
    assert out[3] == 0


def test_a_query_long_after_its_keys_sees_them_as_if_it_were_now():
    """With a linear bias only the keys' differences matter, however late the query comes."""
    q, k, v, times = sequence(40)
    bias = TimeBias(np.full(4, 0.5, np.float32), np.full(4, 1800.0, np.float32), "linear")
    now, late = (
        decode_attention(q[-1:], k[None], v[None], np.array([40]), times=times[-1:] + later, key_times=times[None],
                         time_bias=bias)
        for later in (0.0, 1000 * YEAR)
    )  # fmt: skip
    np.testing.assert_array_equal(now, late)


def test_a_result_does_not_depend_on_the_other_sequences():
    q, k, v, times = sequence(4 * 300, heads=2)
    q, k, v, times = (array.reshape(4, 300, *array.shape[1:]) for array in (q, k, v, times))
    options = {"time_bias": TimeBias(np.ones(2, np.float32), np.full(2, 1e4, np.float32), "log")}
    lengths, rings, now = np.array([300, 7, 0, 290]), np.array([2, 0, 3, 1]), np.full(4, times.max())
    both = decode_attention(q[:, 0], k, v, lengths, rings=rings, times=now, key_times=times, **options)
    for b, ring in enumerate(rings):
        one, own = slice(b, b + 1), slice(ring, ring + 1)
        alone = decode_attention(
            q[one, 0], k[own], v[own], lengths[one], times=now[one], key_times=times[own], **options
        )  # fmt: skip
        np.testing.assert_array_equal(both[one], alone)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lengths": [3, 3]}, TypeError, "lengths: got list"),
        ({"lengths": np.array([3, 3], np.int32)}, TypeError, "lengths: got dtype int32, expected int64"),
        ({"lengths": np.array([3])}, ValueError, r"lengths: got shape \(1,\), expected \(2,\)"),
        ({"lengths": np.array([3, -1])}, ValueError, "lengths: got -1, expected at least 0"),
        ({"rings": np.array([0, 2])}, ValueError, r"rings: got 0 \.\. 2, expected 0 \.\. 1"),
        (
            {"q": np.zeros((1, 4, 8), np.float32), "lengths": np.array([3]), "times": np.zeros(1)}, ValueError,
            "rings: got None, expected the ring of each of 1 queries among 2",
        ),
        ({"q": np.zeros((2, 3, 8), np.float32)}, ValueError, "k: got 2 heads, expected a divisor of the 3 heads of q"),
        ({"window": 0}, ValueError, "window: got 0, expected at least 1"),
        ({"times": None}, ValueError, "times: got None, expected float64 timestamps"),
        ({"key_times": None}, ValueError, "key_times: got None, expected float64 timestamps"),
        ({"key_times": np.zeros((2, 6))}, ValueError, r"key_times: got shape \(2, 6\)"),
        ({"times": np.zeros(2, np.float32)}, TypeError, "times: got dtype float32, expected float64"),
    ],
)  # fmt: skip
def test_bad_input_is_named(changes, error, message):
    inputs = {
        "q": np.zeros((2, 4, 8), np.float32), "k": np.zeros((2, 5, 2, 8), np.float32),
        "v": np.zeros((2, 5, 2, 8), np.float32), "lengths": np.array([3, 5]), "times": np.zeros(2),
        "key_times": np.zeros((2, 5)), "time_bias": TimeBias(np.ones(4, np.float32), np.ones(4, np.float32), "log"),
    }  # fmt: skip
    decode_attention(**inputs)
    with pytest.raises(error, match=message):
        decode_attention(**{**inputs, **changes})

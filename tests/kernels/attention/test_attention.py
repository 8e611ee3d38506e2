"""Attention: the time bias as a law of decay, independent dense formulas, exact gaps, memory, and what is refused."""

import itertools
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from ttr_kernels.attention import Dropout, TimeBias, attention, attention_backward, attention_forward
from ttr_kernels.attention.reference import _keep
from ttr_kernels.common.arrays import BFLOAT16
from ttr_kernels.common.parallel import get_threads, set_threads

YEAR = 365.25 * 86400


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def bias(rate, tau, kind, heads=1):
    return TimeBias(np.full(heads, rate, np.float32), np.full(heads, tau, np.float32), kind)


def event_times(length, seed=0, origin=1.7e9):
    """Times in steps of 1/64, so that they and their sums with whole numbers are exact."""
    gaps = np.random.default_rng(seed).integers(1, 64 * 600, length) / 64
    return origin + np.cumsum(gaps)[None, :]


def weights_of(**options):
    """The weights themselves, (T, S), of one head whose queries and keys are orthogonal: values are unit vectors."""
    length = options.pop("length")
    zeros = np.zeros((1, length, 1, length), np.float32)
    v = np.eye(length, dtype=np.float32).reshape(1, length, 1, length)
    return attention_forward(zeros, zeros, v, **options)[0][0, :, 0, :]


def dense(q, k, v, visible, added=0.0):
    """The formula with the whole matrix, all heads at once, in float64: (out, weights)."""
    logits = np.einsum("bihd,bjhd->bhij", q.astype(np.float64), k) / np.sqrt(q.shape[-1]) + added
    logits = np.where(visible, logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bhij,bjhd->bihd", weights, v), weights


def dense_gradients(q, k, v, weights, dout):
    dp = np.einsum("bihd,bjhd->bhij", dout, v)
    ds = weights * (dp - (weights * dp).sum(axis=-1, keepdims=True)) / np.sqrt(q.shape[-1])
    return (
        np.einsum("bhij,bjhd->bihd", ds, k),
        np.einsum("bhij,bihd->bjhd", ds, q),
        np.einsum("bhij,bihd->bjhd", weights, dout),
    )


def assert_close(got, want, tolerance=3e-6):
    assert np.abs(np.asarray(got, np.float64) - want).max() <= tolerance * max(np.abs(want).max(), 1e-3)


# The law of decay.


def test_log_bias_is_omoris_power_law():
    t, rate, tau = event_times(40), 1.3, 250.0
    weights = weights_of(length=40, times=t, time_bias=bias(rate, tau, "log"))
    law = np.tril((1 + np.maximum(t[0][:, None] - t[0], 0) / tau) ** -rate)
    assert_close(weights, law / law.sum(axis=1, keepdims=True))


def test_linear_bias_is_an_exponential_kernel():
    t, rate, tau = event_times(40), 0.7, 900.0
    weights = weights_of(length=40, times=t, time_bias=bias(rate, tau, "linear"))
    law = np.tril(np.exp(-rate * np.maximum(t[0][:, None] - t[0], 0) / tau))
    assert_close(weights, law / law.sum(axis=1, keepdims=True))


def test_linear_bias_over_positions_is_alibi():
    heads, length = 8, 50
    slopes = 2.0 ** -np.arange(1, heads + 1)
    q, k, v = (normal(1, length, heads, 16, seed=s) for s in range(3))
    positions = np.arange(length, dtype=np.float64)
    time_bias = TimeBias(slopes.astype(np.float32), np.ones(heads, np.float32), "linear")
    out = attention(q, k, v, times=positions[None], time_bias=time_bias)
    distance = positions[:, None] - positions
    want, _ = dense(q, k, v, distance >= 0, -slopes[:, None, None] * distance)
    assert_close(out, want)


def test_rate_zero_is_no_bias():
    q, k, v = (normal(2, 30, 2, 8, seed=s) for s in range(3))
    t = np.repeat(event_times(30), 2, axis=0)
    plain, _ = attention_forward(q, k, v)
    for kind in ("linear", "log"):
        out, saved = attention_forward(q, k, v, times=t, time_bias=bias(0.0, 60.0, kind, 2))
        np.testing.assert_array_equal(out, plain)
        *_, gradient = attention_backward(normal(*q.shape), saved)
        np.testing.assert_array_equal(gradient.tau, 0)
        assert np.abs(gradient.rate).max() > 0


# Time.


def run(q, k, v, dout, **options):
    out, saved = attention_forward(q, k, v, **options)
    dq, dk, dv, gradient = attention_backward(dout, saved)
    results = {"out": out, "dq": dq, "dk": dk, "dv": dv}
    return results if gradient is None else results | {"drate": gradient.rate, "dtau": gradient.tau}


def against_reference(time_bias, times, key_times=None, tolerance=1e-5, length=40, **options):
    q, k, v, dout = (normal(1, length, 2, 8, seed=s) for s in range(4))
    got = run(q, k, v, dout, times=times, key_times=key_times, time_bias=time_bias, **options)
    exact_bias = TimeBias(time_bias.rate.astype(np.float64), time_bias.tau.astype(np.float64), time_bias.kind)
    exact_inputs = (a.astype(np.float64) for a in (q, k, v, dout))
    want = run(*exact_inputs, times=times, key_times=key_times, time_bias=exact_bias, **options)
    for name, result in got.items():
        assert np.isfinite(result).all(), name
        # dtau scales as 1 / tau, drate as the gaps in units of tau.
        scale = {"dtau": 1 / time_bias.tau.min(), "drate": np.abs(want["drate"]).max() + 1}.get(name, 1.0)
        assert np.abs(result - want[name]).max() <= tolerance * scale, name


@pytest.mark.parametrize("kind", ["linear", "log"])
def test_only_gaps_matter_however_large_the_times(kind):
    q, k, v, dout = (normal(1, 60, 2, 8, seed=s) for s in range(4))
    t = event_times(60, origin=0.0)
    results = [
        run(q, k, v, dout, times=t + shift, time_bias=bias(0.8, 30.0, kind, 2)) for shift in (0.0, 1.7e9, -(2.0**40))
    ]
    for shifted in results[1:]:
        for name, result in shifted.items():
            np.testing.assert_array_equal(result, results[0][name], err_msg=name)


@pytest.mark.parametrize("kind", ["linear", "log"])
@pytest.mark.parametrize(
    ("rate", "tau"), [(1.0, 1e-6), (1.0, 1e12), (0.0, 1e-6), (0.0, 1e12), (100.0, 1e-6), (1e-6, 1e-6), (50.0, 3600.0)]
)
def test_extreme_rates_and_time_scales_over_years(rate, tau, kind):
    t = 1.7e9 + np.sort(np.random.default_rng(1).uniform(0, 30 * YEAR, (1, 40)))
    against_reference(bias(rate, tau, kind, 2), t)


def test_many_events_at_one_moment():
    for kind in ("linear", "log"):
        against_reference(bias(1.0, 1e-6, kind, 2), np.full((1, 40), 1.7e9))


@pytest.mark.parametrize("kind", ["linear", "log"])
@pytest.mark.parametrize("tau", [1e-6, 1.0, 3600.0, 1e12])
def test_queries_years_after_all_keys(tau, kind):
    # No query sees a key of its own time, so the largest logit itself is far below zero.
    t = event_times(40)
    time_bias = bias(1.0, tau, kind, 2)
    q, k, v, dout = (normal(1, 40, 2, 8, seed=s) for s in range(4))
    got = run(q, k, v, dout, times=t + 5 * YEAR, key_times=t, time_bias=time_bias)
    exact_bias = TimeBias(time_bias.rate.astype(np.float64), time_bias.tau.astype(np.float64), kind)
    exact_inputs = (a.astype(np.float64) for a in (q, k, v, dout))
    want = run(*exact_inputs, times=t + 5 * YEAR, key_times=t, time_bias=exact_bias)
    for name in ("out", "dq", "dk", "dv"):
        assert_close(got[name], want[name], 2e-5)
    assert np.isfinite(got["drate"]).all()
    assert np.isfinite(got["dtau"]).all()


# Visibility.


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 5, 64, 500])
@pytest.mark.parametrize(("length", "keys"), [(100, 100), (70, 150), (3, 140)])
def test_causal_and_window_are_masks(length, keys, window, causal):
    q, dout = normal(2, length, 2, 8, seed=1), normal(2, length, 2, 8, seed=4)
    k, v = normal(2, keys, 2, 8, seed=2), normal(2, keys, 2, 8, seed=3)
    i, j = np.arange(length)[:, None] + keys - length, np.arange(keys)
    visible = np.ones((length, keys), bool)
    if causal:
        visible &= j <= i
    if window is not None:
        visible &= i - j < window
    want, weights = dense(q, k, v, visible)
    got = run(q, k, v, dout, causal=causal, window=window)
    for result, expected in zip(got.values(), (want, *dense_gradients(q, k, v, weights, dout)), strict=True):
        assert_close(result, expected, 5e-6)


def test_future_keys_change_nothing_to_the_bit():
    q, k, v = (normal(1, 200, 2, 8, seed=s) for s in range(3))
    before = attention(q, k, v)[:, :77]
    k[:, 77:], v[:, 77:] = np.nan, 1e30
    np.testing.assert_array_equal(attention(q, k, v)[:, :77], before)


@pytest.mark.parametrize("kind", [None, "linear", "log"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_query_that_sees_no_key_gets_zeros_not_nan(kind, dropout):
    # With 6 queries and 4 keys, the first two see nothing.
    q, dout = normal(2, 6, 2, 8, seed=1), normal(2, 6, 2, 8, seed=4)
    k, v = normal(2, 4, 2, 8, seed=2), normal(2, 4, 2, 8, seed=3)
    options = {"dropout": dropout, "seed": 1}
    if kind:
        t = np.repeat(event_times(6), 2, axis=0)
        options |= {"times": t, "key_times": t[:, 2:].copy(), "time_bias": bias(1.0, 60.0, kind, 2)}
    got = run(q, k, v, dout, **options)
    assert (got["out"][:, :2] == 0).all()
    assert (got["dq"][:, :2] == 0).all()
    # The others see what they would see alone.
    options |= {"times": t[:, 2:].copy()} if kind else {}
    if dropout == 0.0:
        alone = run(q[:, 2:], k, v, dout[:, 2:], **options)
        for name in ("out", "dq", "dk", "dv"):
            assert_close(got[name][:, 2:] if name in ("out", "dq") else got[name], alone[name])
    assert all(np.isfinite(result).all() for result in got.values())


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)])
def test_nothing_to_attend(shape):
    batch, length, keys = shape
    q = normal(batch, length, 2, 8)
    k, v = normal(batch, keys, 2, 8, seed=1), normal(batch, keys, 2, 8, seed=2)
    for options in ({}, {"causal": False}):
        got = run(q, k, v, np.ones_like(q), **options)
        assert all((result == 0).all() for result in got.values())


# Layouts that are the same mathematics.


def test_packed_is_each_sequence_alone():
    lengths = [5, 0, 131, 1, 70]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    q, k, v, dout = (normal(sum(lengths), heads, 16, seed=s) for s, heads in enumerate((4, 2, 2, 4)))
    t = np.concatenate([event_times(n, seed=n)[0] for n in lengths])
    options = {"time_bias": bias(0.5, 100.0, "log", 4), "window": 60}
    packed = run(q, k, v, dout, times=t, cu_seqlens=offsets, **options)
    rate = np.zeros(4)
    for begin, end in itertools.pairwise(offsets):
        part = slice(begin, end)
        alone = run(*(a[None, part] for a in (q, k, v, dout)), times=t[None, part], **options)
        rate += alone["drate"]
        for name in ("out", "dq", "dk", "dv"):
            np.testing.assert_allclose(packed[name][part], alone[name][0], rtol=1e-5, atol=2e-6, err_msg=name)
    np.testing.assert_allclose(packed["drate"], rate, rtol=1e-4)


def test_batches_are_independent_to_the_bit():
    q, k, v = (normal(3, 90, 2, 16, seed=s) for s in range(3))
    whole = attention(q, k, v)
    for b in range(3):
        np.testing.assert_array_equal(attention(q[b : b + 1], k[b : b + 1], v[b : b + 1]), whole[b : b + 1])


def test_grouped_heads_are_repeated_heads():
    q, dout = normal(1, 80, 6, 16, seed=0), normal(1, 80, 6, 16, seed=3)
    k, v = normal(1, 80, 2, 16, seed=1), normal(1, 80, 2, 16, seed=2)
    grouped = run(q, k, v, dout)
    repeated = run(q, np.repeat(k, 3, axis=2), np.repeat(v, 3, axis=2), dout)
    np.testing.assert_allclose(grouped["out"], repeated["out"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(grouped["dq"], repeated["dq"], rtol=1e-5, atol=1e-6)
    for name in ("dk", "dv"):
        summed = repeated[name].reshape(1, 80, 2, 3, 16).sum(axis=3)
        np.testing.assert_allclose(grouped[name], summed, rtol=1e-4, atol=1e-5, err_msg=name)


def test_slices_of_a_fused_array_need_no_copy():
    fused = normal(1, 60, 6, 16)
    q, k, v = fused[:, :, :2], fused[:, :, 2:4], fused[:, :, 4:]
    dfused = np.full_like(fused, np.nan)
    parts = {"dq": dfused[:, :, :2], "dk": dfused[:, :, 2:4], "dv": dfused[:, :, 4:]}
    dout = normal(1, 60, 2, 16, seed=1)
    out, saved = attention_forward(q, k, v)
    attention_backward(dout, saved, **parts)
    want = run(*(np.ascontiguousarray(a) for a in (q, k, v)), dout)
    np.testing.assert_array_equal(out, want["out"])
    for name, part in parts.items():
        np.testing.assert_array_equal(part, want[name], err_msg=name)


def test_a_scale_of_ones_own():
    q, k, v = (normal(1, 30, 1, 16, seed=s) for s in range(3))
    np.testing.assert_allclose(attention(q, k, v, scale=0.5), attention(2 * q, k, v, scale=0.25), rtol=1e-6)
    np.testing.assert_array_equal(attention(q, k, v), attention(q, k, v, scale=0.25))


def test_logits_of_thousands():
    q, k, v = 100 * normal(1, 40, 1, 16), 100 * normal(1, 40, 1, 16, seed=1), normal(1, 40, 1, 16, seed=2)
    got = run(q, k, v, normal(1, 40, 1, 16, seed=3))
    want, _ = dense(q, k, v, np.tri(40, dtype=bool))
    assert_close(got["out"], want, 1e-3)
    assert all(np.isfinite(result).all() for result in got.values())


def test_nan_is_not_hidden():
    q, k, v = (normal(1, 40, 1, 16, seed=s) for s in range(3))
    k[0, 20, 0, 3] = np.nan
    out = attention(q, k, v)
    assert np.isfinite(out[0, :20]).all()
    assert np.isnan(out[0, 20:]).all()


# Dropout.


@pytest.mark.parametrize("length", [5, 64, 200])
def test_dropout_mask_is_the_same_everywhere(length):
    rate, seed, offset = 0.3, 2**40 + 7, 2**33 + 3
    zeros = np.zeros((2, length, 2, length), np.float32)
    unit = np.broadcast_to(np.eye(length, dtype=np.float32)[None, :, None, :], zeros.shape).copy()
    seen = np.tri(length)
    plain = seen / seen.sum(axis=1, keepdims=True)
    out, saved = attention_forward(zeros, zeros, unit, dropout=rate, seed=seed, offset=offset)
    _, _, dv, _ = attention_backward(unit, saved)
    for sequence in range(2):
        rows = slice(sequence * length, (sequence + 1) * length)
        for head in range(2):
            keep = _keep(rows, slice(0, length), head, 2, Dropout(rate, seed, offset))
            np.testing.assert_allclose(out[sequence, :, head], plain * keep, rtol=1e-6)
            # dv_j = Σ_i (P keep)_ij dout_i, and dout is the unit matrix.
            np.testing.assert_allclose(dv[sequence, :, head], (plain * keep).T, rtol=1e-6)


def test_sequences_computed_apart_have_the_mask_of_the_batch():
    options = {"dropout": 0.3, "seed": 3, "offset": 4}
    rows = normal(70, 3, 16), normal(70, 3, 16, seed=1), normal(70, 3, 16, seed=2)
    cu_seqlens = np.array([0, 9, 41, 70], np.int32)
    out, saved = attention_forward(*rows, cu_seqlens=cu_seqlens, **options)
    gradients = attention_backward(rows[0], saved)
    part = slice(9, 70)
    own, saved = attention_forward(*(r[part] for r in rows), cu_seqlens=cu_seqlens[1:] - 9, first_row=9, **options)
    np.testing.assert_array_equal(own, out[part])
    for got, whole in zip(attention_backward(rows[0][part], saved)[:3], gradients[:3], strict=True):
        np.testing.assert_array_equal(got, whole[part])
    other, _ = attention_forward(*(r[part] for r in rows), cu_seqlens=cu_seqlens[1:] - 9, first_row=10, **options)
    assert (other != own).any()
    with pytest.raises(ValueError, match="first_row: got -1, expected the number of a row, from 0"):
        attention_forward(*rows, first_row=-1, cu_seqlens=cu_seqlens)


def test_dropout_of_weights_is_fair_and_independent():
    def mask(**options):
        return weights_of(length=256, causal=False, **options) > 0

    one = mask(dropout=0.25, seed=1)
    assert abs(one.mean() - 0.75) < 5 * np.sqrt(0.25 * 0.75 / one.size)
    np.testing.assert_array_equal(mask(dropout=0.25, seed=1), one)
    for other in (mask(dropout=0.25, seed=2), mask(dropout=0.25, seed=1, offset=1), one.T, np.roll(one, 1, axis=0)):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 5 / 256


# Resources.


def test_memory_grows_with_the_length_alone():
    # The T×S matrix would take 256 MiB. Peak memory of a process, since compiled code allocates past Python's books.
    script = """
        import resource
        import numpy as np
        from ttr_kernels.attention import TimeBias, attention_backward, attention_forward
        one = np.ones(1, np.float32)
        def run(length):
            q = np.ones((1, length, 1, 16), np.float32)
            t = np.arange(length, dtype=np.float64)[None]
            out, saved = attention_forward(q, q, q, times=t, time_bias=TimeBias(one, 100 * one, "log"), dropout=0.1)
            attention_backward(out, saved)
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = run(256)
        print(run(8192) - before)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True, timeout=300
    )
    assert int(result.stdout) < 64 * 1024


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_the_same_bits_on_any_number_of_threads(dtype):
    lengths = np.array([300, 1, 90, 0, 250])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    total = int(offsets[-1])
    q, dout = (normal(total, 4, 16, seed=s).astype(dtype) for s in (0, 1))
    k, v = (normal(total, 2, 16, seed=s).astype(dtype) for s in (2, 3))
    t = np.concatenate([event_times(n, seed=n)[0] for n in lengths])
    options = {"times": t, "cu_seqlens": offsets, "time_bias": bias(0.5, 60.0, "log", 4), "dropout": 0.2, "seed": 3}
    before, results = get_threads(), []
    try:
        for threads in (1, 2, 5):
            set_threads(threads)
            results.append(run(q, k, v, dout, **options))
    finally:
        set_threads(before)
    for other in results[1:]:
        for name, result in other.items():
            np.testing.assert_array_equal(result, results[0][name], err_msg=name)


# Contract.


def test_gradients_of_the_bias_accumulate():
    q, k, v, dout = (normal(1, 30, 2, 8, seed=s) for s in range(4))
    _, saved = attention_forward(q, k, v, times=event_times(30), time_bias=bias(0.5, 60.0, "log", 2))
    *_, once = attention_backward(dout, saved)
    drate, dtau = once.rate.copy(), once.tau.copy()
    *_, twice = attention_backward(dout, saved, drate=drate, dtau=dtau)
    assert twice.rate is drate
    assert twice.tau is dtau
    np.testing.assert_allclose(drate, 2 * once.rate, rtol=1e-6)
    np.testing.assert_allclose(dtau, 2 * once.tau, rtol=1e-6)


PACKED = (12, 2, 8)
BATCHED = (2, 6, 2, 8)


def offsets(*values, dtype=np.int32):
    return np.array(values, dtype)


@pytest.mark.parametrize(
    ("shape", "options", "error", "message"),
    [
        (PACKED, {"cu_seqlens": offsets()}, ValueError, "cu_seqlens: got nothing, expected to run from 0 to .* 12"),
        (PACKED, {"cu_seqlens": offsets(1, 12)}, ValueError, r"cu_seqlens: got 1 .. 12, expected to run from 0"),
        (PACKED, {"cu_seqlens": offsets(0, 13)}, ValueError, r"cu_seqlens: got 0 .. 13, .* to the total of 12"),
        (PACKED, {"cu_seqlens": offsets(0, 9, 7, 12)}, ValueError, "cu_seqlens: got a decrease at index 2"),
        (PACKED, {"cu_seqlens": offsets(0, 12, dtype=np.int64)}, TypeError, "cu_seqlens: got dtype int64, .* int32"),
        (PACKED, {}, ValueError, r"q: got shape \(12, 2, 8\), expected \(B, T, H, D\)"),
        (BATCHED, {"window": 0}, ValueError, "window: got 0, expected at least 1"),
        (BATCHED, {"window": -3}, ValueError, "window: got -3, expected at least 1"),
        (BATCHED, {"dropout": 1.0}, ValueError, r"dropout: got 1.0, expected a probability in \[0, 1\)"),
        (BATCHED, {"time_bias": "log"}, ValueError, "times: got None, expected float64 timestamps, since a time_bias"),
        (BATCHED, {"times": np.zeros((2, 6), np.float32)}, TypeError, "times: got dtype float32, expected float64"),
        (BATCHED, {"times": np.zeros((2, 6), np.int64)}, TypeError, "times: got dtype int64, expected float64"),
        (
            BATCHED,
            {"times": np.zeros((2, 5))},
            ValueError,
            r"times: got shape \(2, 5\), expected \(B, T\) with B=2, T=6",
        ),
        (BATCHED, {"times": np.zeros((2, 6)), "time_bias": "log", "causal": False}, ValueError, "causal: got False"),
        (BATCHED, {"times": np.zeros((2, 6)), "time_bias": "cubic"}, ValueError, "time_bias.kind: got 'cubic'"),
        (
            BATCHED,
            {"times": np.zeros((2, 6)), "time_bias": bias(1.0, 1.0, "log", 3)},
            ValueError,
            r"time_bias.rate: got shape \(3,\), expected \(2,\), one per query head",
        ),
        (
            BATCHED,
            {"times": np.zeros((2, 6)), "time_bias": bias(1.0, 0.0, "log", 2)},
            ValueError,
            "time_bias.tau: got 0.0, expected positive time scales",
        ),
        (
            BATCHED,
            {"times": np.zeros((2, 6)), "time_bias": bias(1.0, np.nan, "log", 2)},
            ValueError,
            "time_bias.tau: got nan, expected positive",
        ),
        (
            BATCHED,
            {"times": np.zeros((2, 6)), "time_bias": TimeBias(np.ones(2), np.ones(2), "log")},
            TypeError,
            "time_bias.rate: got dtype float64, expected float32",
        ),
    ],
)
def test_bad_input_is_named(shape, options, error, message):
    x = np.ones(shape, np.float32)
    if isinstance(options.get("time_bias"), str):
        options = options | {"time_bias": bias(1.0, 1.0, options["time_bias"], 2)}
    with pytest.raises(error, match=message):
        attention_forward(x, x, x, **options)


def test_bad_heads_and_lengths_are_named():
    x = np.ones((2, 6, 4, 8), np.float32)
    with pytest.raises(ValueError, match="k: got 3 heads, expected a divisor of the 4 heads of q"):
        attention(x, x[:, :, :3], x[:, :, :3])
    with pytest.raises(ValueError, match=r"v: got shape \(2, 5, 4, 8\), expected .* with B=2, S=6, H_kv=4"):
        attention(x, x, x[:, :5])
    with pytest.raises(TypeError, match="k: got dtype bfloat16, expected float32 like q"):
        attention(x, x.astype(BFLOAT16), x)
    with pytest.raises(ValueError, match=r"key_times: got None, expected \(B, S\): S=6 differs from T=4"):
        attention(x[:, :4], x, x, times=np.zeros((2, 4)), time_bias=bias(1.0, 1.0, "log", 4))
    out, saved = attention_forward(x, x, x)
    with pytest.raises(ValueError, match=r"dout: got shape \(2, 5, 4, 8\), expected \(2, 6, 4, 8\) like out"):
        attention_backward(out[:, :5], saved)
    with pytest.raises(TypeError, match="dout: got dtype bfloat16, expected float32 like q"):
        attention_backward(out.astype(BFLOAT16), saved)

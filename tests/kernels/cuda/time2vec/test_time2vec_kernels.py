"""The Time2Vec kernels on the emulator, beyond the table of cases: UNIX times, widths of several blocks, rows that
begin anywhere, sums over several blocks of rows whose terms cancel."""

import emulator
import numpy as np
import operation_checks as checks
import pytest

from ttr_kernels.common.arrays import BFLOAT16
from ttr_kernels.common.cuda.launch import use_executor
from ttr_kernels.time2vec import time2vec_backward, time2vec_forward

pytestmark = pytest.mark.skipif(bool(emulator.missing()), reason=str(emulator.missing()))

# A wave of a second, a minute, a day, and one radian per two seconds; in front the linear feature.
FREQUENCY = np.array([1e-9, 2 * np.pi, 2 * np.pi / 60, 2 * np.pi / 86400, 0.5], np.float32)
PHASE = np.array([0.25, 0.1, -0.7, 2.0, 0.0], np.float32)
MILLISECONDS = 1.7e9 + np.arange(50) * 1e-3


@pytest.fixture(params=[("plain", 0), ("check", 1)], ids=lambda p: f"{p[0]}-{p[1]}")
def on_emulator(request):
    with use_executor(emulator.EmulatorExecutor(*request.param)), emulator.poisoned_empty():
        yield


def exact(times, frequency, phase):
    return time2vec_forward(times, frequency.astype(np.float64), phase.astype(np.float64))


def off_by_one(array):
    """The same array, begun one element behind a multiple of 16 bytes, between NaN."""
    store = np.full(array.size + 16, np.nan, array.dtype)
    start = (-store.ctypes.data % 16) // array.itemsize + 1
    view = store[start : start + array.size].reshape(array.shape)
    view[...] = array
    return view


def test_milliseconds_of_unix_times(on_emulator):
    features, _ = time2vec_forward(MILLISECONDS, FREQUENCY, PHASE)
    # numpy reduces the same float64 phases: up to 1.1e10, of which float64 resolves 2e-6.
    np.testing.assert_allclose(features[:, 1:], exact(MILLISECONDS, FREQUENCY, PHASE)[0][:, 1:], rtol=0, atol=4e-6)
    np.testing.assert_allclose(features[:, 0], MILLISECONDS * float(FREQUENCY[0]) + 0.25, rtol=1e-7)
    # A millisecond turns the wave of a second by a thousandth; in float32 all rows would be equal.
    angles = np.unwrap(np.arcsin(features[:20, 1].astype(np.float64)))
    np.testing.assert_allclose(np.abs(np.diff(angles)), 2 * np.pi / 1000, rtol=0.02)


def test_every_quarter_and_sign(on_emulator):
    times = np.linspace(-20, 20, 401)
    frequency, phase = np.ones(2, np.float32), np.zeros(2, np.float32)
    features, saved = time2vec_forward(times, frequency, phase)
    np.testing.assert_allclose(features[:, 1], np.sin(times), rtol=0, atol=2.0**-23)
    for row in (0, 57, 123, 200, 311, 400):
        dy = np.zeros((401, 2), np.float32)
        dy[row] = 1
        dfrequency, dphase = time2vec_backward(dy, saved)
        np.testing.assert_allclose(dphase, [1, np.cos(times[row])], rtol=0, atol=2.0**-22)
        np.testing.assert_allclose(dfrequency, [times[row], np.cos(times[row]) * times[row]], rtol=1e-6, atol=1e-5)


def test_the_largest_phases(on_emulator):
    times = np.array([-0.99e12, -3e11, 7e10, 0.99e12])
    frequency, phase = np.ones(3, np.float32), np.array([0, 1, 2], np.float32)
    features, _ = time2vec_forward(times, frequency, phase)
    np.testing.assert_allclose(features[:, 1:], exact(times, frequency, phase)[0][:, 1:], rtol=0, atol=2.5e-4)


@pytest.mark.parametrize("dtype", list(checks.DTYPES))
@pytest.mark.parametrize("shape", [(70, 32), (3, 264), (5, 67), (300, 4)])
@pytest.mark.parametrize("place", [np.asarray, off_by_one])
def test_sizes_and_alignments(place, shape, dtype, on_emulator):
    dtype = checks.DTYPES[dtype]
    rng = np.random.default_rng(3)
    times = np.cumsum(rng.exponential(0.1, shape[0]))
    frequency, phase = (place(rng.uniform(0.1, 2, shape[1]).astype(np.float32)) for _ in range(2))
    out, dy = (place(rng.standard_normal(shape).astype(dtype)) for _ in range(2))
    features, saved = time2vec_forward(times, frequency, phase, dtype=dtype, out=out)
    want, saved_exact = exact(times, frequency, phase)
    checks.assert_close("features", features, want, checks.ERROR[dtype])
    got = time2vec_backward(dy, saved)
    for name, have, wanted in zip(
        ("dfrequency", "dphase"), got, time2vec_backward(dy.astype(np.float64), saved_exact), strict=True
    ):
        checks.assert_close(name, have, wanted, 4 * checks.ERROR[np.dtype(np.float32)])
    for again, have in zip(time2vec_backward(dy, saved), got, strict=True):
        np.testing.assert_array_equal(again, have)


def test_parts_of_a_wider_matrix(on_emulator):
    rng = np.random.default_rng(4)
    both = np.full((33, 64), np.nan, BFLOAT16)
    times, frequency, phase = np.arange(33.0), *rng.uniform(0, 1, (2, 32)).astype(np.float32)
    time2vec_forward(times, frequency, phase, dtype=BFLOAT16, out=both[:, 32:])
    assert np.isnan(both[:, :32].astype(np.float32)).all()
    dy = rng.standard_normal((33, 64)).astype(BFLOAT16)
    _, saved = time2vec_forward(times, frequency, phase)
    for strided, packed in zip(
        time2vec_backward(dy[:, 32:], saved), time2vec_backward(dy[:, 32:].copy(), saved), strict=True
    ):
        np.testing.assert_array_equal(strided, packed)


def test_gradients_of_the_linear_feature_do_not_lose_the_gaps(on_emulator):
    times = 1.7e9 + np.arange(1000) / 8
    dy = np.where(np.arange(1000) % 2, 1.0, -1.0).astype(np.float32)[:, None]
    _, saved = time2vec_forward(times, FREQUENCY[:1], np.zeros(1, np.float32))
    dfrequency, dphase = time2vec_backward(dy, saved)
    # Σ ± t over pairs of neighbours: 500 gaps of 1/8.
    assert dfrequency[0] == 62.5
    assert dphase[0] == 0


def test_gradients_are_added_to_strided_ones(on_emulator):
    times, dy = MILLISECONDS - 1.7e9, np.ones((50, 5), np.float32)
    _, saved = time2vec_forward(times, FREQUENCY, PHASE)
    once = time2vec_backward(dy, saved)
    given = np.full((2, 5, 3), 3.0, np.float32)
    time2vec_backward(dy, saved, dfrequency=given[0, :, 1], dphase=given[1, :, 1])
    np.testing.assert_allclose(given[:, :, 1], np.stack(once) + 3, rtol=1e-6)
    assert (given[:, :, [0, 2]] == 3).all()


def test_gradients_of_float64_and_times_that_are_strided(on_emulator):
    times = np.repeat(MILLISECONDS, 2)[::2]
    dy = np.random.default_rng(5).standard_normal((50, 5)).astype(np.float32)
    _, saved = time2vec_forward(times, FREQUENCY, PHASE)
    for wide, narrow in zip(
        time2vec_backward(dy.astype(np.float64), saved),
        time2vec_backward(dy, time2vec_forward(MILLISECONDS, FREQUENCY, PHASE)[1]),
        strict=True,
    ):
        np.testing.assert_array_equal(wide, narrow)


def test_nan_stays_nan(on_emulator):
    features, _ = time2vec_forward(np.array([np.nan, 1.0]), FREQUENCY, PHASE)
    assert np.isnan(features[0]).all()
    assert np.isfinite(features[1]).all()

"""The log-normal mixture kernels on the emulator, beyond the table of cases: numbers of components on both sides of
what a warp takes at once, rows that begin anywhere, strided results, results in place of inputs, extreme mixtures."""

import emulator
import numpy as np
import operation_checks as checks
import pytest

from ttr_kernels.common.cuda.launch import use_executor
from ttr_kernels.log_normal_mixture import log_normal_mixture_backward, log_normal_mixture_forward

pytestmark = pytest.mark.skipif(bool(emulator.missing()), reason=str(emulator.missing()))

NAMES = "dweight_logits", "dmeans", "dlog_scales"


@pytest.fixture(params=[("plain", 0), ("check", 1)], ids=lambda p: f"{p[0]}-{p[1]}")
def on_emulator(request):
    with use_executor(emulator.EmulatorExecutor(*request.param)), emulator.poisoned_empty():
        yield


def mixture(rows, components, dtype):
    rng = np.random.default_rng(rows + components)
    gaps = np.exp(rng.standard_normal(rows))
    scales = np.array([1.0, 1.0, 0.3])[:, None, None]
    parameters = (scales * rng.standard_normal((3, rows, components))).astype(dtype)
    return gaps, parameters, rng.standard_normal(rows).astype(np.float32)


def off_by_one(array):
    """The same rows, begun one element behind a multiple of 16 bytes, with a gap of NaN after each."""
    width = array.shape[1] + 3
    store = np.full(len(array) * width + 16, np.nan, array.dtype)
    start = (-store.ctypes.data % 16) // array.itemsize + 1
    view = store[start : start + len(array) * width].reshape(len(array), width)[:, : array.shape[1]]
    view[...] = array
    return view


@pytest.mark.parametrize("dtype", list(checks.DTYPES))
@pytest.mark.parametrize("components", [2, 8, 24, 64, 100, 129, 520])
@pytest.mark.parametrize("place", [np.asarray, off_by_one])
def test_sizes_and_alignments(place, components, dtype, on_emulator):
    dtype = checks.DTYPES[dtype]
    gaps, parameters, dnll = mixture(19, components, dtype)
    inputs = [place(p) for p in parameters]
    results = {name: place(np.full_like(p, np.nan)) for name, p in zip(NAMES, parameters, strict=True)}
    nll, saved = log_normal_mixture_forward(gaps, *inputs)
    got = log_normal_mixture_backward(dnll, saved, **results)
    want_nll, want_saved = log_normal_mixture_forward(gaps, *parameters.astype(np.float64))
    want = log_normal_mixture_backward(dnll.astype(np.float64), want_saved)
    checks.assert_close("nll", nll, want_nll, 2 * checks.ERROR[np.dtype(np.float32)])
    again = log_normal_mixture_backward(dnll, saved)
    for name, have, wanted, second in zip(NAMES, got, want, again, strict=True):
        assert have is results[name]
        checks.assert_close(name, have, wanted, 2 * checks.ERROR[dtype])
        if place is np.asarray:
            np.testing.assert_array_equal(second, have)


def test_strided_likelihoods_and_their_gradients(on_emulator):
    gaps, parameters, dnll = mixture(40, 5, np.float32)
    nll, saved = log_normal_mixture_forward(gaps, *parameters)
    want = log_normal_mixture_backward(dnll, saved)
    out = np.full((40, 2), 7.0, np.float32)
    _, saved = log_normal_mixture_forward(np.repeat(gaps, 2)[::2], *parameters, out=out[:, 1])
    np.testing.assert_array_equal(out[:, 1], nll)
    assert (out[:, 0] == 7).all()
    for have, wanted in zip(log_normal_mixture_backward(np.repeat(dnll, 2)[::2], saved), want, strict=True):
        np.testing.assert_array_equal(have, wanted)


@pytest.mark.parametrize("components", [7, 200])
def test_gradients_may_overwrite_parameters(components, on_emulator):
    gaps, parameters, dnll = mixture(21, components, np.float32)
    _, saved = log_normal_mixture_forward(gaps, *parameters)
    want = log_normal_mixture_backward(dnll, saved)
    got = log_normal_mixture_backward(dnll, saved, **dict(zip(NAMES, parameters, strict=True)))
    for have, wanted in zip(got, want, strict=True):
        np.testing.assert_array_equal(have, wanted)


def test_extreme_mixtures(on_emulator):
    """Gaps far from every component, weights of zero, scales from e⁻²⁰ to e²⁰, gaps of 1e-300 and 1e300."""
    gaps = np.array([1e-300, 1e300, 1.0, np.exp(3.0), 1e-12])
    logits = np.array([[0, 0, 0], [100, -100, 0], [0, -np.inf, 80], [0, 0, 0], [-300, -200, -250]], np.float32)
    means = np.array([[0, 1, -1], [5, 5, 5], [0, 0, 0], [3, 3, 3], [-30, 0, 30]], np.float32)
    log_scales = np.array([[0, 1, 2], [0, 0, 0], [-20, 0, 20], [-20, 0, 20], [0, 0, 0]], np.float32)
    arrays = logits, means, log_scales
    nll, saved = log_normal_mixture_forward(gaps, *arrays)
    exact, saved_exact = log_normal_mixture_forward(gaps, *(a.astype(np.float64) for a in arrays))
    np.testing.assert_allclose(nll, exact, rtol=3e-6, atol=3e-6)
    d = np.ones(5)
    got = log_normal_mixture_backward(d.astype(np.float32), saved)
    for name, have, want in zip(NAMES, got, log_normal_mixture_backward(d, saved_exact), strict=True):
        for row in range(5):
            # log p is some 1e5 in row 0: float32 leaves its shares a relative error of about 1e-2.
            scale = max(np.abs(want[row]).max(), 1e-3)
            np.testing.assert_allclose(have[row], want[row], rtol=0, atol=2e-2 * scale, err_msg=f"{name}, row {row}")


def test_a_component_beyond_float32_has_no_share_and_no_gradient(on_emulator):
    # z = 1e26, whose square is infinite: 0 · ∞ must not make NaN of the other component's row.
    log_scales = np.array([[-60, 0]], np.float32)
    nll, saved = log_normal_mixture_forward(
        np.array([np.e]), np.zeros((1, 2), np.float32), np.zeros((1, 2), np.float32), log_scales
    )
    np.testing.assert_allclose(nll, 1 + 0.5 + 0.5 * np.log(2 * np.pi) + np.log(2), rtol=1e-6)
    dweights, dmeans, dlog_scales = log_normal_mixture_backward(np.ones(1, np.float32), saved)
    np.testing.assert_allclose(dweights, [[0.5, -0.5]], rtol=1e-6)
    np.testing.assert_allclose(dmeans, [[0, -1]], rtol=1e-6)
    np.testing.assert_allclose(dlog_scales, [[0, 0]], atol=1e-6)


def test_what_is_not_finite_shows(on_emulator):
    gaps, parameters, dnll = mixture(6, 9, np.float32)
    parameters[0, 1, 3] = np.nan
    parameters[1, 2, 8] = np.nan
    parameters[2, 3, 0] = np.nan
    nll, saved = log_normal_mixture_forward(gaps, *parameters)
    np.testing.assert_array_equal(np.isnan(nll), [False, True, True, True, False, False])
    dweights, _, _ = log_normal_mixture_backward(dnll, saved)
    np.testing.assert_array_equal(np.isnan(dweights).any(axis=1), [False, True, True, True, False, False])

"""The mixture as a distribution, on NumPy arrays and on a stand-in for CuPy's."""

import math
import sys
from types import ModuleType

import numpy as np
import pytest
from cupy_at_hand import stand_in

from ttr_kernels.log_normal_mixture import (
    cdf,
    log_normal_mixture_forward,
    log_survival,
    mean,
    pdf,
    quantile,
    sample,
)


@pytest.fixture(params=["numpy", "cupy"])
def device(request, monkeypatch):
    """(to the device, back to NumPy)."""
    if request.param == "numpy":
        yield np.asarray, lambda a: a
        return
    special = ModuleType("cupyx.scipy.special")
    with stand_in() as cupy:
        erfc = np.vectorize(math.erfc, otypes=[np.float64])
        special.erfc = lambda x: cupy.asarray(erfc(x.host))
        monkeypatch.setitem(sys.modules, "cupyx.scipy.special", special)
        yield cupy.asarray, cupy.asnumpy


def mixture(dtype=np.float32):
    rng = np.random.default_rng(0)
    return [(scale * rng.standard_normal((4, 3))).astype(dtype) for scale in (1.0, 1.0, 0.3)]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_density_is_the_likelihood_and_the_slope_of_the_distribution(dtype, device):
    to, back = device
    parameters = mixture(dtype)
    there = [to(p) for p in parameters]
    gaps = np.array([0.1, 0.7, 1.5, 9.0])
    density = back(pdf(to(gaps), *there))
    nll, _ = log_normal_mixture_forward(gaps, *(p.astype(np.float64) for p in parameters))
    np.testing.assert_allclose(density, np.exp(-nll), rtol=1e-12)
    step = 1e-5 * gaps
    slope = (back(cdf(to(gaps + step), *there)) - back(cdf(to(gaps - step), *there))) / (2 * step)
    np.testing.assert_allclose(density, slope, rtol=1e-6)
    np.testing.assert_allclose(np.exp(back(log_survival(to(gaps), *there))), 1 - back(cdf(to(gaps), *there)), rtol=1e-9)


def test_no_gap_is_below_zero(device):
    to, back = device
    there = [to(p) for p in mixture()]
    for gap in (0.0, -1.0):
        assert (back(pdf(gap, *there)) == 0).all()
        assert (back(cdf(gap, *there)) == 0).all()
        np.testing.assert_allclose(back(log_survival(gap, *there)), 0, atol=1e-15)


def test_survival_far_out(device):
    to, back = device
    far = back(log_survival(1e9, *(to(p) for p in mixture())))
    assert (far < -50).all()
    assert np.isfinite(far).all()


def test_quantiles_invert_the_distribution(device):
    to, back = device
    there = [to(p) for p in mixture()]
    for probability in (0.001, 0.5, np.array([0.2, 0.4, 0.6, 0.9])):
        given = to(probability) if isinstance(probability, np.ndarray) else probability
        got = quantile(given, *there)
        np.testing.assert_allclose(back(cdf(got, *there)), np.broadcast_to(probability, 4), rtol=1e-9)
    np.testing.assert_array_equal(back(quantile(0.0, *there)), np.zeros(4))
    np.testing.assert_array_equal(back(quantile(1.0, *there)), np.full(4, np.inf))
    assert back(quantile(0.5, *(to(p[:0]) for p in mixture()))).shape == (0,)
    for wrong in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match=r"probability: got a value outside \[0, 1\]"):
            quantile(wrong, *there)


def test_samples_follow_the_distribution_and_are_the_same_everywhere(device):
    to, back = device
    row = [np.repeat(p[:1], 4000, axis=0) for p in mixture()]
    gaps = back(sample(*(to(p) for p in row), seed=3))
    np.testing.assert_array_equal(gaps, sample(*row, seed=3))
    assert not np.array_equal(gaps, back(sample(*(to(p) for p in row), seed=3, offset=1)))
    # Kolmogorov's statistic; 1.95 / sqrt(n) is passed by one sample in a thousand.
    ranks = back(cdf(to(np.sort(gaps)), *(to(p) for p in row)))
    assert np.abs(ranks - (np.arange(4000) + 0.5) / 4000).max() < 1.95 / np.sqrt(4000)


def test_mean(device):
    to, back = device
    w, m, s = (p.astype(np.float64) for p in mixture())
    weights = np.exp(w) / np.exp(w).sum(axis=1, keepdims=True)
    want = (weights * np.exp(m + 0.5 * np.exp(s) ** 2)).sum(axis=1)
    np.testing.assert_allclose(back(mean(*(to(p) for p in mixture()))), want, rtol=1e-12)
    assert np.isinf(back(mean(to(w), to(m), to(s + 8)))).all()


def test_logits_of_any_size(device):
    to, back = device
    w, m, s = mixture()
    near = [to(w), to(m), to(s)]
    far = [to(w.astype(np.float64) + 1000), to(m), to(s)]
    np.testing.assert_allclose(back(cdf(1.0, *far)), back(cdf(1.0, *near)), rtol=1e-12)

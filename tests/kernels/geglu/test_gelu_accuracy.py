"""Φ and its slope as the CPU kernels compute them, over all of the line: errors, limits, NaN."""

import math

import numpy as np
import pytest

from ttr_kernels.common.compilation import jit
from ttr_kernels.geglu import cpu

ROOT = math.sqrt(2 / math.pi)


@jit
def _tanh_loop(x, share, slope):
    for i in range(x.shape[0]):
        share[np.uintp(i)], slope[np.uintp(i)] = cpu.phi_tanh(x[np.uintp(i)])


@jit
def _erf_loop(x, share, slope):
    for i in range(x.shape[0]):
        share[np.uintp(i)], slope[np.uintp(i)] = cpu._phi_erf(x[np.uintp(i)])


def exact_tanh(x):
    t = math.tanh(ROOT * (x + 0.044715 * x**3))
    return 0.5 + 0.5 * t, 0.5 * (1 - t * t) * ROOT * (1 + 3 * 0.044715 * x * x)


def exact_erf(x):
    return 0.5 * math.erfc(-x / math.sqrt(2)), math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


LOOPS = [pytest.param(_tanh_loop, exact_tanh, id="tanh"), pytest.param(_erf_loop, exact_erf, id="erf")]


def evaluated(loop, x):
    share, slope = np.empty_like(x), np.empty_like(x)
    loop(x, share, slope)
    return share, slope


@pytest.mark.parametrize(("loop", "exact"), LOOPS)
def test_share_and_slope(loop, exact):
    x = np.concatenate([np.linspace(-15, 15, 60_001), np.geomspace(1e-30, 0.1, 500)]).astype(np.float32)
    want_share, want_slope = np.array([exact(float(v)) for v in x]).T
    share, slope = evaluated(loop, x)
    assert np.abs(share - want_share).max() <= 1.3e-7
    assert np.abs(slope - want_slope).max() <= 1.3e-7
    # What gelu and its derivative make of them.
    assert (np.abs(x * (share - want_share)) <= 1.3e-7 * np.maximum(np.abs(x), 1)).all()
    assert (np.abs(x * (slope - want_slope)) <= 2e-7).all()
    # Far out on the left a share is small, and not rounded off to nothing or to a negative number.
    left = (x < -1) & (x > -5)
    np.testing.assert_allclose(share[left], want_share[left], rtol=5e-3 if loop is _erf_loop else 1e-5)


@pytest.mark.parametrize(("loop", "exact"), LOOPS)
def test_limits(loop, exact):
    # Repeated, so that the vector loop sees them and not only the loop over what remains of it.
    x = np.repeat(np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, 0.0], np.float32), 37)
    share, slope = evaluated(loop, x)
    np.testing.assert_array_equal(share, np.repeat(np.array([np.nan, 1, 0, 1, 0, 0.5], np.float32), 37))
    assert np.isnan(slope[:37]).all()
    assert (slope[37 : 5 * 37] == 0).all()
    np.testing.assert_allclose(slope[5 * 37 :], 1 / math.sqrt(2 * math.pi), rtol=1e-6)

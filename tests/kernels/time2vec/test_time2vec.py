"""Time2Vec: phases of UNIX times against exact rational arithmetic, and gradients whose terms cancel."""

import math
from fractions import Fraction

import numpy as np
import pytest

from ttr_kernels.common.arrays import BFLOAT16
from ttr_kernels.time2vec import time2vec_backward, time2vec_forward

TWO_PI = Fraction("6.283185307179586476925286766559005768394338798750211641949889184615632812572417997256")


def exact_angle(time, frequency, phase):
    """ω t + φ modulo 2π, of the very numbers that the arrays hold."""
    angle = Fraction(float(time)) * Fraction(float(frequency)) + Fraction(float(phase))
    return float(angle % TWO_PI)


def floats(*values):
    return np.array(values, np.float32)


# A wave of a second, a minute, a day, and one radian per two seconds; in front the linear feature.
FREQUENCY = floats(1e-9, 2 * np.pi, 2 * np.pi / 60, 2 * np.pi / 86400, 0.5)
PHASE = floats(0.25, 0.1, -0.7, 2.0, 0.0)
UNIX = 1.7e9 + np.array([0.0, 0.1, 0.2, 0.35, 1.0, 3600.1, 86400.05])


def test_unix_times_keep_their_subsecond_part():
    features, _ = time2vec_forward(UNIX, FREQUENCY, PHASE)
    exact = np.array([[math.sin(exact_angle(t, w, p)) for w, p in zip(FREQUENCY, PHASE, strict=True)] for t in UNIX])
    # The phase, up to 1.1e10, is rounded to float64, and its product before the sum.
    rounding = np.spacing(UNIX[:, None] * FREQUENCY.astype(np.float64))
    assert (np.abs(features - exact)[:, 1:] <= 2.0**-23 + rounding[:, 1:]).all()
    linear = UNIX * float(FREQUENCY[0]) + float(PHASE[0])
    np.testing.assert_allclose(features[:, 0], linear, rtol=1e-7)
    # A tenth of a second is a tenth of a turn. In float32, where time steps by 128 s, the rows would be equal.
    assert np.abs(np.diff(features[:4, 1])).min() > 0.05


def test_times_that_float32_cannot_tell_apart():
    assert np.float32(UNIX[0]) == np.float32(UNIX[3])
    features, _ = time2vec_forward(UNIX[[0, 3]], FREQUENCY, PHASE)
    assert np.abs(features[0, 1] - features[1, 1]) > 0.1


def test_gradients_at_unix_times():
    # The terms of dω are some 1e9 each and cancel to the gaps: float32 sums would keep nothing.
    rng = np.random.default_rng(0)
    times = 1.7e9 + np.cumsum(rng.exponential(0.3, 400))
    dy = rng.standard_normal((400, 5)).astype(np.float32)
    dy -= dy.mean(axis=0)
    _, saved = time2vec_forward(times, FREQUENCY, PHASE)
    dfrequency, dphase = time2vec_backward(dy, saved)
    for k in range(5):
        cosines = [1.0 if k == 0 else math.cos(exact_angle(t, FREQUENCY[k], PHASE[k])) for t in times]
        slopes = [float(d) * c for d, c in zip(dy[:, k], cosines, strict=True)]
        size = sum(map(abs, slopes))
        assert abs(dphase[k] - math.fsum(slopes)) <= 1e-6 * size
        assert abs(dfrequency[k] - math.fsum(s * t for s, t in zip(slopes, times, strict=True))) <= 1e-6 * size * 1.7e9


def test_gradients_of_the_linear_feature_do_not_lose_the_gaps():
    times = 1.7e9 + np.arange(1000) / 8
    dy = np.where(np.arange(1000) % 2, 1.0, -1.0).astype(np.float32)[:, None]
    _, saved = time2vec_forward(times, floats(1e-9), floats(0.0))
    dfrequency, dphase = time2vec_backward(dy, saved)
    # Σ ± t over pairs of neighbours: 500 gaps of 1/8.
    assert dfrequency[0] == 62.5
    assert dphase[0] == 0


def test_gradients_accumulate():
    times, dy = UNIX - 1.7e9, np.ones((7, 5), np.float32)
    _, saved = time2vec_forward(times, FREQUENCY, PHASE)
    once = time2vec_backward(dy, saved)
    given = [np.full(5, 3.0, np.float32) for _ in range(2)]
    got = time2vec_backward(dy, saved, dfrequency=given[0], dphase=given[1])
    for start, result, want in zip(given, got, once, strict=True):
        assert result is start
        np.testing.assert_allclose(result, want + 3, rtol=1e-6)


def test_features_of_another_dtype():
    features, saved = time2vec_forward(UNIX, FREQUENCY, PHASE, dtype=BFLOAT16)
    want, _ = time2vec_forward(UNIX, FREQUENCY, PHASE)
    np.testing.assert_array_equal(features, want.astype(BFLOAT16))
    assert time2vec_backward(features, saved)[0].dtype == np.float32


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="times: got dtype float32, expected float64"):
        time2vec_forward(UNIX.astype(np.float32), FREQUENCY, PHASE)
    with pytest.raises(TypeError, match="phase: got dtype float64, expected float32"):
        time2vec_forward(UNIX, FREQUENCY, PHASE.astype(np.float64))
    with pytest.raises(ValueError, match=r"phase: got shape \(4,\), expected \(K\) with K=5"):
        time2vec_forward(UNIX, FREQUENCY, PHASE[:4])
    with pytest.raises(TypeError, match="dtype: got float64, expected float32 or bfloat16 or float16"):
        time2vec_forward(UNIX, FREQUENCY, PHASE, dtype=np.float64)
    with pytest.raises(ValueError, match=r"dy: got shape \(7, 4\), expected \(7, 5\) like y"):
        time2vec_backward(np.ones((7, 4), np.float32), time2vec_forward(UNIX, FREQUENCY, PHASE)[1])

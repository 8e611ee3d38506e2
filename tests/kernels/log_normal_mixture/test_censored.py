"""The likelihood of a censored interval: that of the distribution, its gradient, and far out in the tail."""

import math

import numpy as np
import pytest

from ttr_kernels.log_normal_mixture import log_survival
from ttr_kernels.log_normal_mixture.survival import censored_backward, censored_forward


def mixture(rows=6, components=4, dtype=np.float64):
    rng = np.random.default_rng(0)
    return [(scale * rng.standard_normal((rows, components))).astype(dtype) for scale in (1.0, 1.5, 0.4)]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_it_is_the_survival_of_the_distribution(dtype):
    ages = np.array([0.0, 1e-9, 0.3, 1.0, 20.0, 4000.0])
    nll, _ = censored_forward(ages, *mixture(dtype=dtype))
    np.testing.assert_allclose(nll, -log_survival(ages, *mixture(dtype=dtype)), rtol=1e-9, atol=1e-12)
    assert nll[0] == pytest.approx(0, abs=1e-12)


def test_the_gradient_agrees_with_finite_differences():
    ages, dnll = np.array([0.0, 0.05, 0.3, 1.0, 20.0, 1e9]), np.array([1.0, -2.0, 0.5, 1.0, 3.0, 0.25])
    parameters = mixture()
    _, saved = censored_forward(ages, *parameters)
    for index, gradient in enumerate(censored_backward(dnll, saved)):
        for at in np.ndindex(*gradient.shape):
            sums = []
            for step in (1e-6, -1e-6):
                moved = [p.copy() for p in parameters]
                moved[index][at] += step
                sums.append(float((dnll * censored_forward(ages, *moved)[0]).sum()))
            assert gradient[at] == pytest.approx((sums[0] - sums[1]) / 2e-6, rel=1e-6, abs=1e-7), (index, at)


def test_a_wait_without_any_probability_left_is_finite():
    """exp(−z²/2) underflows beyond z = 38; the loss grows as z²/2, and its gradient pulls the mean up as z / s."""
    zero = np.zeros((4, 1))
    z = np.array([28.2, 28.3, 1e3, 1e5])  # the first two on both sides of where the series takes over
    nll, saved = censored_forward(np.exp(z * 1e-3), zero, zero, zero + math.log(1e-3))
    np.testing.assert_allclose(nll, 0.5 * z * z + np.log(z * math.sqrt(2 * math.pi)), rtol=1e-5)
    _, dmeans, _ = censored_backward(np.ones(4), saved)
    np.testing.assert_allclose(dmeans[:, 0], -z / 1e-3, rtol=2e-3)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"weight_logits: got shape \(6, 4\), expected \(rows, K\) with rows=3"):
        censored_forward(np.zeros(3), *mixture())
    with pytest.raises(TypeError, match="ages: got dtype float32"):
        censored_forward(np.zeros(6, np.float32), *mixture())

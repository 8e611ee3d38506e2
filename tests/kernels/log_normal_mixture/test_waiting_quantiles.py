"""Quantiles of a gap of which some has passed: beside the distribution function, far tails, bad input."""

import numpy as np
import pytest

from ttr_kernels.log_normal_mixture import log_survival, quantile
from ttr_kernels.log_normal_mixture.waiting import waiting_quantiles

P = np.array([0.0, 0.01, 0.5, 0.9, 0.999])


def mixture(rows=5, components=3):
    rng = np.random.default_rng(0)
    return [scale * rng.standard_normal((rows, components)) for scale in (1.0, 2.0, 0.5)]


def test_nothing_has_passed():
    parameters = mixture()
    found = waiting_quantiles(P, np.zeros(5), *parameters)
    for row in range(5):
        own = [array[row] for array in parameters]
        np.testing.assert_allclose(found[row, 1:], [quantile(p, *own) for p in P[1:]], rtol=1e-9)
    assert (found[:, 0] == 0).all()


@pytest.mark.parametrize("elapsed", [1e-6, 0.3, 5.0, 1e4])
def test_the_rest_has_the_probability_that_was_left(elapsed):
    parameters = mixture()
    found = waiting_quantiles(P, np.full(5, elapsed), *parameters)
    assert (found >= elapsed).all()
    assert (np.diff(found, axis=1) > 0).all()
    for i, p in enumerate(P):
        left = log_survival(found[:, i], *parameters) - log_survival(np.full(5, elapsed), *parameters)
        # Far out, the steepness of the survival magnifies the rounding of the logarithm.
        np.testing.assert_allclose(left, np.log1p(-p), rtol=1e-6, atol=1e-6)


def test_what_is_long_overdue_is_expected_at_once():
    one = [np.zeros((1, 1)), np.zeros((1, 1)), np.zeros((1, 1))]
    assert waiting_quantiles(np.array([0.5, 0.9]), np.array([1e30]), *one).tolist() == [[1e30, 1e30]]
    assert waiting_quantiles(np.array([1.0]), np.array([3.0]), *one).tolist() == [[np.inf]]


def test_bad_input_is_refused():
    parameters = mixture()
    with pytest.raises(ValueError, match="probabilities: got a value outside"):
        waiting_quantiles(np.array([1.5]), np.zeros(5), *parameters)
    for bad in (-1.0, np.nan):
        with pytest.raises(ValueError, match="elapsed: got a negative value or NaN"):
            waiting_quantiles(P, np.full(5, bad), *parameters)
    with pytest.raises(ValueError, match="expected"):
        waiting_quantiles(P, np.zeros(4), *parameters)

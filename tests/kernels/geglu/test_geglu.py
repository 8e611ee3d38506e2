"""GeGLU: against the formulas written with math.erf and math.tanh, biases, tails, and in place."""

import math

import numpy as np
import pytest

from ttr_kernels.common.arrays import BFLOAT16
from ttr_kernels.geglu import geglu, geglu_backward, geglu_forward

BOTH_FORMULAS = pytest.mark.parametrize("approximate", ["tanh", "none"])


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def gelu(x, approximate):
    if approximate == "none":
        return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def formula(x, approximate):
    half = x.shape[-1] // 2
    return np.vectorize(gelu)(x[..., :half].astype(np.float64), approximate) * x[..., half:]


@BOTH_FORMULAS
def test_is_gelu_of_the_gate_times_the_value(approximate):
    x = 3 * normal(20, 64)
    np.testing.assert_allclose(geglu(x, approximate=approximate), formula(x, approximate), rtol=3e-6, atol=2e-6)


@BOTH_FORMULAS
def test_a_bias_is_added_before(approximate):
    x, bias = normal(300, 32), normal(32, seed=1)
    y, saved = geglu_forward(x, bias, approximate=approximate)
    shifted, saved_shifted = geglu_forward(x + bias, approximate=approximate)
    np.testing.assert_array_equal(y, shifted)
    dy = normal(300, 16, seed=2)
    dbias = np.full(32, 2.0, np.float32)
    dx, got = geglu_backward(dy, saved, dbias=dbias)
    want, none = geglu_backward(dy, saved_shifted)
    assert got is dbias
    assert none is None
    np.testing.assert_array_equal(dx, want)
    np.testing.assert_allclose(dbias, 2 + want.astype(np.float64).sum(axis=0), rtol=1e-5, atol=1e-5)


def test_a_bias_of_the_activations_dtype():
    x, bias = normal(8, 32).astype(BFLOAT16), normal(32, seed=1).astype(BFLOAT16)
    y, saved = geglu_forward(x, bias)
    np.testing.assert_array_equal(y, geglu(x, bias.astype(np.float32)))
    assert geglu_backward(y, saved)[1].dtype == np.float32


@BOTH_FORMULAS
def test_tails(approximate):
    gate = np.array([-1e30, -100, -20, -0.0, 0.0, 20, 100, 1e30], np.float32)
    x = np.concatenate([gate, np.ones(8, np.float32)])[None]
    y, saved = geglu_forward(x, approximate=approximate)
    np.testing.assert_array_equal(y[0], np.array([0, 0, 0, 0, 0, 20, 100, 1e30], np.float32))
    dx, _ = geglu_backward(np.ones((1, 8), np.float32), saved)
    np.testing.assert_array_equal(dx[0, [0, 1, 2, 5, 6, 7]], [0, 0, 0, 1, 1, 1])
    np.testing.assert_allclose(dx[0, 3:5], 0.5)


@BOTH_FORMULAS
def test_nan_is_not_hidden(approximate):
    x = normal(2, 64)
    x[0, 3], x[1, 40] = np.nan, np.nan
    y = geglu(x, approximate=approximate)
    assert np.isnan(y[0, 3])
    assert np.isnan(y[1, 8])
    assert np.isnan(y).sum() == 2


@BOTH_FORMULAS
def test_backward_in_place_of_the_input(approximate):
    x, bias, dy = normal(70, 32), normal(32, seed=1), normal(70, 16, seed=2)
    _, saved = geglu_forward(x, bias, approximate=approximate)
    want, dbias = geglu_backward(dy, saved)
    dx, again = geglu_backward(dy, saved, dx=x)
    assert dx is x
    np.testing.assert_array_equal(x, want)
    np.testing.assert_array_equal(again, dbias)


def test_the_formulas_differ():
    x = normal(20, 64)
    difference = np.abs(geglu(x, approximate="tanh") - geglu(x, approximate="none")).max()
    assert 1e-5 < difference < 5e-3


def test_bad_input_is_named():
    x = normal(3, 8)
    with pytest.raises(ValueError, match=r"x: got 7 features, expected an even number \(gate and value\)"):
        geglu(x[:, :7])
    with pytest.raises(ValueError, match=r"bias: got shape \(4,\), expected \(2F\) with 2F=8"):
        geglu(x, np.zeros(4, np.float32))
    with pytest.raises(ValueError, match="approximate: got 'erf', expected 'tanh' or 'none'"):
        geglu(x, approximate="erf")
    with pytest.raises(ValueError, match=r"dy: got shape \(3, 8\), expected \(3, 4\) like y"):
        geglu_backward(x, geglu_forward(x)[1])

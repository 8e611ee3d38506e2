"""The checks that every operation passes, from its table of cases (`ttr_kernels/<operation>/cases.py`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ttr_kernels.common.arrays import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from ttr_kernels.common.cases import Case, Operation

DTYPES = {"float32": FLOAT32, "bfloat16": BFLOAT16, "float16": FLOAT16}
# Allowed error, as a share of the largest value of the exact result: a few roundings of the storage dtype (2^-24, 2^-8,
# 2^-11), since everything in between is float32.
ERROR = {FLOAT32: 2e-6, BFLOAT16: 1.2e-2, FLOAT16: 1.5e-3}


def rounded_inputs(operation: Operation, case: Case, dtype: np.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """The case's inputs in `dtype`, and the same values in float64 for the reference."""
    inputs = case.make(np.random.default_rng(7))
    exact = dict(inputs)
    for name, value in inputs.items():
        wanted = dtype if name in operation.activations else FLOAT32 if name in operation.parameters else None
        if wanted is not None and isinstance(value, np.ndarray):
            inputs[name] = value.astype(wanted)
            exact[name] = inputs[name].astype(FLOAT64)
    return inputs, exact


def gradient_of_output(y: Any) -> np.ndarray:
    y = np.asarray(y)
    return np.random.default_rng(11).standard_normal(y.shape)


def as_tuple(gradients: Any) -> tuple[Any, ...]:
    return gradients if isinstance(gradients, tuple) else (gradients,)


def gradients_of(operation: Operation, dy: Any, saved: Any, **given: Any) -> tuple[Any, ...]:
    """What the backward returns, as a tuple; nothing where there is none."""
    return () if operation.backward is None else as_tuple(operation.backward(dy, saved, **given))


def differentiated(operation: Operation, inputs: dict[str, Any]) -> list[str]:
    return [name for name in operation.gradients if inputs.get(name) is not None]


def assert_close(name: str, got: Any, exact: Any, allowed: float) -> None:
    got = np.asarray(got).astype(FLOAT64)
    exact = np.asarray(exact, FLOAT64)
    assert got.shape == exact.shape, f"{name}: shape {got.shape}, expected {exact.shape}"
    if exact.size == 0:
        return
    assert np.isfinite(got).all(), f"{name}: not finite"
    # A gradient that cancels to zero keeps the rounding of its terms, which are of order one in all cases.
    error = np.abs(got - exact).max() / max(np.abs(exact).max(), 0.1)
    assert error <= allowed, f"{name}: error {error:.2e} of the largest value, allowed {allowed:.2e}"


def assert_same(operation: Operation, got: Any, want: Any) -> None:
    """The same bits; the same to rounding where BLAS does the work, which sums by blocks and strides."""
    if operation.same_bits_on_any_threads:
        assert want is None or np.array_equal(np.asarray(got), np.asarray(want))
    elif want is not None:
        assert_close("result", got, want, ERROR[FLOAT32] * operation.tolerance)


def check_reference(operation: Operation, case: Case) -> None:
    """The reference's backward against central differences of its forward, along random directions, in float64."""
    _, inputs = rounded_inputs(operation, case, FLOAT32)
    y, saved = operation.forward(**inputs)
    dy = gradient_of_output(y)
    gradients = dict(zip(operation.gradients, gradients_of(operation, dy.copy(), saved), strict=True))
    rng = np.random.default_rng(5)
    for name in differentiated(operation, inputs):
        value = inputs[name]
        if value.size == 0:
            continue
        direction = rng.standard_normal(value.shape)
        step = 1e-5 * max(np.abs(value).max(), 1e-3)
        ends = [operation.forward(**{**inputs, name: value + sign * step * direction})[0] for sign in (1, -1)]
        numeric = np.vdot(dy, np.asarray(ends[0]) - np.asarray(ends[1])) / (2 * step)
        analytic = np.vdot(gradients[name], direction)
        scale = np.linalg.norm(gradients[name]) * np.linalg.norm(direction) + 1e-12
        assert abs(numeric - analytic) <= 2e-7 * scale + 1e-9 * np.linalg.norm(dy), (
            f"{name}: {analytic} against differences {numeric}"
        )


def check_against_reference(operation: Operation, case: Case, dtype: np.dtype) -> None:
    """Forward and backward in `dtype` against float64, and twice the same bits."""
    inputs, exact = rounded_inputs(operation, case, dtype)
    allowed = ERROR[dtype] * operation.tolerance
    y, saved = operation.forward(**inputs)
    y_exact, saved_exact = operation.forward(**exact)
    assert_close("output", y, y_exact, allowed)
    dy = gradient_of_output(y).astype(np.asarray(y).dtype)
    gradients = gradients_of(operation, dy.copy(), saved)
    expected = gradients_of(operation, np.asarray(dy.astype(FLOAT64)), saved_exact)
    for name, got, want in zip(operation.gradients, gradients, expected, strict=True):
        if inputs.get(name) is not None:
            assert_close(f"gradient of {name}", got, want, 2 * allowed)
    again, saved = operation.forward(**inputs)
    assert np.array_equal(np.asarray(again), np.asarray(y)), "the second run gave other bits"
    for got, want in zip(gradients_of(operation, dy.copy(), saved), gradients, strict=True):
        assert got is None or np.array_equal(got, want), "the second backward gave other bits"


def check_preallocated(operation: Operation, case: Case) -> None:
    """`out=` and `d<name>=` are used: activations' gradients are written, parameters' are added to."""
    inputs, _ = rounded_inputs(operation, case, FLOAT32)
    y, saved = operation.forward(**inputs)
    if np.asarray(y).ndim:
        out = np.full_like(y, np.nan)
        assert operation.forward(**inputs, out=out)[0] is out
        assert np.array_equal(out, y)
        with pytest.raises(ValueError, match="out"):
            operation.forward(**inputs, out=np.empty((*y.shape, 2), y.dtype))
    dy = gradient_of_output(y).astype(np.asarray(y).dtype)
    gradients = dict(zip(operation.gradients, gradients_of(operation, dy.copy(), saved), strict=True))
    given = {}
    for name in differentiated(operation, inputs):
        start = 3.0 if name in operation.parameters else np.nan
        given[f"d{name}"] = np.full_like(gradients[name], start)
    _, saved = operation.forward(**inputs)
    gradients_of(operation, dy.copy(), saved, **given)
    for name in differentiated(operation, inputs):
        want = gradients[name] + 3.0 if name in operation.parameters else gradients[name]
        np.testing.assert_allclose(given[f"d{name}"], want, rtol=1e-5, atol=1e-5, err_msg=name)


def check_layout(operation: Operation, case: Case) -> None:
    """Strided inputs (every other element, and rows with a gap between them) give what contiguous ones give."""
    inputs, _ = rounded_inputs(operation, case, FLOAT32)
    y, saved = operation.forward(**inputs)
    dy = gradient_of_output(y).astype(np.asarray(y).dtype)
    gradients = gradients_of(operation, dy.copy(), saved)

    def every_other(array: np.ndarray) -> np.ndarray:
        wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
        wide[..., ::2] = array
        return wide[..., ::2]

    def gap_between_rows(array: np.ndarray) -> np.ndarray:
        wide = np.zeros((*array.shape[:-1], array.shape[-1] + 3), array.dtype)
        wide[..., : array.shape[-1]] = array
        return wide[..., : array.shape[-1]]

    for change in (every_other, gap_between_rows):
        strided = {
            name: change(value) if name in operation.activations and isinstance(value, np.ndarray) else value
            for name, value in inputs.items()
        }
        y2, saved2 = operation.forward(**strided)
        dy2 = change(dy) if dy.ndim else dy
        assert_same(operation, y2, y)
        for got, want in zip(gradients_of(operation, dy2, saved2), gradients, strict=True):
            assert_same(operation, got, want)


def check_bad_input(operation: Operation, case: Case) -> None:
    """A wrong kind, dtype or number of dimensions is refused by an error that names the argument."""
    inputs, _ = rounded_inputs(operation, case, FLOAT32)
    for name in (*operation.activations, *operation.parameters):
        value = inputs.get(name)
        if not isinstance(value, np.ndarray):
            continue
        with pytest.raises(TypeError, match=rf"{name}: got .*expected numpy.ndarray"):
            operation.forward(**{**inputs, name: value.tolist()})
        with pytest.raises(TypeError, match=rf"{name}: got dtype int8"):
            operation.forward(**{**inputs, name: np.zeros(value.shape, np.int8)})
        with pytest.raises(ValueError, match=rf"{name}: got shape"):
            operation.forward(**{**inputs, name: np.zeros((), value.dtype)})


def check_threads(operation: Operation, case: Case) -> None:
    """One thread and several give the same bits (the same to rounding, where BLAS does the work)."""
    from ttr_kernels.common.parallel import get_threads, set_threads

    inputs, _ = rounded_inputs(operation, case, FLOAT32)
    before = get_threads()
    results = []
    try:
        for threads in (1, 3):
            set_threads(threads)
            y, saved = operation.forward(**inputs)
            dy = gradient_of_output(y).astype(np.asarray(y).dtype)
            results.append((np.copy(y), *gradients_of(operation, dy, saved)))
    finally:
        set_threads(before)
    for one, three in zip(*results, strict=True):
        assert_same(operation, three, one)

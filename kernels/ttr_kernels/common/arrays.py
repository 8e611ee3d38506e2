"""Array checks, the choice of implementation, and the flat views that compiled kernels work on."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
DType: TypeAlias = np.dtype[Any]

BFLOAT16: DType = np.dtype(ml_dtypes.bfloat16)
FLOAT16: DType = np.dtype(np.float16)
FLOAT32: DType = np.dtype(np.float32)
FLOAT64: DType = np.dtype(np.float64)
INT32: DType = np.dtype(np.int32)
INT64: DType = np.dtype(np.int64)

FLOATS = (FLOAT32, BFLOAT16, FLOAT16, FLOAT64)
INTEGERS = (INT32, INT64)


def check(**arguments: tuple[Any, str] | tuple[Any, str, Iterable[DType]]) -> dict[str, int]:
    """Check kinds, shapes and dtypes of named arrays, and return the sizes of the named dimensions.

    Each argument is `name=(array, "B T C")` or `name=(array, "B T C", dtypes)`. A dimension is a name (equal names must
    have equal sizes, over all arguments), a number, or a leading `...` that matches any dimensions. The default dtypes
    are the floating-point ones. Arrays that are None are passed over.

    Raises:
        TypeError: an argument is no NumPy array, or its dtype is not allowed.
        ValueError: a shape does not fit; the message names the argument, what was got and what was expected.
    """
    sizes: dict[str, int] = {}
    for name, (array, pattern, *rest) in arguments.items():
        if array is None:
            continue
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{name}: got {_kind_name(array)}, expected numpy.ndarray{_remedy(array)}")
        dtypes = tuple(rest[0]) if rest else FLOATS
        if array.dtype not in dtypes:
            raise TypeError(f"{name}: got dtype {array.dtype}, expected {' or '.join(str(d) for d in dtypes)}")
        dims = pattern.split()
        shape = array.shape
        if dims and dims[0] == "...":
            dims = dims[1:]
            shape = shape[max(len(shape) - len(dims), 0) :]
        fits = len(dims) == len(shape)
        for dim, size in zip(dims, shape, strict=False):
            fits = fits and size == (int(dim) if dim.isdigit() else sizes.setdefault(dim, size))
        if not fits:
            known = ", ".join(f"{dim}={sizes[dim]}" for dim in dims if dim in sizes)
            raise ValueError(
                f"{name}: got shape {array.shape}, expected ({', '.join(pattern.split())})"
                + (f" with {known}" if known else "")
            )
    return sizes


def check_out(name: str, out: Array | None, shape: tuple[int, ...], dtype: DType) -> Array:
    """`out` if it has the shape and dtype that the result needs, a new array if it is None; ValueError otherwise."""
    if out is None:
        return np.empty(shape, dtype)
    if not isinstance(out, np.ndarray):
        raise TypeError(f"{name}: got {_kind_name(out)}, expected numpy.ndarray")
    if out.shape != shape or out.dtype != dtype:
        raise ValueError(f"{name}: got shape {out.shape} of {out.dtype}, expected {shape} of {dtype}")
    if not out.flags.writeable:
        raise ValueError(f"{name}: got a read-only array, expected one that can be written")
    return out


def check_same_dtype(**arrays: Array | None) -> DType:
    """The one dtype of the arrays (None is passed over); TypeError naming the first that differs."""
    given = [(name, array) for name, array in arrays.items() if array is not None]
    first_name, first = given[0]
    for name, array in given[1:]:
        if array.dtype != first.dtype:
            raise TypeError(f"{name}: got dtype {array.dtype}, expected {first.dtype} like {first_name}")
    return first.dtype


def check_parameter(name: str, parameter: Array, dtype: DType) -> None:
    """Parameters may be float32 whatever the dtype of the activations, or have that dtype."""
    if parameter.dtype not in (dtype, FLOAT32) or (dtype == FLOAT64 and parameter.dtype != FLOAT64):
        raise TypeError(f"{name}: got dtype {parameter.dtype}, expected {_parameter_dtypes(dtype)}")


def check_parameter_gradient(name: str, gradient: Array | None, shape: tuple[int, ...], dtype: DType) -> Array:
    """The gradient to accumulate into, zeros if None: float32, or float64 where the activations are float64."""
    wanted = FLOAT64 if dtype == FLOAT64 else FLOAT32
    return np.zeros(shape, wanted) if gradient is None else check_out(name, gradient, shape, wanted)


def implementation(array: Array, package: str) -> ModuleType:
    """The module of `package` that computes on arrays like this one: the whole dispatch.

    float64 goes to `reference` (the oracle doubles as the exact, slow path), other dtypes to `cpu`.
    """
    return importlib.import_module(f"{package}.{'reference' if array.dtype == FLOAT64 else 'cpu'}")


def flat_rows(array: Array, inner: int = 1) -> tuple[Array, int, int]:
    """View `array` as rows whose last `inner` dimensions are contiguous: (flat 1-D view, rows, stride between rows).

    Element j of row i is `flat[i * stride + j]`, so a slice such as the query part of a fused QKV matrix needs no copy.
    Raises ValueError if such a view does not exist; see `contiguous_rows` for inputs, which may be copied, and
    `result_rows` for results.
    """
    split = array.ndim - inner
    lead, rest = array.shape[:split], array.shape[split:]
    item = array.itemsize
    if array.size == 0:
        return _kernel_dtype(np.empty(0, array.dtype)), int(np.prod(lead)), int(np.prod(rest))
    expected = item
    for size, stride in zip(reversed(rest), reversed(array.strides[split:]), strict=True):
        if size != 1 and stride != expected:
            raise ValueError("the last dimensions are not contiguous")
        expected *= size
    row = expected
    rows, stride = 1, row
    for size, step in zip(reversed(lead), reversed(array.strides[:split]), strict=True):
        if size == 1:
            continue
        if rows == 1:
            stride = step
        elif step != stride * rows:
            raise ValueError("the leading dimensions do not form evenly spaced rows")
        rows *= size
    if stride < row or stride % item:
        raise ValueError("rows overlap or run backwards")
    flat = np.lib.stride_tricks.as_strided(array, ((rows - 1) * (stride // item) + row // item,), (item,))
    return _kernel_dtype(flat), rows, stride // item


def contiguous_rows(array: Array, inner: int = 1) -> tuple[Array, int, int]:
    """`flat_rows` of an input; an input that has no such view is copied first."""
    try:
        return flat_rows(array, inner)
    except ValueError:
        return flat_rows(np.ascontiguousarray(array), inner)


def result_rows(name: str, array: Array, inner: int = 1) -> tuple[Array, int, int]:
    """`flat_rows` of a result, which cannot be copied: ValueError naming it if it has no such view."""
    try:
        return flat_rows(array, inner)
    except ValueError as error:
        raise ValueError(
            f"{name}: got shape {array.shape} with strides {array.strides}, expected contiguous, evenly spaced rows "
            f"({error})"
        ) from None


def kernel_view(array: Array) -> Array:
    """A C-contiguous array (copied only if it is not) in the dtype that compiled kernels know."""
    return _kernel_dtype(np.ascontiguousarray(array))


def _kernel_dtype(array: Array) -> Array:
    # numba knows neither 16-bit float on the CPU: bfloat16 travels as uint16 and float16 as int16, told apart by
    # signedness, and storage.load/store convert.
    if array.dtype == BFLOAT16:
        return array.view(np.uint16)
    if array.dtype == FLOAT16:
        return array.view(np.int16)
    return array


def _parameter_dtypes(dtype: DType) -> str:
    return str(dtype) if dtype in (FLOAT32, FLOAT64) else f"float32 or {dtype}"


def _kind_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _remedy(value: Any) -> str:
    if type(value).__module__.split(".")[0] == "cupy":
        return " (this release computes on the CPU: convert with cupy.asnumpy)"
    return " (convert with numpy.asarray)"

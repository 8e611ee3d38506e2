"""float32 products by direct calls into the OpenBLAS that NumPy ships: `numpy.matmul` cannot add to its result."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np

from ..common.arrays import Array
from ..common.parallel import blas_files
from ..common.vectors import start_of

_ROW_MAJOR, _AS_IT_IS, _TRANSPOSED = 101, 111, 112
# Names of one function, by the width of its integers and whose build it is.
_NAMES = (
    ("scipy_cblas_sgemm64_", ctypes.c_int64),
    ("cblas_sgemm64_", ctypes.c_int64),
    ("scipy_cblas_sgemm", ctypes.c_int32),
    ("cblas_sgemm", ctypes.c_int32),
)


@functools.cache
def _sgemm() -> Any:
    """The C function, or None where NumPy has another BLAS."""
    for path in blas_files("openblas"):
        library = ctypes.CDLL(path)
        for name, integer in _NAMES:
            function = getattr(library, name, None)
            if function is None:
                continue
            flag, scalar, pointer = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
            function.restype = None
            function.argtypes = [
                flag, flag, flag, integer, integer, integer, scalar, pointer, integer, pointer, integer, scalar,
                pointer, integer,
            ]  # fmt: skip
            return function
    return None


def is_called_directly() -> bool:
    """Whether NumPy's BLAS is one that is called without NumPy, and so can add to its result."""
    return _sgemm() is not None


def takes(a: Array, b: Array, out: Array) -> bool:
    """Whether all three can be handed to BLAS as they are."""
    return is_called_directly() and None not in (_leading(a.shape, a.strides), _leading(b.shape, b.strides), _rows(out))


def multiply(a: Array, b: Array, out: Array, accumulate: bool) -> None:
    """out = a b, or out += a b, in float32, none of them empty."""
    left, right, result = _leading(a.shape, a.strides), _leading(b.shape, b.strides), _rows(out)
    assert left is not None
    assert right is not None
    assert result is not None
    _sgemm()(
        _ROW_MAJOR, left[0], right[0], a.shape[0], b.shape[1], a.shape[1], 1.0, start_of(a), left[1],
        start_of(b), right[1], 1.0 if accumulate else 0.0, start_of(out), result,
    )  # fmt: skip


def multiply_with_numpy(a: Array, b: Array, out: Array, accumulate: bool) -> None:
    """The same for arrays of any layout and any BLAS, with a copy where NumPy needs one."""
    # Infinities and NaN are results like any other; who trains looks at the loss.
    with np.errstate(over="ignore", invalid="ignore"):
        if accumulate:
            out += np.matmul(a, b)
        else:
            np.matmul(a, b, out=out)


@functools.lru_cache(maxsize=1024)
def _leading(shape: tuple[int, int], strides: tuple[int, int]) -> tuple[int, int] | None:
    """How BLAS is told of a matrix: as it is or transposed, and the floats from one row or column to the next."""
    (rows, columns), (down, across) = shape, strides
    if across == 4 and _apart(down, rows, columns):
        return _AS_IT_IS, max(down // 4, columns)
    if down == 4 and _apart(across, columns, rows):
        return _TRANSPOSED, max(across // 4, rows)
    return None


def _rows(out: Array) -> int | None:
    found = _leading(out.shape, out.strides)
    return found[1] if found is not None and found[0] == _AS_IT_IS else None


def _apart(stride: int, count: int, size: int) -> bool:
    return count == 1 or (stride >= 4 * size and stride % 4 == 0)

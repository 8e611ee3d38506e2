"""float32 products by direct calls into the OpenBLAS that NumPy ships: `numpy.matmul` cannot add to its result."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..common.arrays import Array
from ..common.parallel import blas_files, parallel_for, single_threaded_blas
from ..common.ranges import jit_ranges
from ..common.vectors import start_of

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
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


def multiply(a: Array, b: Array, out: Array, accumulate: bool, by_rows: bool, grain: int) -> None:
    """out = a b, or out += a b, in float32, none of them empty: rows or columns of the result on all threads, at least
    `grain` of them on each."""
    function, wide = _address()
    left, right, result = _leading(a.shape, a.strides), _leading(b.shape, b.strides), _rows(out)
    assert left is not None
    assert right is not None
    assert result is not None
    # Bytes from one row or column to the next, in each operand.
    steps = (a.strides[0], 0, out.strides[0]) if by_rows else (0, b.strides[1], 4)
    with single_threaded_blas():
        parallel_for(
            _products, out.shape[0 if by_rows else 1], function, wide, left, right, result, out.shape[0], out.shape[1],
            a.shape[1], start_of(a), start_of(b), start_of(out), steps, accumulate, by_rows, grain=grain,
        )  # fmt: skip


@functools.cache
def _address() -> tuple[int, bool]:
    """Of the C function, and whether its integers have 64 bits."""
    function = _sgemm()
    return ctypes.cast(function, ctypes.c_void_p).value or 0, function.argtypes[3] is ctypes.c_int64


@jit_ranges
def _products(
    function: int, wide: bool, left: Any, right: Any, result: int, m: int, n: int, k: int, a: int, b: int, c: int,
    steps: Any, accumulate: bool, by_rows: bool, begin: int, end: int,
) -> None:  # fmt: skip
    if by_rows:
        m = end - begin
    else:
        n = end - begin
    beta = _ONE if accumulate else _ZERO
    a, b, c = a + begin * steps[0], b + begin * steps[1], c + begin * steps[2]
    if wide:
        _call_64(function, left[0], right[0], m, n, k, a, left[1], b, right[1], beta, c, result)
    else:
        _call_32(function, left[0], right[0], m, n, k, a, left[1], b, right[1], beta, c, result)


def _calling(bits: int) -> Any:
    flag, size, scalar, pointer = ir.IntType(32), ir.IntType(bits), ir.FloatType(), ir.IntType(8).as_pointer()
    kinds = [
        flag, flag, flag, size, size, size, scalar, pointer, size, pointer, size, scalar, pointer, size
    ]  # fmt: skip

    def typing(
        context: Any, function: Any, left: Any, right: Any, m: Any, n: Any, k: Any, a: Any, lda: Any, b: Any, ldb: Any,
        beta: Any, c: Any, ldc: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            function, left, right, m, n, k, a, lda, b, ldb, beta, c, ldc = arguments
            given = [flag(_ROW_MAJOR), left, right, m, n, k, scalar(1.0), a, lda, b, ldb, beta, c, ldc]
            values = [_as(builder, value, kind) for value, kind in zip(given, kinds, strict=True)]
            address = builder.inttoptr(function, ir.FunctionType(ir.VoidType(), kinds).as_pointer())
            builder.call(address, values)
            return context.get_dummy_value()

        number = types.int64
        return types.void(*(number,) * 10, types.float32, number, number), generate

    return intrinsic(typing)


def _as(builder: Any, value: Any, kind: Any) -> Any:
    if isinstance(kind, ir.PointerType):
        return builder.inttoptr(value, kind)
    return builder.trunc(value, kind) if isinstance(kind, ir.IntType) and kind.width < value.type.width else value


_call_32, _call_64 = _calling(32), _calling(64)


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

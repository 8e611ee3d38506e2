"""What kernels written with numba.cuda share: elements of three dtypes, computed with in float32, and their launch.

Arrays arrive flat, with the distance of their rows in elements. bfloat16, which not every numba.cuda knows, travels as
its bits (uint16). On NumPy arrays kernels run in numba's simulator, if NUMBA_ENABLE_CUDASIM=1 was set before numba was
imported; the simulator copies arrays to and fro, the last argument last: that has to be the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import cuda

from ..arrays import BFLOAT16, Array, DType, array_module

_THREADS = 128
_BFLOAT16_NAN = np.uint16(0x7FC0)
_HALF_UNIT, _ONE, _SIXTEEN = np.uint32(0x7FFF), np.uint32(1), np.uint32(16)


@cuda.jit(device=True)
def load_float(array: Any, i: Any) -> Any:
    return np.float32(array[i])


@cuda.jit(device=True)
def store_float(array: Any, i: Any, value: Any) -> None:
    array[i] = value


@cuda.jit(device=True)
def load_bfloat16(array: Any, i: Any) -> Any:
    return np.uint32(np.uint32(array[i]) << _SIXTEEN).view(np.float32)


@cuda.jit(device=True)
def store_bfloat16(array: Any, i: Any, value: Any) -> None:
    """To nearest, ties to even."""
    if value != value:
        array[i] = _BFLOAT16_NAN
    else:
        bits = np.float32(value).view(np.uint32)
        array[i] = np.uint16((bits + _HALF_UNIT + ((bits >> _SIXTEEN) & _ONE)) >> _SIXTEEN)


def load_and_store(dtype: DType) -> tuple[Any, Any]:
    """(load(array, i) -> float32, store(array, i, float32)) for kernels on arrays of this dtype."""
    return (load_bfloat16, store_bfloat16) if dtype == BFLOAT16 else (load_float, store_float)


def elements(array: Array, dtype: DType, rows: int, stride: int, width: int) -> Array:
    """The memory of evenly spaced rows (see `arrays.flat_rows`), from their first element to their last."""
    flat = array_module(array).lib.stride_tricks.as_strided(array, ((rows - 1) * stride + width,), (array.itemsize,))
    bits: Array = flat.view(np.uint16 if dtype == BFLOAT16 else dtype)
    return bits


def launch(kernel: Any, threads: int, arguments: Sequence[Any]) -> None:
    """Start at least as many threads, on the current stream of CuPy if the first argument is an array of CuPy's."""
    blocks = -(-threads // _THREADS)
    xp = array_module(arguments[0])
    if xp is np:
        kernel[blocks, _THREADS](*arguments)
        return
    stream = cuda.external_stream(xp.cuda.get_current_stream().ptr)
    # Without sync=False numba would wait for the stream of each array, which CuPy's interface names.
    known = [cuda.as_cuda_array(a, sync=False) if isinstance(a, xp.ndarray) else a for a in arguments]
    kernel[blocks, _THREADS, stream](*known)

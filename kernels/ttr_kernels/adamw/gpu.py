"""AdamW and the gradient norm on a GPU: each one pass, bound by memory, and nothing waits for the device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.arrays import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, Array, DType, array_module, contiguous, empty, is_array
from ..common.cuda.launch import CXX_TYPES, Kernel, address, scratch

_THREADS = 256
_VECTOR = 4
_ADAMW = Kernel(Path(__file__).with_name("adamw.cu"), "adamw", {"TTR_VECTOR": _VECTOR})
_NORM_SOURCE = Path(__file__).with_name("global_norm.cu")
# Blocks per array at most: what fills a large device once, and the same on all, so that they give the same bits.
_MOST_PARTS = 1024
# Elements per block at least.
_PART = 8192


def update(
    parameter: Array, gradient: Array, first: Array, second: Array, learning_rate: float, beta1: float, beta2: float,
    eps: float, weight_decay: float, gradient_scale: Any, correction1: float, correction2: float,
    schedule: Array | None,
) -> None:  # fmt: skip
    xp = array_module(parameter)
    scale: float = 1.0
    scale_at: Any = 0
    if is_array(gradient_scale) and array_module(gradient_scale) is xp:
        if gradient_scale.size != 1:
            raise ValueError(f"gradient_scale: got shape {gradient_scale.shape}, expected one number")
        scale_at = contiguous(gradient_scale, FLOAT64)
    else:
        scale = float(gradient_scale)
    arrays = parameter, gradient, first, second
    shifts = {_shift(array) for array in arrays}
    shift = shifts.pop() if len(shifts) == 1 else -1
    groups = -(-(parameter.size + max(shift, 0)) // _VECTOR) if parameter.size else 0
    _ADAMW.launch(
        parameter, (-(-groups // _THREADS),), (_THREADS,),
        (*arrays, parameter.size, shift, float(learning_rate), float(correction1), float(correction2),
         0 if schedule is None else xp.ascontiguousarray(schedule), scale, scale_at, float(beta1), 1.0 - float(beta1),
         float(beta2), 1.0 - float(beta2), float(eps), float(weight_decay)),
    )  # fmt: skip


def norm(arrays: Sequence[Array]) -> Array:
    """sqrt(Σ x²) over all arrays: an array of shape (), float64."""
    parts = [min(-(-array.size // _PART), _MOST_PARTS) for array in arrays]
    partials = scratch(arrays[0], (sum(parts),), FLOAT64, "sums of squares")
    start = 0
    for array, count in zip(arrays, parts, strict=True):
        flat = contiguous(array)
        _norm_kernel("sums_of_squares", array.dtype).launch(
            flat, (count,), (_THREADS,), (flat, flat.size, _shift(flat), partials[start : start + count])
        )
        start += count
    result = empty((), FLOAT64, arrays[0])
    _norm_kernel("root_of_sum", FLOAT32).launch(result, (1,), (1024,), (partials, len(partials), result))
    return result


def _shift(array: Array) -> int:
    """How many elements behind a multiple of 16 bytes an array begins."""
    return address(array) % 16 // array.itemsize


@functools.cache
def _norm_kernel(name: str, dtype: DType) -> Kernel:
    return Kernel(_NORM_SOURCE, name, {"TTR_T": CXX_TYPES[dtype]})


INSTANTIATIONS = [
    _ADAMW,
    *(_norm_kernel("sums_of_squares", dtype) for dtype in (FLOAT32, BFLOAT16, FLOAT16)),
    _norm_kernel("root_of_sum", FLOAT32),
]

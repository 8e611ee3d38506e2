"""AdamW with decoupled weight decay (Loshchilov & Hutter 2019, alg. 2), the gradient norm, and its clipping.

m ← β₁ m + (1 − β₁) g        v ← β₂ v + (1 − β₂) g²
θ ← θ − lr · ( m/(1 − β₁ᵗ) / (sqrt(v/(1 − β₂ᵗ)) + eps) + weight_decay · θ )
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..common.arrays import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    Array,
    array_module,
    check,
    check_same_dtype,
    implementation,
    is_array,
    on_gpu,
    takes_cuda_arrays,
)


@takes_cuda_arrays
def adamw(
    parameter: Array,
    gradient: Array,
    first_moment: Array,
    second_moment: Array,
    *,
    learning_rate: float,
    step: int,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    gradient_scale: Any = 1.0,
    schedule: Array | None = None,
) -> None:
    """One update, in place, in one pass over memory.

    Args:
        parameter, first_moment, second_moment: float32 (float64 runs the reference), contiguous, of one shape; changed.
        gradient: the same shape; multiplied by `gradient_scale` (clipping, or one over a number of micro-batches),
            which on a GPU may be an array of one number there, so that nobody waits for it. NaN changes nothing: what
            is to be skipped can so be decided on the device.
        step: number of this update, from 1 (bias correction).
        schedule: on a GPU, what `adamw_schedule` returns, copied there: used in place of learning_rate and step, so
            that a captured CUDA graph can be replayed at another step.

    Raises:
        TypeError, ValueError: an array of the wrong kind, shape, dtype or layout, or step < 1.
    """
    arrays = {
        "parameter": parameter, "gradient": gradient, "first_moment": first_moment, "second_moment": second_moment
    }  # fmt: skip
    check(**{name: (array, "...", [FLOAT32, FLOAT64]) for name, array in arrays.items()})
    check_same_dtype(**arrays)
    for name, array in arrays.items():
        if array.shape != parameter.shape:
            raise ValueError(f"{name}: got shape {array.shape}, expected {parameter.shape} like parameter")
        if not array.flags.c_contiguous:
            raise ValueError(f"{name}: got a strided array, expected a C-contiguous one (it is changed in place)")
        if array is not gradient and isinstance(array, np.ndarray) and not array.flags.writeable:
            raise ValueError(f"{name}: got a read-only array, expected one that can be written")
    if step < 1:
        raise ValueError(f"step: got {step}, expected at least 1")
    if not is_array(gradient_scale) and math.isnan(gradient_scale):
        return
    flat = [array.reshape(-1) for array in arrays.values()]
    module = implementation(parameter, __package__)
    rest = learning_rate, beta1, beta2, eps, weight_decay, gradient_scale, 1.0 - beta1**step, 1.0 - beta2**step
    if on_gpu(parameter):
        check(parameter=(parameter, "..."), schedule=(schedule, "3", [FLOAT32]))
        module.update(*flat, *rest, schedule)
    elif schedule is not None:
        raise ValueError("schedule: got an array, expected None on the CPU")
    else:
        module.update(*flat, *rest)


def adamw_schedule(learning_rate: float, step: int, *, beta1: float = 0.9, beta2: float = 0.999) -> Array:
    """(learning rate, 1 − β₁ᵗ, 1 − β₂ᵗ) as float32, in NumPy: the `schedule` of `adamw` at this step."""
    return np.array([learning_rate, 1.0 - beta1**step, 1.0 - beta2**step], np.float32)


@takes_cuda_arrays
def global_norm(arrays: Sequence[Array]) -> Any:
    """sqrt(Σ x²) over all arrays, summed in float64 in a fixed order (the same bits on any number of threads).

    NaN and infinity come through, so a step can look at this one number: a float, or on a GPU a CuPy array of shape (),
    float64, which has not been waited for.
    """
    if arrays and is_array(arrays[0]) and on_gpu(arrays[0]):
        dtypes = FLOAT32, BFLOAT16, FLOAT16
        check(**{f"arrays[{index}]": (array, "...", dtypes) for index, array in enumerate(arrays)})
        return implementation(arrays[0], __package__).norm(arrays)
    total = 0.0
    for index, array in enumerate(arrays):
        check(**{f"arrays[{index}]": (array, "...")})
        total += implementation(array, __package__).sum_of_squares(array)
    return math.sqrt(total)


def clip_scale(norm: Any, max_norm: float) -> Any:
    """min(1, max_norm / norm): the factor that brings gradients of this norm to `max_norm` (Pascanu et al. 2013).

    A float, or for the norm of arrays on a GPU an array of shape () there.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm: got {max_norm}, expected a positive number")
    if is_array(norm):
        xp = array_module(norm)
        return xp.fmin(1.0, max_norm / xp.maximum(norm, np.finfo(np.float64).tiny))
    return min(1.0, max_norm / norm) if norm > 0 else 1.0

"""AdamW with decoupled weight decay (Loshchilov & Hutter 2019, alg. 2), the gradient norm, and its clipping.

m ← β₁ m + (1 − β₁) g        v ← β₂ v + (1 − β₂) g²
θ ← θ − lr · ( m/(1 − β₁ᵗ) / (sqrt(v/(1 − β₂ᵗ)) + eps) + weight_decay · θ )
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..common.arrays import FLOAT32, FLOAT64, Array, check, check_same_dtype, implementation


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
    gradient_scale: float = 1.0,
) -> None:
    """One update, in place, in one pass over memory.

    Args:
        parameter, first_moment, second_moment: float32 (float64 runs the reference), contiguous, of one shape; changed.
        gradient: the same shape; multiplied by `gradient_scale` (clipping, or one over a number of micro-batches).
        step: number of this update, from 1 (bias correction).

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
        if array is not gradient and not array.flags.writeable:
            raise ValueError(f"{name}: got a read-only array, expected one that can be written")
    if step < 1:
        raise ValueError(f"step: got {step}, expected at least 1")
    implementation(parameter, __package__).update(
        *(array.reshape(-1) for array in arrays.values()), learning_rate, beta1, beta2, eps, weight_decay,
        gradient_scale, 1.0 - beta1**step, 1.0 - beta2**step,
    )  # fmt: skip


def global_norm(arrays: Sequence[Array]) -> float:
    """sqrt(Σ x²) over all arrays, summed in float64 in a fixed order (the same bits on any number of threads).

    NaN and infinity come through, so a step can look at this one number.
    """
    total = 0.0
    for index, array in enumerate(arrays):
        check(**{f"arrays[{index}]": (array, "...")})
        total += implementation(array, __package__).sum_of_squares(array)
    return math.sqrt(total)


def clip_scale(norm: float, max_norm: float) -> float:
    """min(1, max_norm / norm): the factor that brings gradients of this norm to `max_norm` (Pascanu et al. 2013)."""
    if not max_norm > 0:
        raise ValueError(f"max_norm: got {max_norm}, expected a positive number")
    return min(1.0, max_norm / norm) if norm > 0 else 1.0

"""AdamW in float64, as algorithm 2 stands in the paper (with its schedule multiplier in the learning rate)."""

from __future__ import annotations

import numpy as np

from ..common.arrays import Array


def update(
    parameter: Array, gradient: Array, first: Array, second: Array, learning_rate: float, beta1: float, beta2: float,
    eps: float, weight_decay: float, gradient_scale: float, correction1: float, correction2: float,
) -> None:  # fmt: skip
    g = gradient * gradient_scale
    first[...] = beta1 * first + (1 - beta1) * g
    second[...] = beta2 * second + (1 - beta2) * g * g
    step = (first / correction1) / (np.sqrt(second / correction2) + eps)
    parameter[...] = parameter - learning_rate * (step + weight_decay * parameter)


def sum_of_squares(array: Array) -> float:
    return float(np.vdot(array, array))

"""AdamW and the gradient norm on CPU cores: each one pass, bound by memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..common.arrays import FLOAT64, Array, kernel_view, zeros
from ..common.parallel import parallel_for
from ..common.ranges import jit_ranges
from ..common.storage import load

_GRAIN = 65536
# Elements per partial sum of squares: fixed, so that the result does not depend on the number of threads.
_BLOCK = 4096


def update(
    parameter: Array, gradient: Array, first: Array, second: Array, learning_rate: float, beta1: float, beta2: float,
    eps: float, weight_decay: float, gradient_scale: float, correction1: float, correction2: float,
) -> None:  # fmt: skip
    f = np.float32
    parallel_for(
        _update, parameter.size, parameter, gradient, first, second, f(learning_rate / correction1), f(beta1),
        f(1.0 - beta1), f(beta2), f(1.0 - beta2), f(eps), f(1.0 - learning_rate * weight_decay), f(gradient_scale),
        f(1.0 / np.sqrt(correction2)), grain=_GRAIN,
    )  # fmt: skip


def sum_of_squares(array: Array) -> float:
    flat = kernel_view(array).reshape(-1)
    sums = zeros(-(-flat.size // _BLOCK), FLOAT64)
    parallel_for(_squares, len(sums), flat, sums, grain=16)
    return float(sums.sum())


@jit_ranges
def _update(
    parameter: Any, gradient: Any, first: Any, second: Any, rate: Any, beta1: Any, rest1: Any, beta2: Any, rest2: Any,
    eps: Any, keep: Any, scale: Any, root: Any, begin: int, end: int,
) -> None:  # fmt: skip
    for i in range(begin, end):
        e = np.uintp(i)
        g = gradient[e] * scale
        m = beta1 * first[e] + rest1 * g
        v = beta2 * second[e] + rest2 * g * g
        first[e] = m
        second[e] = v
        parameter[e] = keep * parameter[e] - rate * m / (np.sqrt(v) * root + eps)


@jit_ranges
def _squares(x: Any, sums: Any, begin: int, end: int) -> None:
    for block in range(begin, end):
        total = 0.0
        for i in range(block * _BLOCK, min((block + 1) * _BLOCK, x.shape[0])):
            value = np.float64(load(x, i))
            total += value * value
        sums[block] = total

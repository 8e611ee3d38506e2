"""Sums over rows (gradients of weights and biases) whose result does not depend on the number of threads."""

from __future__ import annotations

from typing import Any

from .arrays import FLOAT32, Array, contiguous, contiguous_rows, zeros
from .compilation import jit
from .parallel import parallel_for
from .ranges import jit_ranges
from .storage import load

# Each partial sum covers a fixed number of rows and is added in a fixed order.
ROWS_PER_PARTIAL = 64


def partial_sums(rows: int, width: int) -> Array:
    """Zeroed float32 partial sums, one row per ROWS_PER_PARTIAL rows: (parts, width)."""
    return zeros((-(-rows // ROWS_PER_PARTIAL), width), FLOAT32)


def add_partials(partials: Array, total: Array) -> None:
    """total += Σ partials, in order. `total` is any array of `width` float32 elements."""
    sums = contiguous(total)
    _add(partials, sums.reshape(-1))
    if sums is not total:
        total[...] = sums


def add_column_sums(array: Array, total: Array) -> None:
    """total += Σ_rows array: the gradient of a bias. array (..., C), total (C,) float32."""
    flat, rows, stride = contiguous_rows(array)
    partials = partial_sums(rows, array.shape[-1])
    parallel_for(_column_sums, len(partials), flat, rows, stride, partials)
    add_partials(partials, total)


@jit
def _add(partials: Any, total: Any) -> None:
    for part in range(partials.shape[0]):
        for j in range(total.shape[0]):
            total[j] += partials[part, j]


@jit_ranges
def _column_sums(flat: Any, rows: int, stride: int, partials: Any, begin: int, end: int) -> None:
    for part in range(begin, end):
        total = partials[part]
        for row in range(part * ROWS_PER_PARTIAL, min((part + 1) * ROWS_PER_PARTIAL, rows)):
            for j in range(total.shape[0]):
                total[j] += load(flat, row * stride + j)

"""Embedding on CPU cores. The scatter-add splits the columns among threads: every thread adds all rows, in order, so
nothing is sorted, nothing collides, and one frequent index does not keep one thread busy while others wait."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.arrays import INT64, Array, contiguous, contiguous_rows, result_rows
from ..common.compilation import jit
from ..common.parallel import parallel_for
from ..common.storage import load, store

if TYPE_CHECKING:
    from . import EmbeddingSaved


def forward(indices: Array, table: Array, out: Array) -> None:
    flat, _, stride = contiguous_rows(table)
    y, rows, y_stride = result_rows("out", out)
    width = table.shape[1]
    parallel_for(_gather, rows, _flat(indices), flat, stride, y, y_stride, width, grain=max(1, 32768 // max(width, 1)))


def backward(dy: Array, saved: EmbeddingSaved, dtable: Array) -> None:
    g, rows, stride = contiguous_rows(dy)
    table, _, table_stride = result_rows("dtable", dtable)
    # Whole cache lines of 16 floats per thread.
    lines = -(-dy.shape[-1] // 16)
    parallel_for(
        _scatter_add, lines, _flat(saved.indices), g, rows, stride, table, table_stride, dy.shape[-1],
        grain=max(1, 2048 // max(rows, 1)),
    )  # fmt: skip


def _flat(indices: Array) -> Array:
    return contiguous(indices, INT64).reshape(-1)


@jit
def _gather(indices: Any, table: Any, stride: int, y: Any, y_stride: int, width: int, begin: int, end: int) -> None:
    for row in range(begin, end):
        at = indices[row] * stride
        for j in range(width):
            store(y, row * y_stride + j, load(table, at + j))


@jit
def _scatter_add(
    indices: Any, dy: Any, rows: int, stride: int, table: Any, table_stride: int, width: int, begin: int, end: int
) -> None:
    first, last = 16 * begin, min(16 * end, width)
    for row in range(rows):
        at = indices[row] * table_stride
        for j in range(first, last):
            table[np.uintp(at + j)] += load(dy, row * stride + j)

"""Embedding on CPU cores. The scatter-add splits the columns among threads: every thread adds all rows, in order, so
nothing is sorted, nothing collides, and one frequent index does not keep one thread busy while others wait."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.arrays import INT64, Array, contiguous, contiguous_rows, result_rows
from ..common.parallel import parallel_for
from ..common.ranges import jit_ranges
from ..common.storage import load, store
from ..common.vectors import fetch, fetch_to_write

if TYPE_CHECKING:
    from . import EmbeddingSaved

# Floats in a cache line.
_LINE = 16
# Rows that are fetched before their turn: no processor guesses where the next one is.
_AHEAD = 4


def forward(indices: Array, table: Array, out: Array) -> None:
    flat, _, stride = contiguous_rows(table)
    y, rows, y_stride = result_rows("out", out)
    width = table.shape[1]
    parallel_for(_gather, rows, _flat(indices), flat, stride, y, y_stride, width, grain=max(1, 32768 // max(width, 1)))


def backward(dy: Array, saved: EmbeddingSaved, dtable: Array) -> None:
    g, rows, stride = contiguous_rows(dy)
    table, _, table_stride = result_rows("dtable", dtable)
    # Whole cache lines per thread.
    lines = -(-dy.shape[-1] // _LINE)
    parallel_for(
        _scatter_add, lines, _flat(saved.indices), g, rows, stride, table, table_stride, dy.shape[-1],
        grain=max(1, 2048 // max(rows, 1)),
    )  # fmt: skip


def _flat(indices: Array) -> Array:
    return contiguous(indices, INT64).reshape(-1)


@jit_ranges
def _gather(indices: Any, table: Any, stride: int, y: Any, y_stride: int, width: int, begin: int, end: int) -> None:
    whole = width // _LINE * _LINE
    for row in range(begin, end):
        at, to = indices[row] * stride, row * y_stride
        later = indices[min(row + _AHEAD, end - 1)] * stride
        # Loops of a length that the compiler knows: of one over all columns it makes a call of memcpy.
        for first in range(0, whole, _LINE):
            fetch(table, later + first)
            for j in range(_LINE):
                store(y, to + first + j, load(table, at + first + j))
        for j in range(whole, width):
            store(y, to + j, load(table, at + j))


@jit_ranges
def _scatter_add(
    indices: Any, dy: Any, rows: int, stride: int, table: Any, table_stride: int, width: int, begin: int, end: int
) -> None:
    first, last = _LINE * begin, min(_LINE * end, width)
    for row in range(rows):
        at, later = indices[row] * table_stride, min(row + _AHEAD, rows - 1)
        for j in range(first, last, _LINE):
            fetch_to_write(table, indices[later] * table_stride + j)
            fetch(dy, later * stride + j)
        for j in range(first, last):
            table[np.uintp(at + j)] += load(dy, row * stride + j)

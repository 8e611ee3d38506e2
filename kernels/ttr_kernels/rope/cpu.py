"""Rotary embedding on CPU cores: one pass, in place or not."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..common.arrays import Array, contiguous_rows, kernel_view, result_rows
from ..common.parallel import parallel_for
from ..common.ranges import jit_ranges
from ..common.storage import load, store

# Pairs that are turned by a loop of a length that the compiler knows: a head has too few for its loops of several
# vectors.
_PAIRS = 16


def rotate(x: Array, cos: Array, sin: Array, interleaved: bool, backwards: bool, out: Array) -> None:
    flat, rows, stride = contiguous_rows(x, inner=2)
    y, _, y_stride = (flat, rows, stride) if out is x else result_rows("out", out, inner=2)
    heads, dim = out.shape[-2:]
    sign = np.float32(-1.0 if backwards else 1.0)
    grain = max(1, 16384 // max(heads * dim, 1))
    c, s = (kernel_view(table.astype(np.float32, copy=False)).reshape(-1) for table in (cos, sin))
    rest = heads, dim, c, s, *cos.shape, sign
    if interleaved:
        parallel_for(_rotate_interleaved, rows, flat, stride, y, y_stride, *rest, grain=grain)
    else:
        # The upper halves as arrays of their own, which kernels may take for ones that do not overlap: nothing is read
        # or written through both.
        half = cos.shape[1]
        parallel_for(_rotate_halves, rows, flat, flat[half:], stride, y, y[half:], y_stride, *rest, grain=grain)


@jit_ranges
def _rotate_halves(
    x: Any, upper_x: Any, stride: int, y: Any, upper_y: Any, y_stride: int, heads: int, dim: int, cos: Any, sin: Any,
    table_rows: int, half: int, sign: Any, begin: int, end: int,
) -> None:  # fmt: skip
    whole = half // _PAIRS * _PAIRS
    for row in range(begin, end):
        turn = row % table_rows * half
        for head in range(heads):
            at, to = row * stride + head * dim, row * y_stride + head * dim
            for first in range(0, whole, _PAIRS):
                for pair in range(_PAIRS):
                    j = first + pair
                    a, b = load(x, at + j), load(upper_x, at + j)
                    c, s = load(cos, turn + j), sign * load(sin, turn + j)
                    store(y, to + j, a * c - b * s)
                    store(upper_y, to + j, a * s + b * c)
            for j in range(whole, half):
                a, b = load(x, at + j), load(upper_x, at + j)
                c, s = load(cos, turn + j), sign * load(sin, turn + j)
                store(y, to + j, a * c - b * s)
                store(upper_y, to + j, a * s + b * c)
            for j in range(2 * half, dim):
                store(y, to + j, load(x, at + j))


@jit_ranges
def _rotate_interleaved(
    x: Any, stride: int, y: Any, y_stride: int, heads: int, dim: int, cos: Any, sin: Any, table_rows: int, half: int,
    sign: Any, begin: int, end: int,
) -> None:  # fmt: skip
    whole = half // _PAIRS * _PAIRS
    for row in range(begin, end):
        turn = row % table_rows * half
        for head in range(heads):
            at, to = row * stride + head * dim, row * y_stride + head * dim
            for first in range(0, whole, _PAIRS):
                for pair in range(_PAIRS):
                    j = first + pair
                    a, b = load(x, at + 2 * j), load(x, at + 2 * j + 1)
                    c, s = load(cos, turn + j), sign * load(sin, turn + j)
                    store(y, to + 2 * j, a * c - b * s)
                    store(y, to + 2 * j + 1, a * s + b * c)
            for j in range(whole, half):
                a, b = load(x, at + 2 * j), load(x, at + 2 * j + 1)
                c, s = load(cos, turn + j), sign * load(sin, turn + j)
                store(y, to + 2 * j, a * c - b * s)
                store(y, to + 2 * j + 1, a * s + b * c)
            for j in range(2 * half, dim):
                store(y, to + j, load(x, at + j))

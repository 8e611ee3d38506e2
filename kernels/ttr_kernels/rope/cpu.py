"""Rotary embedding on CPU cores, in place: a kernel that sees one array vectorises, one that sees two does not when
they are the same (the compiler's check for overlap fails)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..common.arrays import Array, kernel_view, result_rows
from ..common.compilation import jit
from ..common.parallel import parallel_for
from ..common.storage import load, store


def rotate(x: Array, cos: Array, sin: Array, interleaved: bool, backwards: bool, out: Array) -> None:
    if out.ctypes.data != x.ctypes.data or out.strides != x.strides:
        out[...] = x
    flat, rows, stride = result_rows("out", out, inner=2)
    heads, dim = out.shape[-2:]
    sign = np.float32(-1.0 if backwards else 1.0)
    kernel = _rotate_interleaved if interleaved else _rotate_halves
    grain = max(1, 16384 // max(heads * dim, 1))
    parallel_for(
        kernel, rows, flat, stride, heads, dim, kernel_view(cos.astype(np.float32, copy=False)),
        kernel_view(sin.astype(np.float32, copy=False)), sign, grain=grain,
    )  # fmt: skip


@jit
def _rotate_halves(
    x: Any, stride: int, heads: int, dim: int, cos: Any, sin: Any, sign: Any, begin: int, end: int
) -> None:
    half = cos.shape[1]
    for row in range(begin, end):
        c, s = cos[row % cos.shape[0]], sin[row % cos.shape[0]]
        for head in range(heads):
            at = row * stride + head * dim
            for j in range(half):
                a, b = load(x, at + j), load(x, at + half + j)
                turn = sign * s[j]
                store(x, at + j, a * c[j] - b * turn)
                store(x, at + half + j, a * turn + b * c[j])


@jit
def _rotate_interleaved(
    x: Any, stride: int, heads: int, dim: int, cos: Any, sin: Any, sign: Any, begin: int, end: int
) -> None:
    half = cos.shape[1]
    for row in range(begin, end):
        c, s = cos[row % cos.shape[0]], sin[row % cos.shape[0]]
        for head in range(heads):
            at = row * stride + head * dim
            for j in range(half):
                a, b = load(x, at + 2 * j), load(x, at + 2 * j + 1)
                turn = sign * s[j]
                store(x, at + 2 * j, a * c[j] - b * turn)
                store(x, at + 2 * j + 1, a * turn + b * c[j])

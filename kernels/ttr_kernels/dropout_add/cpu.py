"""Dropout and residual addition on CPU cores, in blocks: draw the random words, then apply them.

The values of a block are kept in the kernel's own memory before any is written, so that a result may take the place of
an input: see rms_norm/cpu.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..common.arrays import Array, kernel_view
from ..common.compilation import jit
from ..common.compiled_philox import philox
from ..common.parallel import parallel_for
from ..common.philox import keep_threshold, key_and_offset
from ..common.storage import load, store

# Philox calls per block; four elements each.
_CALLS = 64
_ZERO = np.float32(0.0)
_LOW = np.uint64(0xFFFFFFFF)


def apply(x: Array, residual: Array | None, rate: float, seed: int, offset: int, out: Array) -> None:
    if out.flags.c_contiguous:
        result = kernel_view(out).reshape(-1)
    else:
        result = kernel_view(np.empty(out.shape, out.dtype)).reshape(-1)
    flat = kernel_view(x).reshape(-1)
    other = flat if residual is None else kernel_view(residual).reshape(-1)
    if rate == 0.0:
        blocks = -(-flat.size // (4 * _CALLS))
        parallel_for(_add, blocks, flat, other, residual is not None, result, grain=128)
    else:
        parallel_for(
            _drop, -(-flat.size // (4 * _CALLS)),
            flat, other, residual is not None, result, key_and_offset(seed, offset), keep_threshold(rate),
            np.float32(1.0 / (1.0 - rate)), grain=64,
        )  # fmt: skip
    if not out.flags.c_contiguous:
        out[...] = result.view(out.dtype).reshape(out.shape)


@jit
def _add(x: Any, residual: Any, has_residual: bool, y: Any, begin: int, end: int) -> None:
    values = np.empty(4 * _CALLS, np.float32)
    for block in range(begin, end):
        first = block * 4 * _CALLS
        count = min(4 * _CALLS, x.shape[0] - first)
        for e in range(count):
            value = load(x, first + e)
            if has_residual:
                value += load(residual, first + e)
            values[np.uintp(e)] = value
        for e in range(count):
            store(y, first + e, values[np.uintp(e)])


@jit
def _drop(
    x: Any, residual: Any, has_residual: bool, y: Any, key: Any, threshold: Any, scale: Any, begin: int, end: int
) -> None:
    words = np.empty((4, _CALLS), np.uint32)
    factors, values = np.empty(4 * _CALLS, np.float32), np.empty(4 * _CALLS, np.float32)
    for block in range(begin, end):
        for c in range(_CALLS):
            position = np.uint64(block * _CALLS + c)
            w0, w1, w2, w3 = philox(
                np.uint32(position & _LOW), np.uint32(position >> np.uint64(32)), key[2], key[3], key[0], key[1]
            )
            words[0, c] = w0
            words[1, c] = w1
            words[2, c] = w2
            words[3, c] = w3
        for c in range(_CALLS):
            for w in range(4):
                factors[np.uintp(4 * c + w)] = scale if words[w, np.uintp(c)] >= threshold else _ZERO
        first = block * 4 * _CALLS
        count = min(4 * _CALLS, x.shape[0] - first)
        for e in range(count):
            factor = factors[np.uintp(e)]
            # A dropped infinity or NaN is dropped, not multiplied by zero.
            value = load(x, first + e) * factor if factor > _ZERO else _ZERO
            if has_residual:
                value += load(residual, first + e)
            values[np.uintp(e)] = value
        for e in range(count):
            store(y, first + e, values[np.uintp(e)])

"""Dropout and residual addition on CPU cores, in blocks: draw the random words, then apply them.

The values of a block are kept in the kernel's own memory before any is written, so that a result may take the place of
an input: see rms_norm/cpu.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..common.arrays import Array, empty, kernel_view
from ..common.compiled_philox import factor_bits, kept_pairs
from ..common.parallel import parallel_for
from ..common.philox import keep_threshold, key_and_offset
from ..common.ranges import jit_ranges
from ..common.storage import load, store

# Philox calls per block; four elements each.
_CALLS = 64
_ZERO = np.float32(0.0)
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


def apply(x: Array, residual: Array | None, rate: float, seed: int, offset: int, first: int, out: Array) -> None:
    if out.flags.c_contiguous:
        result = kernel_view(out).reshape(-1)
    else:
        result = kernel_view(empty(out.shape, out.dtype)).reshape(-1)
    flat = kernel_view(x).reshape(-1)
    other = flat if residual is None else kernel_view(residual).reshape(-1)
    if rate == 0.0:
        blocks = -(-flat.size // (4 * _CALLS))
        parallel_for(_add, blocks, flat, other, residual is not None, result, grain=128)
    else:
        parallel_for(
            _drop, -(-(flat.size + first % 4) // (4 * _CALLS)),
            flat, other, residual is not None, result, first, key_and_offset(seed, offset),
            np.uint64(keep_threshold(rate)), factor_bits(1.0 / (1.0 - rate)), grain=64,
        )  # fmt: skip
    if not out.flags.c_contiguous:
        out[...] = result.view(out.dtype).reshape(out.shape)


@jit_ranges
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


@jit_ranges
def _drop(
    x: Any, residual: Any, has_residual: bool, y: Any, mask_first: int, key: Any, threshold: Any, scale_bits: Any,
    begin: int, end: int,
) -> None:  # fmt: skip
    """x[0] is element `mask_first` of the mask; blocks begin with the call of Philox that decides on it."""
    k0, k1, low, high = key[0], key[1], key[2], key[3]
    factors, values = np.empty(4 * _CALLS, np.float32), np.empty(4 * _CALLS, np.float32)
    pairs = factors.view(np.uint64)
    for block in range(begin, end):
        call = np.uint64(mask_first // 4 + block * _CALLS)
        for c in range(np.uintp(_CALLS)):
            position = call + np.uint64(c)
            earlier, later = kept_pairs(
                position & _LOW, position >> _SHIFT, low, high, k0, k1, threshold, scale_bits
            )  # fmt: skip
            pairs[np.uintp(2) * c] = earlier
            pairs[np.uintp(2) * c + np.uintp(1)] = later
        first = block * 4 * _CALLS - mask_first % 4
        count = min(4 * _CALLS, x.shape[0] - first)
        for e in range(max(0, -first), count):
            factor = factors[np.uintp(e)]
            # A dropped infinity or NaN is dropped, not multiplied by zero.
            value = load(x, first + e) * factor if factor > _ZERO else _ZERO
            if has_residual:
                value += load(residual, first + e)
            values[np.uintp(e)] = value
        for e in range(max(0, -first), count):
            store(y, first + e, values[np.uintp(e)])

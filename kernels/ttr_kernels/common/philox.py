"""Philox4x32-10, the counter-based generator of dropout masks and samples.

Source: Salmon et al. 2011, *Parallel random numbers: as easy as 1, 2, 3*, SC'11.

A mask is a pure function of (seed, offset, position): nothing is stored, the backward draws the same bits again, and a
GPU draws them too. The key is the 64-bit seed; the counter is (position low, position high, offset low, offset high),
and each call gives four 32-bit words. The same for compiled code: compiled_philox.py.
"""

from __future__ import annotations

import functools
import operator

import numpy as np

from .arrays import Array, check, on_gpu

MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox_words(groups: Array, seed: int, offset: int) -> Array:
    """The four words of each 64-bit position, in NumPy: (..., 4) uint32. The oracle of every mask."""
    position = np.asarray(groups, np.uint64)
    k0, k1, offset_low, offset_high = key_and_offset(seed, offset).astype(np.uint64)
    c0, c1 = position & _LOW, position >> _SHIFT
    c2, c3 = np.full_like(position, offset_low), np.full_like(position, offset_high)
    for _ in range(10):
        p0, p1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + np.uint64(WEYL[0])) & _LOW, (k1 + np.uint64(WEYL[1])) & _LOW
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def key_and_offset(seed: int, offset: int, *further: int) -> Array:
    """(key low, key high, offset low, offset high) as uint32, the form in which kernels take them; then the lower words
    of further numbers."""
    key, at, low = operator.index(seed), operator.index(offset), 0xFFFFFFFF
    words = [key & low, key >> 32 & low, at & low, at >> 32 & low]
    return np.array(words + [number & low for number in further], np.uint32)


@functools.cache
def keep_threshold(rate: float) -> np.uint32:
    """An element is dropped iff its word is below this: the probability `rate` in steps of 2^-32."""
    return np.uint32(min(round(rate * 2**32), 2**32 - 1))


def check_rate(name: str, rate: float) -> None:
    """Raise ValueError unless 0 <= rate < 1."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"{name}: got {rate}, expected a probability in [0, 1)")


def check_first_row(first_row: int) -> None:
    """Raise ValueError unless 0 <= first_row."""
    if first_row < 0:
        raise ValueError(f"first_row: got {first_row}, expected the number of a row, from 0")


def check_offset_at(offset_at: Array | None, like: Array) -> None:
    """Raise ValueError or TypeError unless it is None, or on a GPU an array of one uint64 there."""
    if offset_at is None:
        return
    if not on_gpu(like):
        raise ValueError("offset_at: got an array, expected None on the CPU")
    check(like=(like, "..."), offset_at=(offset_at, "...", [np.dtype(np.uint64)]))
    if offset_at.size != 1:
        raise ValueError(f"offset_at: got shape {offset_at.shape}, expected one number")

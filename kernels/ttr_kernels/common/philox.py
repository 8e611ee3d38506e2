"""Philox4x32-10, the counter-based generator of dropout masks and samples.

Source: Salmon et al. 2011, *Parallel random numbers: as easy as 1, 2, 3*, SC'11.

A mask is a pure function of (seed, offset, position): nothing is stored, the backward draws the same bits again, and a
GPU draws them too. The key is the 64-bit seed; the counter is (position low, position high, offset low, offset high),
and each call gives four 32-bit words.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .arrays import Array
from .compilation import jit

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_M0, _M1 = _MULTIPLIERS
_W0, _W1 = _WEYL


@jit
def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """Four uint32 words for a counter of four uint32 and a key of two (compiled code)."""
    for _ in range(10):
        p0 = _M0 * np.uint64(c0)
        p1 = _M1 * np.uint64(c2)
        n0 = np.uint32(p1 >> _SHIFT) ^ c1 ^ k0
        n2 = np.uint32(p0 >> _SHIFT) ^ c3 ^ k1
        c1 = np.uint32(p1)
        c3 = np.uint32(p0)
        c0 = n0
        c2 = n2
        k0 = np.uint32(k0 + _W0)
        k1 = np.uint32(k1 + _W1)
    return c0, c1, c2, c3


def philox_words(groups: Array, seed: int, offset: int) -> Array:
    """The four words of each 64-bit position, in NumPy: (..., 4) uint32. The oracle of every mask."""
    position = np.asarray(groups, np.uint64)
    c0, c1 = position & _LOW, position >> _SHIFT
    c2 = np.full_like(position, offset & 0xFFFFFFFF)
    c3 = np.full_like(position, (offset >> 32) & 0xFFFFFFFF)
    k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64((seed >> 32) & 0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + np.uint64(_W0)) & _LOW, (k1 + np.uint64(_W1)) & _LOW
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def key_and_offset(seed: int, offset: int) -> Array:
    """(key low, key high, offset low, offset high) as uint32, the form in which kernels take them."""
    words = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, offset & 0xFFFFFFFF, (offset >> 32) & 0xFFFFFFFF]
    return np.array(words, np.uint32)


def keep_threshold(rate: float) -> np.uint32:
    """An element is dropped iff its word is below this: the probability `rate` in steps of 2^-32."""
    return np.uint32(min(round(rate * 2**32), 2**32 - 1))


def check_rate(name: str, rate: float) -> None:
    """Raise ValueError unless 0 <= rate < 1."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"{name}: got {rate}, expected a probability in [0, 1)")

"""Philox4x32-10 inside compiled kernels: see philox.py, which does without numba."""

from __future__ import annotations

from typing import Any

import numpy as np

from .compilation import jit
from .philox import MULTIPLIERS, WEYL

_SHIFT = np.uint64(32)
_M0, _M1 = MULTIPLIERS
_W0, _W1 = WEYL


@jit
def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """Four uint32 words for a counter of four uint32 and a key of two."""
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

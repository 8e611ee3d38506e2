"""Scratch memory that each thread keeps, so that a kernel's working buffers are not allocated and faulted in anew."""

from __future__ import annotations

import threading

import numpy as np

from .arrays import Array
from .parallel import get_threads

_local = threading.local()


def thread_scratch(floats: int, purpose: str = "tile") -> Array:
    """At least `floats` float32 with undefined content, 64-byte aligned, valid until this thread asks for the same
    purpose again."""
    buffer: Array | None = getattr(_local, purpose, None)
    if buffer is None or buffer.size < floats:
        raw = np.empty(floats + 16, np.float32)
        skip = (-raw.ctypes.data % 64) // 4
        buffer = raw[skip : skip + floats]
        setattr(_local, purpose, buffer)
    return buffer


def scratch_of_threads(floats: int, purpose: str = "tile") -> Array:
    """The same for a kernel on all threads: (threads, at least `floats`), a row for each slot (see ranges)."""
    threads, width = get_threads(), -(-floats // 16) * 16
    return thread_scratch(threads * width, purpose)[: threads * width].reshape(threads, width)

"""The process's memory: how much there is, and keeping it from being given back and faulted in again every step."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path


def keep_freed_memory() -> None:
    """Tell glibc's malloc to keep freed blocks instead of returning them to the system.

    A training step allocates the same large arrays again and again; by default each is mapped and zeroed anew by the
    kernel. Where the C library has no `mallopt`, nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block of its own mapping
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        mallopt(-2, 64 << 20)  # M_TOP_PAD


def resident_bytes() -> int:
    """Memory of this process now; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    return 0


def available_bytes() -> int:
    """Memory that the machine can still give; 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0

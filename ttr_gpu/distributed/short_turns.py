"""A thread that mostly sleeps, on a core that another thread keeps busy: asking the scheduler not to let it wait."""

from __future__ import annotations

import ctypes
import os
import platform
import struct

# Numbers of the system call sched_setattr; struct sched_attr has 48 bytes in its first version.
_CALL = {"x86_64": 314, "aarch64": 274, "ppc64le": 355}
_SIZE = 48


def ask_for_short_turns(seconds: float = 1e-4) -> bool:
    """Ask Linux for turns of so many seconds for this thread (0.1 ms at least): it then runs soon after it has woken,
    where it would wait for the end of the other's turn of about 3 ms. Its share of the core stays what it was.

    Returns whether the system took the wish: Linux does, and heeds it from 6.12 on (for EEVDF, sched_setattr(2)).
    """
    number = _CALL.get(platform.machine())
    if number is None or platform.system() != "Linux" or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    nice, nanoseconds = os.getpriority(os.PRIO_PROCESS, 0), int(seconds * 1e9)
    attributes = struct.pack("=IIQiIQQQ", _SIZE, os.SCHED_OTHER, 0, nice, 0, nanoseconds, 0, 0)
    return bool(ctypes.CDLL(None).syscall(number, 0, ctypes.c_char_p(attributes), 0) == 0)

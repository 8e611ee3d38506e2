"""Signals that ask a run to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# Ctrl-C; what Slurm and others send before they kill; what `sbatch --signal=USR1@60` sends ahead of that.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_SAID = b"\nstopping after this step; once more to stop at once, without saving\n"


@contextmanager
def stop_signals(aloud: bool = True) -> Iterator[list[int]]:
    """Collects them for a loop to act on after its step, and says so if `aloud`; a second one stops at once."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        # Written past Python's buffers, which the interrupted code may hold.
        with suppress(OSError):
            os.write(2, _SAID if aloud else b"")

    try:
        before = {number: signal.signal(number, handle) for number in _SIGNALS}
    except ValueError:
        # Only the main thread may set handlers; elsewhere (a notebook's worker) signals stay as they are.
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

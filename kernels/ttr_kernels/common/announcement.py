"""Lines on stderr that say what takes so long: the first run on a machine compiles kernels."""

from __future__ import annotations

import functools
import sys

_silent = False


def leave_to_another() -> None:
    """Say nothing from now on: another process of this machine, which compiles for the same cache, does."""
    global _silent
    _silent = True


@functools.cache
def say_once(text: str) -> None:
    """Print a line, the first time that it is said in this process."""
    if not _silent:
        print(text, file=sys.stderr, flush=True)

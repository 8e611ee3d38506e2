"""CuPy for a test: the real one, or the stand-in on the emulator. Without what it needs it is skipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cupy_stand_in
import emulator
import pytest


def real_cupy() -> Any:
    """CuPy on a GPU, or the test is skipped."""
    module = pytest.importorskip("cupy", reason="CuPy is not installed")
    try:
        devices = module.cuda.runtime.getDeviceCount()
    except module.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"no GPU: {error}")
    if not devices:
        pytest.skip("no GPU")
    return module


@contextmanager
def stand_in() -> Iterator[Any]:
    """The stand-in for CuPy while it lasts, or the test is skipped."""
    if emulator.missing():
        pytest.skip(str(emulator.missing()))
    with cupy_stand_in.installed(emulator.EmulatorExecutor("plain")) as module:
        yield module

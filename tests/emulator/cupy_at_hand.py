"""CuPy where there is a GPU; tests that need one are skipped elsewhere."""

from __future__ import annotations

from typing import Any

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

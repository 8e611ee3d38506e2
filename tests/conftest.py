"""Fixtures for tests of the GPU path: each runs on a stand-in for CuPy, and with `-m gpu` on a GPU."""

import pytest


@pytest.fixture(params=["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def cupy(request):
    """CuPy: the tests' stand-in, whose kernels the emulator runs, or the real one (skipped where there is no GPU)."""
    if request.param == "gpu":
        yield real_cupy()
        return
    import cupy_stand_in
    import emulator

    if emulator.missing():
        pytest.skip(str(emulator.missing()))
    with cupy_stand_in.installed(emulator.EmulatorExecutor("plain")) as module:
        yield module


def real_cupy():
    """CuPy on a GPU, or the test is skipped."""
    module = pytest.importorskip("cupy", reason="CuPy is not installed")
    try:
        devices = module.cuda.runtime.getDeviceCount()
    except module.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"no GPU: {error}")
    if not devices:
        pytest.skip("no GPU")
    return module

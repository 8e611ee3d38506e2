"""Fixtures for tests of the GPU path: each runs on a stand-in for CuPy, and with `-m gpu` on a GPU."""

import pytest


@pytest.fixture(params=["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def cupy(request):
    """CuPy: the tests' stand-in, whose kernels the emulator runs, or the real one (skipped where there is no GPU)."""
    if request.param == "gpu":
        from cupy_at_hand import real_cupy

        yield real_cupy()
        return
    from cupy_at_hand import stand_in

    with stand_in() as module:
        yield module


@pytest.fixture
def gpu(cupy):
    """A GPU as a model's backend."""
    from ttr_gpu.backend import Backend

    return Backend("gpu", cupy, "GPU")

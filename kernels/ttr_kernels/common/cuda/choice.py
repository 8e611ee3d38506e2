"""Which kernels RoPE and GeGLU run on a GPU: CUDA C++, or the same in Python, written with numba.cuda.

    with use_numba_kernels():
        y, saved = rope_forward(x, table)

CUDA C++ is the default: it moves 16 bytes at a time, and starts sooner. The numba.cuda versions (`rope/gpu_numba.py`,
`geglu/gpu_numba.py`) move one element at a time; they are there to be read, changed and compared. They need numba-cuda
(`pip install 'ttr-gpu[gpu]'`), or, without a GPU, numba's simulator (NUMBA_ENABLE_CUDASIM=1, set before numba is
imported).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_numba = False


@contextmanager
def use_numba_kernels(enabled: bool = True) -> Iterator[None]:
    """While it lasts, operations that have a numba.cuda version run it: in every thread, forward and backward alike."""
    global _numba
    before, _numba = _numba, enabled
    try:
        yield
    finally:
        _numba = before


def numba_kernels_chosen() -> bool:
    """Whether `use_numba_kernels` is in force."""
    return _numba

"""Compilation and launch of CUDA kernels, by CuPy on a GPU or by an executor that a test puts in its place.

    forward = Kernel(SOURCE, "rms_norm_forward", {"TTR_T": "float"})
    forward.launch(x, grid=(rows,), block=(128,), arguments=(x, rows, eps, y))

A kernel is a name in a .cu file under some macros; file and macros are compiled together, once, when the first of their
kernels is launched. CuPy keeps what it compiles on disk, by compute capability, version of the compiler, options and
source; a digest of the headers is made part of the source.

Arguments have four kinds: arrays (of which a kernel gets the address), Python ints (`long long`), Python floats
(`float`) and NumPy scalars (their own type).
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .. import arrays
from ..announcement import say_once
from ..arena import outside
from ..arrays import BFLOAT16, FLOAT16, FLOAT32, Array, DType, array_module
from ..cache import cache_root

if TYPE_CHECKING:
    from .gemm import Cublas, Gemm

HEADERS = Path(__file__).resolve().parent
# The C++ name of an element type.
CXX_TYPES = {FLOAT32: "float", BFLOAT16: "__nv_bfloat16", FLOAT16: "__half"}


class Launchable(Protocol):
    """A compiled kernel."""

    def __call__(
        self, grid: Sequence[int], block: Sequence[int], arguments: Sequence[Any], shared_bytes: int = 0, /
    ) -> None: ...


class Executor(Protocol):
    """What runs kernels: `CupyExecutor`, or the tests' emulator."""

    @property
    def array_module(self) -> ModuleType:
        """CuPy or NumPy: where its arrays come from."""

    @property
    def multiprocessors(self) -> int:
        """How many blocks run at once, at least."""

    def function(self, kernel: Kernel) -> Launchable:
        """The kernel, compiled."""

    def multiply(self, gemm: Gemm) -> None:
        """A matrix product."""


class Kernel:
    """An `extern "C" __global__` function of a .cu file, compiled under `-D` macros.

    Attributes:
        source: the .cu file.
        name: of the function.
        defines: macros and their values.
        shared_bytes: of dynamic shared memory, if every launch asks for the same.
    """

    def __init__(self, source: Path, name: str, defines: Mapping[str, int | str], shared_bytes: int = 0) -> None:
        self.source = source
        self.name = name
        self.defines = dict(defines)
        self.shared_bytes = shared_bytes
        self._compiled: tuple[Executor, Launchable] | None = None

    def __repr__(self) -> str:
        macros = " ".join(f"{name}={value}" for name, value in self.defines.items())
        return f"{self.name} [{macros}]"

    @property
    def options(self) -> tuple[str, ...]:
        """What NVRTC is told besides the architecture."""
        macros = (f"-D{name}={value}" for name, value in sorted(self.defines.items()))
        return ("-std=c++17", f"-I{HEADERS}", f"-I{self.source.parent}", *macros)

    def code(self) -> str:
        """The source, beginning with a digest of itself and of the headers beside it and in this folder."""
        return _code(self.source)

    def launch(
        self,
        like: Array,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[Any],
        shared_bytes: int | None = None,
    ) -> None:
        """Start the kernel where the array `like` lives, on the current stream. An empty grid starts nothing."""
        if 0 in grid:
            return
        executor = executor_of(like)
        compiled = self._compiled
        if compiled is None or compiled[0] is not executor:
            compiled = self._compiled = (executor, executor.function(self))
        compiled[1](grid, block, arguments, self.shared_bytes if shared_bytes is None else shared_bytes)


class CupyExecutor:
    """Runs kernels on the current CUDA device and stream."""

    def __init__(self, cupy: ModuleType) -> None:
        self.array_module = cupy
        self._modules: dict[tuple[Path, tuple[str, ...]], Any] = {}

    @functools.cached_property
    def multiprocessors(self) -> int:
        return int(self.array_module.cuda.Device().attributes["MultiProcessorCount"])

    def function(self, kernel: Kernel) -> Launchable:
        key = kernel.source, kernel.options
        if key not in self._modules:
            self._announce(kernel)
            self._modules[key] = self.array_module.RawModule(code=kernel.code(), options=kernel.options)
        function = self._modules[key].get_function(kernel.name)
        asked_for = 48 << 10  # bytes of dynamic shared memory; more than these a kernel must ask for

        def launch(
            grid: Sequence[int], block: Sequence[int], arguments: Sequence[Any], shared_bytes: int = 0, /
        ) -> None:
            nonlocal asked_for
            if shared_bytes > asked_for:
                function.max_dynamic_shared_size_bytes = asked_for = shared_bytes
            # CuPy would pass a Python float as double.
            converted = tuple([np.float32(a) if type(a) is float else a for a in arguments])
            function(tuple(grid), tuple(block), converted, shared_mem=shared_bytes)

        return launch

    def multiply(self, gemm: Gemm) -> None:
        self._cublas.multiply(gemm)

    @functools.cached_property
    def _cublas(self) -> Cublas:
        from .gemm import Cublas

        return Cublas(self.array_module)

    def _announce(self, kernel: Kernel) -> None:
        cupy = self.array_module
        text = repr((kernel.code(), kernel.options, cupy.__version__, cupy.cuda.Device().compute_capability))
        folder = _seen()
        mark = folder and folder / hashlib.sha256(text.encode()).hexdigest()[:32]
        if mark is None or not mark.exists():
            say_once("compiling kernels for this GPU, once, up to half a minute (kept in CuPy's cache) ...")
            if mark is not None and os.access(mark.parent, os.W_OK):
                mark.touch()


def modules_compiled() -> list[Path]:
    """A mark for each module that has been compiled on this machine."""
    folder = _seen()
    return sorted(folder.iterdir()) if folder is not None else []


@functools.cache
def _seen() -> Path | None:
    """A folder with an empty file for each module that has been compiled on this machine."""
    folder = cache_root() / "cuda-seen"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder


@functools.cache
def _code(source: Path) -> str:
    digest = hashlib.sha256()
    for file in [source, *sorted(HEADERS.glob("*.cuh")), *sorted(source.parent.glob("*.cuh"))]:
        digest.update(file.read_bytes())
    return f'// {digest.hexdigest()}\n#line 1 "{source.name}"\n{source.read_text()}'


@functools.cache
def _cupy_executor() -> CupyExecutor:
    # An array of CuPy's is at hand, so it has been imported.
    return CupyExecutor(sys.modules["cupy"])


_in_tests: Executor | None = None


def executor_of(like: Array) -> Executor:
    """What runs kernels on arrays like this one."""
    if isinstance(like, np.ndarray):
        if _in_tests is None:
            raise TypeError("got a NumPy array, expected a CuPy array (GPU kernels run on NumPy arrays only in tests)")
        return _in_tests
    return _cupy_executor()


def multiprocessors(like: Array) -> int:
    """How many multiprocessors the device of this array has."""
    return executor_of(like).multiprocessors


@contextmanager
def use_executor(executor: Executor) -> Iterator[None]:
    """For tests: while it lasts, operations on NumPy arrays run their GPU version on `executor`."""
    global _in_tests
    before = _in_tests, arrays.numpy_version
    _in_tests, arrays.numpy_version = executor, "gpu"
    try:
        yield
    finally:
        _in_tests, arrays.numpy_version = before


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[Any, Array] = {}


_scratch = _Scratch()


def scratch(like: Array, shape: tuple[int, ...], dtype: DType, purpose: str) -> Array:
    """An array beside `like` with undefined content, valid until this thread asks for the same purpose again.

    It is kept, so that a repeated step allocates nothing. Work that one thread gives to several streams must not share
    it: streams do not wait for each other.
    """
    xp = array_module(like)
    key = (purpose, dtype, xp is np or like.device.id)  # type: ignore[attr-defined]
    count = 1
    for size in shape:
        count *= size
    buffer: Array | None = _scratch.buffers.get(key)
    if buffer is None or buffer.size < count:
        with outside():
            buffer = _scratch.buffers[key] = xp.empty(max(count, 1), dtype)
    return buffer[:count].reshape(shape)


def vector_elements(itemsize: int, sizes: Sequence[int], pointers: Sequence[Array]) -> int:
    """How many elements a thread may move at once: 16 bytes' worth if all sizes (widths and strides, in elements) are
    multiples of that and all arrays begin at a multiple of 16 bytes; else one."""
    vector = 16 // itemsize
    for size in sizes:
        if size % vector:
            return 1
    for array in pointers:
        if address(array) % 16:
            return 1
    return vector


def address(array: Array) -> int:
    """Where the first element lies."""
    return array.ctypes.data if isinstance(array, np.ndarray) else int(array.data.ptr)

"""Runs the project's CUDA kernels on the host: an executor for `ttr_kernels.common.cuda.launch`.

`EmulatorExecutor("plain")` computes; `EmulatorExecutor("check")` also watches every access of memory. In both, arrays
are copied to memory between guard zones, and what goes wrong is an `EmulatorFault` that names kernel, thread and line.
`seed` chooses the order in which threads and blocks run (0: in turn) and when asynchronous copies take effect.

What it finds: accesses out of bounds or misaligned, shared memory read before it is written or before its cp.async has
been waited for, accesses by two threads (of a block, or of two blocks) that nothing orders, threads at different
barriers, lanes missing from a warp's operation, deadlocks, endless loops, float atomics, arguments of the wrong type.
What it does not model: bank conflicts, the weak order in which a GPU's writes become visible, its approximate
functions, the order in which mma adds, memory passed from block to block through atomics.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol
from unittest import mock

import host_compiler
import numpy as np

from ttr_kernels.common.cuda import launch
from ttr_kernels.common.cuda.gemm import Gemm

missing = host_compiler.missing
TIME_LIMIT = 60.0  # seconds of CPU time for one launch
_POINTERS = {  # a kernel's type, as cuda_host.h writes it: what an array's dtype may be
    "f": ("float32",), "d": ("float64",), "h": ("float16", "int16", "uint16"), "b": ("bfloat16", "uint16"),
    "c": ("int8",), "C": ("uint8", "bool"), "s": ("int16",), "S": ("uint16", "bfloat16", "float16"),
    "i": ("int32",), "I": ("uint32",), "q": ("int64",), "Q": ("uint64",),
}  # fmt: skip
_SCALARS = {
    "f": ctypes.c_float, "d": ctypes.c_double, "c": ctypes.c_int8, "C": ctypes.c_uint8, "s": ctypes.c_int16,
    "S": ctypes.c_uint16, "i": ctypes.c_int32, "I": ctypes.c_uint32, "q": ctypes.c_int64, "Q": ctypes.c_uint64,
}  # fmt: skip
_LETTERS = {"float32": "f", "float64": "d", "int8": "c", "uint8": "C", "bool": "C", "int16": "s", "uint16": "S",
            "int32": "i", "uint32": "I", "int64": "q", "uint64": "Q"}  # fmt: skip
_one_at_a_time = threading.Lock()  # the runtime's memory and threads are global


class Kernel(Protocol):
    """What is needed of `ttr_kernels.common.cuda.launch.Kernel`."""

    source: Path
    name: str
    defines: dict[str, int | str]


@dataclass(frozen=True)
class Fault:
    kind: str
    message: str
    block: str
    thread: int
    where: str  # "rms_norm.cu:42", or "numeric.cuh:80 < rms_norm.cu:42" inside a function

    def __str__(self) -> str:
        thread = f", thread {self.thread} of block {self.block}" if self.thread >= 0 else ""
        return f"{self.kind}: {self.message} [{self.where or 'no line'}{thread}]"


class EmulatorFault(Exception):
    """A kernel did what it must not do."""

    def __init__(self, kernel: str, grid: Sequence[int], block: Sequence[int], faults: list[Fault]) -> None:
        self.kernel = kernel
        self.faults = faults
        super().__init__(f"{kernel}, grid {tuple(grid)}, block {tuple(block)}\n  " + "\n  ".join(map(str, faults)))


class EmulatorExecutor:
    array_module: ModuleType = np
    multiprocessors = 2

    def __init__(self, mode: str = "plain", seed: int = 0, time_limit: float | None = None) -> None:
        if mode not in host_compiler.FLAGS:
            raise ValueError(f"mode: got {mode!r}, expected one of {', '.join(host_compiler.FLAGS)}")
        if reason := missing():
            raise RuntimeError(reason)
        self.mode = mode
        self.seed = seed
        self.time_limit = TIME_LIMIT if time_limit is None else time_limit
        self.launches = 0
        self.accesses: Counter[int] = Counter()  # of global memory by their bytes, in checked mode

    def function(self, kernel: Kernel) -> Callable[..., None]:
        """`launch(grid, block, arguments, shared_bytes=0)`; raises EmulatorFault."""
        defines = tuple(sorted((key, value) for key, value in kernel.defines.items()))
        library = _load(Path(kernel.source), kernel.name, defines, self.mode)

        def launch(grid: Sequence[int], block: Sequence[int], arguments: Sequence[Any], shared_bytes: int = 0) -> None:
            self.launches += 1
            # Launches of one test should not all follow the same order.
            seed = self.seed and (self.seed * 0x9E3779B97F4A7C15 + self.launches) % 2**64
            with _one_at_a_time:
                faults = library.launch(grid, block, arguments, shared_bytes, seed, self.mode, self.time_limit)
                self.accesses.update(library.accesses())
            if faults:
                raise EmulatorFault(kernel.name, grid, block, faults)

        return launch

    def multiply(self, gemm: Gemm) -> None:
        """What cuBLAS computes, read as cuBLAS reads it."""
        a = _by_columns(gemm.a, gemm.lda, *((gemm.k, gemm.m) if gemm.transpose_a else (gemm.m, gemm.k)))
        b = _by_columns(gemm.b, gemm.ldb, *((gemm.n, gemm.k) if gemm.transpose_b else (gemm.k, gemm.n)))
        c = _by_columns(gemm.c, gemm.ldc, gemm.m, gemm.n)
        a, b = (a.T if gemm.transpose_a else a), (b.T if gemm.transpose_b else b)
        with np.errstate(over="ignore", invalid="ignore"):
            result = a.astype(np.float32) @ b.astype(np.float32)
            c[...] = c + result if gemm.accumulate else result


def _by_columns(array: np.ndarray[Any, Any], leading: int, rows: int, columns: int) -> np.ndarray[Any, Any]:
    """The (rows, columns) matrix that begins where the array does, column j at element j · leading."""
    if leading < rows:
        raise ValueError(f"leading dimension {leading} of a matrix of {rows} rows")
    item = array.itemsize
    return np.lib.stride_tricks.as_strided(array, (rows, columns), (item, leading * item))


class _Library:
    """One kernel of a compiled library."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        library = ctypes.CDLL(str(path))
        runtime = ctypes.CDLL(str(host_compiler.runtime_library()))
        self._run = getattr(library, f"ttr_launch_{name}")
        self._allocate, self._free_all, self._faults = runtime.ttr_allocate, runtime.ttr_free_all, runtime.ttr_faults
        self._allocate.restype = ctypes.c_void_p
        self._faults.restype = ctypes.c_char_p
        self._accesses = runtime.ttr_accesses
        self._accesses.restype = ctypes.c_uint64
        signature = getattr(library, f"ttr_signature_{name}")
        signature.restype = ctypes.c_char_p
        text = signature().decode()
        self.parameters = [text[i : i + 2] for i in range(0, len(text), 2)]

    def accesses(self) -> dict[int, int]:
        """How often the last launch read or wrote 1, 2, 4, 8, 16 bytes of global memory at once."""
        return {size: self._accesses(ctypes.c_size_t(size)) for size in (1, 2, 4, 8, 16)}

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[Any],
        shared_bytes: int,
        seed: int,
        mode: str,
        time_limit: float,
    ) -> list[Fault]:
        sizes = _dimensions(grid, (2**31 - 1, 65535, 65535)), _dimensions(block, (1024, 1024, 64))
        if np.prod(sizes[1]) > 1024 or shared_bytes > 227 << 10:
            raise ValueError(
                f"{self.name}: block {tuple(block)} with {shared_bytes} bytes of shared memory is too large"
            )
        if len(arguments) != len(self.parameters):
            raise TypeError(f"{self.name}: got {len(arguments)} arguments, expected {len(self.parameters)}")
        arrays = {i: argument for i, argument in enumerate(arguments) if isinstance(argument, np.ndarray)}
        regions = _regions(arrays)
        try:
            pointers: dict[int, int] = {}
            for region in regions:
                region.copy = self._allocate(
                    ctypes.c_size_t(region.end - region.begin),
                    ctypes.c_size_t(region.begin % 256),
                    region.name.encode(),
                )
                if not region.copy:
                    raise MemoryError(f"{self.name}: {region.name} do not fit into the emulator's memory")
                ctypes.memmove(region.copy, region.begin, region.end - region.begin)
                for i in region.members:
                    pointers[i] = region.copy + arrays[i].ctypes.data - region.begin
            values = [
                _value(self.name, i, code, argument, pointers.get(i, 0))
                for i, (code, argument) in enumerate(zip(self.parameters, arguments, strict=True))
            ]
            addresses = (ctypes.c_void_p * max(len(values), 1))(*map(ctypes.addressof, values))
            unsigned3 = ctypes.c_uint * 3
            self._run(
                addresses, unsigned3(*sizes[0]), unsigned3(*sizes[1]), ctypes.c_size_t(shared_bytes),
                ctypes.c_uint64(seed), ctypes.c_int(mode == "check"), ctypes.c_double(time_limit),
            )  # fmt: skip
            faults = [_fault(line) for line in self._faults().decode(errors="replace").splitlines()]
            for region in regions:
                size = region.end - region.begin
                if any(arrays[i].flags.writeable for i in region.members):
                    ctypes.memmove(region.begin, region.copy, size)
                elif ctypes.string_at(region.begin, size) != ctypes.string_at(region.copy, size):
                    message = f"the kernel has written to {region.name}, which may only be read"
                    faults.append(Fault("read-only", message, "", -1, ""))
            return faults
        finally:
            self._free_all()


@dataclass
class _Region:
    """Memory of the caller that becomes one allocation, because the arrays in it overlap."""

    begin: int
    end: int
    members: list[int]
    copy: int = 0

    @property
    def name(self) -> str:
        return f"argument{'s' if len(self.members) > 1 else ''} {', '.join(map(str, sorted(self.members)))}"


def _regions(arrays: dict[int, np.ndarray]) -> list[_Region]:
    bounds = sorted((*np.lib.array_utils.byte_bounds(array), i) for i, array in arrays.items() if array.size)
    regions = [_Region(array.ctypes.data, array.ctypes.data, [i]) for i, array in arrays.items() if not array.size]
    last: _Region | None = None
    for begin, end, i in bounds:
        if last and begin < last.end:
            last.end = max(last.end, end)
            last.members.append(i)
        else:
            last = _Region(begin, end, [i])
            regions.append(last)
    return regions


def _dimensions(given: Sequence[int], limits: tuple[int, int, int]) -> list[int]:
    sizes = [*map(int, given), 1, 1][:3]
    if len(given) > 3 or any(not 1 <= size <= limit for size, limit in zip(sizes, limits, strict=True)):
        raise ValueError(f"grid or block: got {tuple(given)}, expected up to three sizes from 1 to {limits}")
    return sizes


def _value(kernel: str, i: int, code: str, argument: Any, pointer: int) -> Any:
    """The argument as the C type that the kernel declares; TypeError if it is of another type."""
    if isinstance(argument, np.ndarray):
        given = argument.dtype.name
        if code[0] == "p" and (code[1] == "*" or given in _POINTERS[code[1]]):
            return ctypes.c_void_p(pointer)
        given = f"array of {given}"
    else:
        dtype = getattr(argument, "dtype", None)  # np.float64 is a float, too
        given = dtype.name if dtype else {int: "int64", float: "float32"}.get(type(argument), type(argument).__name__)
        if code[0] == "=" and _LETTERS.get(given) == code[1]:
            return _SCALARS[code[1]](argument.item() if dtype else argument)
        if code[0] == "p" and type(argument) is int and argument == 0:
            return ctypes.c_void_p(None)
    wanted = next((name for name, letter in _LETTERS.items() if letter == code[1]), code[1])
    wanted = f"pointer to {' or '.join(_POINTERS.get(code[1], ('anything',)))}" if code[0] == "p" else wanted
    raise TypeError(f"{kernel}: argument {i}: got {given}, the kernel declares {wanted}")


@functools.cache
def _load(source: Path, name: str, defines: tuple[tuple[str, int | str], ...], mode: str) -> _Library:
    return _Library(host_compiler.kernel_library(source, name, dict(defines), mode), name)


def forget() -> None:
    """Load libraries anew: for tests that change how they are compiled."""
    _load.cache_clear()


def _fault(line: str) -> Fault:
    kind, message, block, thread, where = line.split("\t")
    return Fault(kind, message, block, int(thread), _source_line(int(where, 16)) if where.startswith("0x") else "")


@functools.cache
def _source_line(address: int) -> str:
    """ "inner.cuh:3 < kernel.cu:10" for a program counter of this process, without the emulator's own files."""
    spans = []
    for entry in Path("/proc/self/maps").read_text().splitlines():
        fields = entry.split(maxsplit=5)
        if len(fields) == 6 and fields[5].endswith(".so"):
            spans.append((*(int(end, 16) for end in fields[0].split("-")), fields[5]))
    library = next((path for begin, end, path in spans if begin <= address < end), None)
    if library is None:
        return ""
    base = min(begin for begin, _, path in spans if path == library)
    command = ["addr2line", "-i", "-e", library, hex(address - base - 1)]  # a return address is one call too far
    frames = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    places = [frame.split(" (")[0].rpartition(":") for frame in frames]
    names = [f"{Path(file).name}:{number}" for file, _, number in places if file.endswith((".cu", ".cuh"))]
    return " < ".join(dict.fromkeys(names))


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """While it lasts, `np.empty` returns NaN (all bits set), so that a result which is not written is noticed.

    What `launch.scratch` keeps from earlier operations is dropped first: it may hold just what is not written.
    """

    def poison(make: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        def made(*args: Any, **options: Any) -> np.ndarray:
            array = make(*args, **options)
            if array.size and not array.dtype.hasobject and array.dtype != bool:
                array.ravel(order="K").view(np.uint8).fill(0xFF)
            return array

        return made

    launch._scratch.buffers.clear()
    with mock.patch.object(np, "empty", poison(np.empty)), mock.patch.object(np, "empty_like", poison(np.empty_like)):
        yield

"""Ranks on GPUs: NCCL through CuPy."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from ttr_kernels.common.arrays import Array

from ..errors import UserError
from .communicator import Operation, Span

# NCCL's own numbers (nccl.h): bfloat16 has been there since 2.10, CuPy has no name for it.
_DTYPES = {
    "int8": 0, "uint8": 1, "int32": 2, "uint32": 3, "int64": 4, "uint64": 5, "float16": 6, "float32": 7, "float64": 8,
    "bfloat16": 9,
}  # fmt: skip
_OPERATIONS = {"sum": 0, "max": 2, "min": 3}


class NcclCommunicator:
    """One GPU per process.

    NumPy arrays go by way of the GPU, so that a run needs no second engine for its small numbers. Background sums run
    on a stream of their own, after what was computed before them.

    Args:
        cupy: the module; its current device is this rank's.
        identifier: of the run, 128 bytes that rank 0 got from `new_identifier`.
    """

    def __init__(
        self, cupy: ModuleType, rank: int, size: int, local_rank: int, local_size: int, identifier: bytes
    ) -> None:
        nccl = _nccl(cupy)
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self.name = version(cupy)
        self._cupy = cupy
        self._comm = nccl.NcclCommunicator(size, _signed(identifier), rank)
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._pending = False

    def all_reduce(self, array: Array, operation: Operation = "sum") -> None:
        on_gpu = self._put(array)
        self._reduce(on_gpu, operation, self._cupy.cuda.get_current_stream())
        self._get(on_gpu, array)

    def start_all_reduce(self, array: Array) -> None:
        event = self._cupy.cuda.get_current_stream().record()
        self._stream.wait_event(event)
        self._reduce(array, "sum", self._stream)
        self._pending = True

    def wait(self) -> list[Span]:
        if self._pending:
            # The GPU waits, not the processor: what is computed next comes after the sums.
            self._cupy.cuda.get_current_stream().wait_event(self._stream.record())
            self._pending = False
        return []

    def broadcast(self, array: Array, root: int = 0) -> None:
        on_gpu = self._put(array)
        stream = self._cupy.cuda.get_current_stream()
        self._comm.broadcast(
            on_gpu.data.ptr, on_gpu.data.ptr, on_gpu.nbytes, _DTYPES["uint8"], root, stream.ptr
        )  # fmt: skip
        self._get(on_gpu, array)

    def all_gather(self, array: Array) -> Array:
        on_gpu = self._cupy.ascontiguousarray(self._put(array))
        gathered = self._cupy.empty((self.size, *on_gpu.shape), on_gpu.dtype)
        stream = self._cupy.cuda.get_current_stream()
        self._comm.allGather(
            on_gpu.data.ptr, gathered.data.ptr, on_gpu.nbytes, _DTYPES["uint8"], stream.ptr
        )  # fmt: skip
        return self._like(gathered, array)

    def reduce_scatter(self, array: Array) -> Array:
        on_gpu = self._cupy.ascontiguousarray(self._put(array))
        row = self._cupy.empty(on_gpu.shape[1:], on_gpu.dtype)
        stream = self._cupy.cuda.get_current_stream()
        self._comm.reduceScatter(
            on_gpu.data.ptr, row.data.ptr, row.size, _dtype(on_gpu), _OPERATIONS["sum"], stream.ptr
        )  # fmt: skip
        return self._like(row, array)

    def barrier(self) -> None:
        self.all_reduce(np.zeros(1, np.int32))

    def close(self) -> None:
        self._comm.destroy()

    def _reduce(self, array: Any, operation: Operation, stream: Any) -> None:
        self._comm.allReduce(
            array.data.ptr, array.data.ptr, array.size, _dtype(array), _OPERATIONS[operation], stream.ptr
        )  # fmt: skip

    def _put(self, array: Array) -> Any:
        return self._cupy.asarray(array)

    def _get(self, on_gpu: Any, array: Array) -> None:
        if isinstance(array, np.ndarray):
            array[...] = self._cupy.asnumpy(on_gpu)

    def _like(self, on_gpu: Any, array: Array) -> Array:
        result: Array = self._cupy.asnumpy(on_gpu) if isinstance(array, np.ndarray) else on_gpu
        return result


def version(cupy: ModuleType) -> str:
    """Such as "NCCL 2.28.9". UserError if there is none."""
    number = int(_nccl(cupy).get_version())
    return f"NCCL {number // 10000}.{number // 100 % 100}.{number % 100}"


def new_identifier(cupy: ModuleType) -> bytes:
    """What NCCL recognises the ranks of one run by; rank 0 makes it and tells the others."""
    return bytes(value & 0xFF for value in _nccl(cupy).get_unique_id())


def _nccl(cupy: ModuleType) -> Any:
    nccl = getattr(cupy.cuda, "nccl", None)
    if not getattr(nccl, "available", False):
        raise UserError(
            "NCCL: this CuPy was built without it, or its library is missing: pip install nvidia-nccl-cu13 (cu12 for "
            "CUDA 12), or train on one GPU"
        )
    return nccl


def _signed(identifier: bytes) -> tuple[int, ...]:
    """CuPy takes the bytes as a tuple of C's signed characters."""
    return tuple(int(value) for value in np.frombuffer(identifier, np.int8))


def _dtype(array: Any) -> int:
    name = str(array.dtype)
    if name not in _DTYPES:
        raise TypeError(f"array: got dtype {name}, expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]

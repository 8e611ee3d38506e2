"""Ranks of MPI, on NumPy arrays, through mpi4py."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ttr_kernels.common.arrays import Array

from .communicator import Operation, Span
from .short_turns import ask_for_short_turns

# How long a background all-reduce sleeps between looks: a core that spins is one that does not compute.
_NAP = 1e-4
# What MPICH's UCX sends and takes from a TCP connection at once: with its own 8 and 64 KiB, a look at a sum moves less.
_UCX = {"UCX_TCP_TX_SEG_SIZE": "64k", "UCX_TCP_RX_SEG_SIZE": "256k"}


class MpiCommunicator:
    """All processes of an MPI run.

    Background sums are the work of one thread, which mostly sleeps; MPI must allow calls from a thread other than the
    first one (MPI_THREAD_SERIALIZED), else they happen in `wait`.
    """

    def __init__(self) -> None:
        for name, value in _UCX.items():
            os.environ.setdefault(name, value)
        from mpi4py import MPI

        self._mpi, self._comm = MPI, MPI.COMM_WORLD
        self.rank, self.size = self._comm.Get_rank(), self._comm.Get_size()
        machine = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank, self.local_size = machine.Get_rank(), machine.Get_size()
        machine.Barrier()  # by now all have mapped it
        _unlink_shared_memory()
        machine.Free()
        self.name = f"MPI ({library_name(MPI)})"
        self._started: queue.SimpleQueue[Array | None] = queue.SimpleQueue()
        self._pending, self._spans = 0, queue.SimpleQueue[Span | BaseException]()
        self._thread: threading.Thread | None = None
        self._late: list[Array] | None = None if MPI.Query_thread() >= MPI.THREAD_SERIALIZED else []

    def all_reduce(self, array: Array, operation: Operation = "sum") -> None:
        reduction = {"sum": self._mpi.SUM, "max": self._mpi.MAX, "min": self._mpi.MIN}[operation]
        wide = _reducible(array)
        self._comm.Allreduce(self._mpi.IN_PLACE, wide, reduction)
        if wide is not array:
            array[...] = wide

    def start_all_reduce(self, array: Array) -> None:
        if self._late is not None:
            self._late.append(array)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="all-reduce", daemon=True)
            self._thread.start()
        self._pending += 1
        self._started.put(array)

    def wait(self) -> list[Span]:
        spans = []
        for _ in range(self._pending):
            item = self._spans.get()
            if isinstance(item, BaseException):
                raise item
            spans.append(item)
        self._pending = 0
        for array in self._late or ():
            begin = time.perf_counter()
            self.all_reduce(array)
            spans.append(Span("all_reduce", begin, time.perf_counter(), array.nbytes))
        if self._late:
            self._late.clear()
        return spans

    def broadcast(self, array: Array, root: int = 0) -> None:
        self._comm.Bcast(_as_bytes(array), root)

    def all_gather(self, array: Array) -> Array:
        gathered = np.empty((self.size, *array.shape), array.dtype)
        self._comm.Allgather(_as_bytes(np.ascontiguousarray(array)), _as_bytes(gathered))
        return gathered

    def reduce_scatter(self, array: Array) -> Array:
        wide = _reducible(array)
        row = np.empty(array.shape[1:], wide.dtype)
        self._comm.Reduce_scatter_block(wide, row, self._mpi.SUM)
        return row.astype(array.dtype, copy=False)

    def barrier(self) -> None:
        self._comm.Barrier()

    def close(self) -> None:
        if self._thread is not None:
            self._started.put(None)
            self._thread.join()
            self._thread = None

    def abort(self, code: int) -> NoReturn:
        """End all ranks, mpirun with this exit code. Callable from any thread, whatever the others do."""
        if self.rank > 0:
            # Rank 0 is about to do it for all.
            time.sleep(1.0)
        # Should MPI itself be what hangs.
        threading.Timer(2.0, os._exit, (code,)).start()
        self._comm.Abort(code)
        os._exit(code)

    def _work(self) -> None:
        # The core computes meanwhile: a nap would last until the end of that thread's turn.
        ask_for_short_turns()
        while (array := self._started.get()) is not None:
            try:
                begin = time.perf_counter()
                wide = _reducible(array)
                request = self._comm.Iallreduce(self._mpi.IN_PLACE, wide, self._mpi.SUM)
                while not request.Test():
                    time.sleep(_NAP)
                if wide is not array:
                    array[...] = wide
                self._spans.put(Span("all_reduce", begin, time.perf_counter(), array.nbytes))
            except BaseException as error:
                self._spans.put(error)
                return


def _unlink_shared_memory() -> None:
    """Take the name from the memory that MPICH shares on this machine; it stays mapped.

    MPICH does so only when it ends. Killed ranks would leave megabytes behind, and under srun, where the name follows
    from the numbers of job and step, the job that is queued again would take what is left for its own, and fail.
    """
    with contextlib.suppress(OSError):  # no such list, as on macOS
        for line in Path("/proc/self/maps").read_text().splitlines():
            at = line.find("/dev/shm/mpich_shm_")
            if at >= 0:
                Path(line[at:]).unlink(missing_ok=True)


def library_name(mpi: Any) -> str:
    """Such as "MPICH 5.0.2": the first line of what the library says of itself."""
    words = mpi.Get_library_version().replace("\x00", "").splitlines()[0].replace("Version:", " ").split()
    return " ".join(words)[:40]


def _reducible(array: Array) -> Array:
    """The array itself, or for 16-bit floats, which MPI cannot add, a float32 copy."""
    return array.astype(np.float32) if array.dtype.itemsize == 2 and array.dtype.kind not in "iu" else array


def _as_bytes(array: Array) -> Array:
    """The memory of an array as bytes: moved, not computed with, every dtype is the same to MPI."""
    return array.reshape(-1).view(np.uint8)

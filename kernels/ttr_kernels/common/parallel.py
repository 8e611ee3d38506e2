"""Threads: one pool for everything that runs on the CPU.

Compiled kernels work on a range of rows, and BLAS is called with one thread per range of rows, so one pool of threads
serves both: compiled code hands out ranges without Python (see ranges); what has to be called from Python is handed out
there. A BLAS with threads of its own would spin between its calls and take the cores away from the kernels (measured on
2 cores: elementwise kernels 1.8 times slower, and with OpenMP threads in numba the matrix products 2.3 times slower);
splitting the products by rows costs nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .ranges import announce_other, announced, new_board, serve


def available_cores() -> int:
    """Cores this process may use: its CPU affinity, and the container's CPU quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


# Looks at the board before a thread sleeps: some 0.5 to 1 ms, more than lies between two kernels of a training step.
_PATIENCE = 20_000


class _Worker:
    """A thread that serves the board (see ranges), and helps with Python's tasks."""

    def __init__(self, slot: int) -> None:
        self._slot = slot
        self._wake, self._left = threading.Lock(), threading.Lock()
        self._wake.acquire()
        self._left.acquire()
        self.asleep = False
        self._helps = False
        # Compiled here, or a short program would end before the thread has done so, and never keep it.
        self._seen, _ = serve(_board, slot, announced(_board), 0)
        threading.Thread(target=self._loop, name="ttr-kernels", daemon=True).start()

    def _loop(self) -> None:
        while True:
            self._seen, tired = serve(_board, self._slot, self._seen, _PATIENCE)
            if not tired:
                self._help()
                continue
            # In this order: whoever announces after this look, and then wakes, sees the flag.
            self.asleep = True
            if announced(_board) == self._seen:
                self._wake.acquire()
            self.asleep = False

    def _help(self) -> None:
        self._helps = True
        if (task := _task) is not None and self._slot < task.threads:
            task.work()
        self._helps = False
        _release(self._left)

    def wake(self) -> None:
        if self.asleep:
            _release(self._wake)

    def wait(self) -> None:
        """Until this thread no longer helps."""
        # The lock only wakes; the flag decides, so that a Ctrl-C between any two steps loses nothing.
        while self._helps:
            self._left.acquire()


def _release(lock: threading.Lock) -> None:
    # Free already if nobody has waited since the last time.
    with contextlib.suppress(RuntimeError):
        lock.release()


_threads = available_cores()
_workers: list[_Worker] = []
_busy = threading.Lock()
_board = new_board()
_task: _Task | None = None


def set_threads(count: int) -> None:
    """Set the number of threads of all kernels and matrix products, the calling thread included."""
    global _threads
    if count < 1:
        raise ValueError(f"count: got {count}, expected at least 1")
    _threads = count


def get_threads() -> int:
    """The number of threads that kernels and matrix products use."""
    return _threads


def _forget_workers() -> None:
    # A forked child has none of its parent's threads.
    global _busy, _board, _task
    _workers.clear()
    _busy, _board, _task = threading.Lock(), new_board(), None


os.register_at_fork(after_in_child=_forget_workers)


@atexit.register
def _rest() -> None:
    # A thread that comes back from compiled code while Python ends is unwound through frames that Python does not know.
    for worker in _workers:
        for _ in range(100):
            if worker.asleep:
                break
            time.sleep(0.001)


def parallel_for(kernel: Callable[..., Any], count: int, *arguments: Any, grain: int = 1, even: bool = True) -> None:
    """Call `kernel(*arguments, begin, end)` on ranges that cover [0, count), on all threads.

    Args:
        kernel: compiled by `jit_ranges`; or a Python function that releases the GIL for most of its time. Ranges must
            be independent of each other.
        grain: the least items worth a range of their own.
        even: items cost about the same: one range per thread. Otherwise ranges of about `grain` items are handed out as
            threads become free.

    An exception in any range is raised here once all threads have stopped; one in compiled code, which can only have
    run out of memory, as MemoryError.
    """
    if count <= 0:
        return
    parts = -(-count // grain)
    threads = min(_threads, parts)
    if even:
        parts = threads
    compiled = hasattr(kernel, "kernel")
    if threads == 1 or not _busy.acquire(blocking=False):
        failed = kernel(_board, 1, count, 1, *arguments) if compiled else kernel(*arguments, 0, count)
    else:
        try:
            for slot in range(len(_workers) + 1, threads):
                _workers.append(_Worker(slot))
            if compiled:
                for worker in _workers[: threads - 1]:
                    worker.wake()
                failed = kernel(_board, threads, count, parts, *arguments)
            else:
                failed = 0
                _run_in_python(_Task(kernel, arguments, count, parts, threads))
        finally:
            _busy.release()
    if compiled and failed:
        raise MemoryError(f"{kernel.__name__}: status {failed}")


class _Task:
    """Ranges for threads of Python."""

    def __init__(self, kernel: Callable[..., Any], arguments: tuple[Any, ...], count: int, parts: int, threads: int):
        self._kernel, self._arguments = kernel, arguments
        self._count, self._parts = count, parts
        self._ticket = itertools.count()
        self.threads = threads
        self.errors: list[BaseException] = []

    def work(self) -> None:
        try:
            while not self.errors and (i := next(self._ticket)) < self._parts:
                self._kernel(*self._arguments, self._count * i // self._parts, self._count * (i + 1) // self._parts)
        except BaseException as error:
            self.errors.append(error)


def _run_in_python(task: _Task) -> None:
    global _task
    try:
        _task = task
        announce_other(_board)
        for worker in _workers[: task.threads - 1]:
            worker.wake()
        task.work()
    finally:
        _task = None
        for worker in _workers:
            _wait_uninterrupted(worker, task.errors)
    if task.errors:
        raise task.errors[0]


def _wait_uninterrupted(worker: _Worker, errors: list[BaseException]) -> None:
    # A Ctrl-C must not return to the caller while a worker still writes into its arrays.
    while True:
        try:
            worker.wait()
            return
        except KeyboardInterrupt as interrupt:
            errors.append(interrupt)


def single_threaded_blas() -> contextlib.AbstractContextManager[None]:
    """BLAS calls inside use one thread each; the previous setting comes back on leaving."""
    # To ask the libraries takes as long as a small product.
    return contextlib.nullcontext() if _limited else _switched_to_one_thread()


@contextlib.contextmanager
def _switched_to_one_thread() -> Iterator[None]:
    libraries = _blas_libraries()
    before = [library.get_num_threads() for library in libraries]
    for library, threads in zip(libraries, before, strict=True):
        if threads != 1:
            library.set_num_threads(1)
    try:
        yield
    finally:
        for library, threads in zip(libraries, before, strict=True):
            if threads != 1:
                library.set_num_threads(threads)


_libraries: list[Any] | None = None
_limited = False  # for the whole process


def _blas_libraries() -> list[Any]:
    global _libraries
    if _libraries is None:
        from threadpoolctl import ThreadpoolController

        _libraries = list(ThreadpoolController().select(user_api="blas").lib_controllers)
    return _libraries


def blas_versions() -> list[str]:
    """One line per BLAS library loaded into this process."""
    return [f"{library.internal_api} {library.version or '?'}" for library in _blas_libraries()]


def blas_files(api: str) -> list[str]:
    """The files of the loaded BLAS libraries of this kind ("openblas", "mkl", ...)."""
    return [library.filepath for library in _blas_libraries() if library.internal_api == api]


def limit_blas() -> None:
    """Set BLAS to one thread for the whole process: for programs (the trainer), so that no call needs to switch."""
    global _limited
    for library in _blas_libraries():
        library.set_num_threads(1)
    _limited = True

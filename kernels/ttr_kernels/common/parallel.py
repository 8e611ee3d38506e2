"""Threads: one pool for everything that runs on the CPU.

Compiled kernels release the GIL and work on a range of rows, and BLAS is called with one thread per range of rows, so
one pool of Python threads serves both. A BLAS with threads of its own would spin between its calls and take the cores
away from the kernels (measured on 2 cores: elementwise kernels 1.8 times slower, and with OpenMP threads in numba the
matrix products 2.3 times slower); splitting the products by rows costs nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def available_cores() -> int:
    """Cores this process may use: its CPU affinity, and the container's CPU quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


class _Worker:
    """A thread that waits for a task. Locks, not queues: waking it costs one futex call."""

    def __init__(self) -> None:
        self._start, self._done = threading.Lock(), threading.Lock()
        self._start.acquire()
        self._done.acquire()
        self._task: Callable[[], None] = _nothing
        self._finished = True
        threading.Thread(target=self._loop, name="ttr-kernels", daemon=True).start()

    def _loop(self) -> None:
        while True:
            self._start.acquire()
            self._task()
            self._task = _nothing
            self._finished = True
            # Free already if an earlier wait ended without it.
            with contextlib.suppress(RuntimeError):
                self._done.release()

    def begin(self, task: Callable[[], None]) -> None:
        self._task = task
        self._finished = False
        self._start.release()

    def wait(self) -> None:
        # The lock only wakes; the flag decides, so that a Ctrl-C between any two steps loses nothing.
        while not self._finished:
            self._done.acquire()


def _nothing() -> None:
    pass


_threads = available_cores()
_workers: list[_Worker] = []
_busy = threading.Lock()


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
    global _busy
    _workers.clear()
    _busy = threading.Lock()


os.register_at_fork(after_in_child=_forget_workers)


def parallel_for(kernel: Callable[..., Any], count: int, *arguments: Any, grain: int = 1, even: bool = True) -> None:
    """Call `kernel(*arguments, begin, end)` on ranges that cover [0, count), on all threads.

    Args:
        kernel: releases the GIL; ranges must be independent of each other.
        grain: the least items worth a range of their own.
        even: items cost about the same: one range per thread. Otherwise ranges of `grain` items are handed out as
            threads become free.

    An exception in any range is raised here once all threads have stopped.
    """
    if count <= 0:
        return
    ranges = -(-count // grain)
    threads = min(_threads, ranges)
    if threads == 1 or not _busy.acquire(blocking=False):
        kernel(*arguments, 0, count)
        return
    if even:
        bounds = [(count * i // threads, count * (i + 1) // threads) for i in range(threads)]
    else:
        bounds = [(begin, min(begin + grain, count)) for begin in range(0, count, grain)]
    ticket = itertools.count()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while not errors and (index := next(ticket)) < len(bounds):
                kernel(*arguments, *bounds[index])
        except BaseException as error:
            errors.append(error)

    try:
        while len(_workers) < threads - 1:
            _workers.append(_Worker())
        helpers = _workers[: threads - 1]
        try:
            for worker in helpers:
                worker.begin(work)
            work()
        finally:
            for worker in helpers:
                _wait_uninterrupted(worker, errors)
    finally:
        _busy.release()
    if errors:
        raise errors[0]


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

"""A stand-in for what the NCCL communicator uses of CuPy: ranks are threads of one process, memory is the host's, and
streams are what matters about them: work on each runs in order, later than it was given, and apart from other streams'.

What is not waited for is thus seen too early, as on a GPU. Nothing of it says that NCCL itself does what is expected.
"""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

# As nccl.h numbers them.
_DTYPES = dict(enumerate((np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64, np.float16, np.float32,
                          np.float64, ml_dtypes.bfloat16)))  # fmt: skip
_OPERATIONS = {0: np.add, 2: np.maximum, 3: np.minimum}


class Event:
    def __init__(self) -> None:
        self.done = threading.Event()


class Stream:
    """Work in order, on a thread; late, so that who does not wait sees what was before."""

    def __init__(self, non_blocking: bool = False) -> None:
        self.ptr = id(self)
        self._work: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()
        _streams[self.ptr] = self

    def _run(self) -> None:
        while True:
            work = self._work.get()
            time.sleep(0.002)
            work()

    def submit(self, work: Any) -> None:
        self._work.put(work)

    def record(self) -> Event:
        event = Event()
        self.submit(event.done.set)
        return event

    def wait_event(self, event: Event) -> None:
        self.submit(event.done.wait)

    def synchronize(self) -> None:
        assert self.record().done.wait(20)


_streams: dict[int, Stream] = {}


# CuPy's pool gives memory away again only to what comes later on the stream.
_pool: list[np.ndarray] = []


class Ndarray:
    """An array that NumPy does not take for one of its own; `host` is its memory."""

    def __init__(self, host: np.ndarray) -> None:
        self.host = host
        _pool.append(host)
        self.dtype, self.size, self.nbytes, self.shape = host.dtype, host.size, host.nbytes, host.shape
        self.data = SimpleNamespace(ptr=host.ctypes.data)


class NcclCommunicator:
    """One rank of `NcclStandIn`."""

    def __init__(self, shared: NcclStandIn, size: int, identifier: tuple[int, ...], rank: int) -> None:
        assert len(identifier) == 128
        assert all(-128 <= value < 128 for value in identifier), "CuPy copies them into signed characters"
        assert identifier == shared.identifier
        self.shared, self.size, self.rank = shared, size, rank

    def allReduce(self, source: int, target: int, count: int, dtype: int, operation: int, stream: int) -> None:
        def work() -> None:
            everyone = self._share(_memory(source, count, dtype).copy())
            _memory(target, count, dtype)[...] = _reduced(everyone, operation)

        _streams[stream].submit(work)

    def broadcast(self, source: int, target: int, count: int, dtype: int, root: int, stream: int) -> None:
        def work() -> None:
            _memory(target, count, dtype)[...] = self._share(_memory(source, count, dtype).copy())[root]

        _streams[stream].submit(work)

    def allGather(self, source: int, target: int, count: int, dtype: int, stream: int) -> None:
        def work() -> None:
            everyone = self._share(_memory(source, count, dtype).copy())
            _memory(target, self.size * count, dtype)[...] = np.concatenate(everyone)

        _streams[stream].submit(work)

    def reduceScatter(self, source: int, target: int, count: int, dtype: int, operation: int, stream: int) -> None:
        def work() -> None:
            everyone = self._share(_memory(source, self.size * count, dtype).copy())
            part = slice(self.rank * count, (self.rank + 1) * count)
            _memory(target, count, dtype)[...] = _reduced([a[part] for a in everyone], operation)

        _streams[stream].submit(work)

    def destroy(self) -> None:
        self.shared.destroyed.add(self.rank)

    def _share(self, mine: np.ndarray) -> list[np.ndarray]:
        self.shared.slots[self.rank] = mine
        self.shared.barrier.wait(20)
        everyone = list(self.shared.slots)
        self.shared.barrier.wait(20)
        return everyone


class NcclStandIn:
    """What the ranks of one run share; `cupy()` is a rank's module."""

    available = True

    def __init__(self, size: int) -> None:
        self.barrier, self.slots = threading.Barrier(size), [np.empty(0)] * size
        self.identifier = tuple(int(v) for v in np.random.default_rng(0).integers(-128, 128, 128))
        self.destroyed: set[int] = set()

    def get_version(self) -> int:
        return 22809

    def get_unique_id(self) -> tuple[int, ...]:
        return self.identifier

    def NcclCommunicator(self, size: int, identifier: tuple[int, ...], rank: int) -> NcclCommunicator:
        return NcclCommunicator(self, size, identifier, rank)

    def cupy(self) -> Any:
        current = Stream()

        def asarray(value: Any) -> Ndarray:
            return value if isinstance(value, Ndarray) else Ndarray(value.copy())

        def asnumpy(value: Ndarray) -> np.ndarray:
            current.synchronize()
            return value.host.copy()

        return SimpleNamespace(
            asarray=asarray, ascontiguousarray=asarray, asnumpy=asnumpy,
            empty=lambda shape, dtype: Ndarray(np.zeros(shape, dtype)),
            cuda=SimpleNamespace(nccl=self, Stream=Stream, get_current_stream=lambda: current),
        )  # fmt: skip


def _memory(address: int, count: int, dtype: int) -> np.ndarray:
    kind = np.dtype(_DTYPES[dtype])
    return np.frombuffer((ctypes.c_char * (count * kind.itemsize)).from_address(address), kind)


def _reduced(arrays: list[np.ndarray], operation: int) -> np.ndarray:
    total = arrays[0]
    for array in arrays[1:]:
        total = _OPERATIONS[operation](total, array)
    return total

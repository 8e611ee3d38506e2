"""Memory of the stand-in's GPU, and capture of work into a graph (see cupy_stand_in.py).

While a stream is captured, what is asked for is kept: arrays by their addresses, all else by value.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


class UnownedMemory:
    """Memory that belongs to `owner`, which it keeps alive."""

    def __init__(self, ptr: int, size: int, owner: Any, device_id: int = -1) -> None:
        self.ptr, self.size, self.owner = ptr, size, owner


class MemoryPointer:
    """A place in memory, which it keeps alive."""

    def __init__(self, mem: UnownedMemory, offset: int) -> None:
        self.mem, self.ptr = mem, mem.ptr + offset

    def array(self, shape: Any, dtype: Any) -> np.ndarray[Any, Any]:
        size = dtype.itemsize * int(np.prod(shape))
        assert self.ptr + size <= self.mem.ptr + self.mem.size, "beyond the memory"
        buffer = (ctypes.c_char * size).from_address(self.ptr)
        buffer.memory = self.mem  # type: ignore[attr-defined]
        return np.ndarray(shape, dtype, buffer)


_allocator: Callable[[int], MemoryPointer] | None = None


class Block:
    """Memory as `cuda.alloc` gives it."""

    def __init__(self, size: int) -> None:
        self.bytes = np.empty(size, np.uint8)
        self.begin, self.end = self.bytes.ctypes.data, self.bytes.ctypes.data + size
        _blocks.add(self)


_blocks: weakref.WeakSet[Block] = weakref.WeakSet()


def alloc(size: int) -> MemoryPointer:
    if _allocator is not None:
        return _allocator(size)
    return pool_malloc(size)


def pool_malloc(size: int) -> MemoryPointer:
    refuse("memory is allocated")
    block = Block(max(size, 1))
    return MemoryPointer(UnownedMemory(block.begin, size, block), 0)


@contextmanager
def using_allocator(allocator: Callable[[int], MemoryPointer] | None = None) -> Iterator[None]:
    global _allocator
    before, _allocator = _allocator, allocator
    try:
        yield
    finally:
        _allocator = before


def allocated(result: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A result of NumPy's, where CuPy would put it."""
    if _allocator is None and _capture is None:
        return result
    return alloc(result.nbytes).array(result.shape, result.dtype)


class _Place:
    """An array, known by its address alone: it does not keep the memory."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._address, self._shape, self._dtype = array.ctypes.data, array.shape, array.dtype
        self._strides = array.strides
        self._begin, end = np.lib.array_utils.byte_bounds(array) if array.size else (self._address, self._address)
        self._size = end - self._begin
        owner: Any = next((block for block in _blocks if block.begin <= self._begin < block.end), None)
        while owner is None or (isinstance(owner, np.ndarray) and owner.base is not None):
            owner = array if owner is None else owner.base
        self._owner = weakref.ref(owner)

    def array(self) -> np.ndarray[Any, Any]:
        if self._owner() is None:
            raise RuntimeError("the graph reads or writes memory that has been freed since it was captured")
        memory = (ctypes.c_char * self._size).from_address(self._begin)
        return np.ndarray(self._shape, self._dtype, memory, self._address - self._begin, self._strides)


def _mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {name: _mapped(part, kind, change) for name, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_mapped(part, kind, change) for part in value)
    return value


_capture: list[Callable[[], object]] | None = None


def refuse(what: str) -> None:
    if _capture is not None:
        raise RuntimeError(f"cudaErrorStreamCaptureUnsupported (stand-in): {what} while a stream is captured")


def do(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Have the device do it, now or whenever the graph is launched."""
    if _capture is None:
        function(*args, **kwargs)
        return
    held = _mapped((args, kwargs), np.ndarray, _Place)

    def later() -> None:
        positional, named = _mapped(held, _Place, _Place.array)
        with np.errstate(all="ignore"):
            function(*positional, **named)

    _capture.append(later)


def computed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What NumPy's function gives; a new array of it is the device's to fill, one that shares memory is a view."""
    if kwargs.get("out") is not None and _capture is not None:
        do(function, *args, **kwargs)
        return kwargs["out"]
    if _capture is None:
        result = function(*args, **kwargs)
    else:
        with np.errstate(all="ignore"):  # of undefined content: for its shape alone
            result = function(*args, **kwargs)
    if kwargs.get("out") is not None or (_allocator is None and _capture is None):
        return result
    if isinstance(result, np.generic):
        result = np.asarray(result)
    given: list[np.ndarray[Any, Any]] = []
    _mapped((args, kwargs), np.ndarray, given.append)
    if not isinstance(result, np.ndarray) or any(np.may_share_memory(result, each) for each in given):
        return result
    target = allocated(result)
    do(lambda to, *args, **kwargs: np.copyto(to, function(*args, **kwargs)), target, *args, **kwargs)
    return target


def is_capturing() -> bool:
    return _capture is not None


def begin_capture() -> None:
    global _capture
    refuse("another capture begins")
    _capture = []


def end_capture() -> Graph:
    global _capture
    assert _capture is not None, "no capture has begun"
    graph, _capture = Graph(_capture), None
    return graph


class Graph:
    """What was captured."""

    def __init__(self, work: list[Callable[[], object]]) -> None:
        self._work = work
        self.launches = 0

    def launch(self, stream: object = None) -> None:
        refuse("a graph is launched")
        self.launches += 1
        for each in self._work:
            each()

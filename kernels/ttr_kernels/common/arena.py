"""Memory for the arrays of a step that is repeated, taken from the system once.

Inside `with arena.step():` operations make their arrays (`arrays.empty`, `arrays.zeros`) out of one block. A request
takes the smallest hole that holds it, the lowest of equals, and gives it back when the array and every view of it are
gone, which reference counting tells at once: an array that lives is never handed out again. The same requests and
deaths in the same order find the same addresses, as a captured CUDA graph needs them.

What the block is too small for is allocated as usual and counted in `misses`; the next step's block is as large as this
step's would have had to be. So a batch of another shape than the last is no special case.

Inside `with arena.everything():` on a GPU all that CuPy allocates comes from the block, its own temporary arrays too:
what a captured graph works in stays where it is. Who makes an array to keep it beyond the step says `with outside():`.
"""

from __future__ import annotations

import bisect
import math
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

# Of every array: what vector and tensor-core kernels ask for, and whole cache lines.
ALIGNMENT = 256
# Blocks are whole pages of the large kind, of which a process needs fewer.
_PAGE = 2 << 20
_ENDLESS = 1 << 62


class _Lease(weakref.ref[Any]):
    """Part of the arena, for as long as what is referred to lives."""

    __slots__ = ("offset", "size")
    offset: int
    size: int


class Arena:
    """One block of memory, and who has which part of it. It serves the thread that opened the step.

    Args:
        xp: NumPy, or CuPy, whose work must all be given to one stream: a part is used again without waiting.
        capacity: bytes that the first step may take; on a CPU they cost nothing until they are written to.
        poison: for tests, fill whatever is given back or handed out with NaN (NumPy only).

    Attributes:
        capacity: of the block.
        extent: bytes that a block had to have so far.
        live, peak: bytes that arrays take now, and took at most since `reset_peak`.
        misses: arrays that the block was too small for.
    """

    def __init__(self, xp: ModuleType = np, capacity: int = 0, *, poison: bool = False) -> None:
        self.xp, self.capacity, self.poison = xp, 0, poison
        self.extent = self.live = self.peak = self.misses = 0
        self._holes = [(0, _ENDLESS)]  # (offset, size), by offset; the last has no end
        self._leases: dict[int, _Lease] = {}  # by offset
        # What has died is put here, in whatever thread and in the middle of whatever, and taken back at a request.
        self._dead: deque[_Lease] = deque()
        self._block: Any = None
        self._view: Any = None
        self.reserve(capacity)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Inside, `arrays.empty` and `arrays.zeros` of this thread take from the arena."""
        self.reserve(self.extent)
        before, _local.arena = _local.arena, self
        try:
            yield
        finally:
            _local.arena = before

    @contextmanager
    def everything(self) -> Iterator[None]:
        """Inside, on a GPU, whatever CuPy allocates for this thread comes from the arena."""
        with self.xp.cuda.using_allocator(self._pointer):
            yield

    def reserve(self, capacity: int) -> None:
        """Let the block be of at least this size. Arrays in a smaller one keep that, and their parts of the new one
        stay unused until they are gone."""
        if capacity > self.capacity:
            self.capacity = -(-capacity // _PAGE) * _PAGE
            self._block = self._view = None  # before there is another, or there would be memory for both
            self._block, self._view = (_on_cpu if self.xp is np else _on_gpu)(self.xp, self.capacity)

    def empty(self, shape: int | tuple[int, ...], dtype: Any) -> Any:
        """An array with undefined content, C-contiguous, ALIGNMENT bytes aligned."""
        dtype = np.dtype(dtype)
        count = shape if type(shape) is int else math.prod(shape)  # type: ignore[arg-type]
        size = (dtype.itemsize * count + ALIGNMENT - 1) & -ALIGNMENT
        if size == 0:
            return self.xp.empty(shape, dtype)
        offset = self._place(size)
        if offset + size <= self.capacity:
            if self.poison:
                self._fill(offset, size)
            array, owner = self._view(offset, shape, dtype)
        else:
            self.misses += 1
            with outside():
                array = owner = self.xp.empty(shape, dtype)
        self._lease(owner, offset, size)
        return array

    def _pointer(self, bytes_wanted: int) -> Any:
        """Memory for CuPy."""
        size = (max(bytes_wanted, 1) + ALIGNMENT - 1) & -ALIGNMENT
        offset = self._place(size)
        if offset + size <= self.capacity:
            pointer, owner = _pointer_on_gpu(self.xp, self._block, offset, self.capacity)
        else:
            self.misses += 1
            elsewhere = self.xp.get_default_memory_pool().malloc(size)
            pointer, owner = _pointer_on_gpu(self.xp, elsewhere, 0, size)
        self._lease(owner, offset, size)
        return pointer

    def reset_peak(self) -> None:
        """Let `peak` begin anew from what lives."""
        self.collect()
        self.peak = self.live

    def collect(self) -> int:
        """Take back what has died; the bytes that live."""
        while self._dead:
            self._give_back(self._dead.popleft())
        return self.live

    def _place(self, size: int) -> int:
        if self._dead:
            self.collect()
        return self._take(size)

    def _lease(self, owner: Any, offset: int, size: int) -> None:
        lease = _Lease(owner, self._dead.append)
        lease.offset, lease.size = offset, size
        self._leases[offset] = lease

    def _take(self, size: int) -> int:
        """Where a hole of at least this size begins, which is one no more, or smaller."""
        holes, best, least = self._holes, -1, _ENDLESS + 1
        for index, (_, hole) in enumerate(holes):
            if size <= hole < least:
                best, least = index, hole
                if hole == size:
                    break
        offset = holes[best][0]
        if least == size:
            del holes[best]
        else:
            holes[best] = (offset + size, _ENDLESS if least == _ENDLESS else least - size)
        self.live += size
        if self.live > self.peak:
            self.peak = self.live
        if offset + size > self.extent:
            self.extent = offset + size
        return offset

    def _give_back(self, lease: _Lease) -> None:
        """Make a hole of what is gone, one with those that it touches."""
        holes, offset, size = self._holes, lease.offset, lease.size
        del self._leases[offset]
        self.live -= size
        if self.poison and offset + size <= self.capacity:
            self._fill(offset, size)
        at = bisect.bisect_left(holes, (offset, 0))
        following, length = holes[at]
        joins = offset + size == following
        if joins:
            size = _ENDLESS if length == _ENDLESS else size + length
        if at:
            before, length = holes[at - 1]
            if before + length == offset:
                holes[at - 1] = (before, _ENDLESS if size == _ENDLESS else length + size)
                if joins:
                    del holes[at]
                return
        if joins:
            holes[at] = (offset, size)
        else:
            holes.insert(at, (offset, size))

    def _fill(self, offset: int, size: int) -> None:
        self._block[offset : offset + size] = b"\xff" * size


def _on_cpu(xp: ModuleType, capacity: int) -> tuple[Any, Callable[[int, Any, Any], tuple[Any, Any]]]:
    # Not an array: a view of a view of one refers to the first, past the view whose death is waited for.
    # Private: a forked child shares nothing, and pages may be large ones.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    block = mmap.mmap(-1, capacity, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)

    def view(offset: int, shape: Any, dtype: Any) -> tuple[Any, Any]:
        array: Any = np.ndarray(shape, dtype, block, offset)
        return array, array

    return block, view


class _Owner:
    """What every view of an array on a GPU refers to, through its memory."""

    __slots__ = ("__weakref__", "block")

    def __init__(self, block: Any) -> None:
        self.block = block


def _on_gpu(xp: Any, capacity: int) -> tuple[Any, Callable[[int, Any, Any], tuple[Any, Any]]]:
    block = xp.cuda.alloc(capacity)

    def view(offset: int, shape: Any, dtype: Any) -> tuple[Any, Any]:
        pointer, owner = _pointer_on_gpu(xp, block, offset, capacity)
        return xp.ndarray(shape, dtype, pointer), owner

    return block, view


def _pointer_on_gpu(xp: Any, block: Any, offset: int, capacity: int) -> tuple[Any, _Owner]:
    owner = _Owner(block)
    memory = xp.cuda.UnownedMemory(block.ptr + offset, capacity - offset, owner, xp.cuda.Device().id)
    return xp.cuda.MemoryPointer(memory, 0), owner


class _Local(threading.local):
    arena: Arena | None = None


_local = _Local()


def current() -> Arena | None:
    """The arena that this thread's step takes from, if it is in one."""
    return _local.arena


@contextmanager
def outside() -> Iterator[None]:
    """Inside, this thread's arrays are no step's: for what is made once and kept."""
    before, _local.arena = _local.arena, None
    try:
        if before is None or before.xp is np:
            yield
        else:
            with before.xp.cuda.using_allocator(before.xp.get_default_memory_pool().malloc):
                yield
    finally:
        _local.arena = before

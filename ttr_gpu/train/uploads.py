"""What goes to a GPU from pinned memory: batches, while the batch before is computed, and small arrays in order with
the work."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from ttr_kernels.common.arrays import Array

from ..backend import Backend, PackedTokens, PlacedTokens, censored_positions

# What of a batch goes to the device, the widest first, so that each part is aligned.
_PARTS = {"times": np.float64, "target_times": np.float64, "tokens": np.int32, "targets": np.int32}


@dataclass
class _Started:
    """A batch whose copy has been given to the device, and the event after it."""

    batch: PackedTokens
    placed: PlacedTokens
    done: Any


class PinnedMemory:
    """Blocks of pinned memory. Each is taken again once the copies out of it are done: nothing is waited for, and there
    are as many as the host is ahead of the device."""

    def __init__(self, xp: Any) -> None:
        self._xp = xp
        self._used: deque[tuple[Any, Array]] = deque()  # (event after the last copy, block), the oldest first

    def take(self, size: int) -> Array:
        """(at least `size`,) uint8 that no copy reads."""
        if self._used and self._used[0][0].done:
            block = self._used.popleft()[1]
            if len(block) >= size:
                return block
        return np.frombuffer(self._xp.cuda.alloc_pinned_memory(size), np.uint8, size)

    def give_back(self, block: Array, done: Any) -> None:
        """`done` is an event after the copies out of the block."""
        self._used.append((done, block))


class Copies:
    """Copies of host arrays to arrays on the device, in order with the work on its current stream; called with pairs of
    (array on the device, NumPy array). The host arrays may be changed at once."""

    def __init__(self, xp: Any) -> None:
        self._xp, self._pinned = xp, PinnedMemory(xp)

    def __call__(self, pairs: list[tuple[Array, Array]]) -> None:
        sizes = [-(-source.nbytes // 16) * 16 for _, source in pairs]
        block, begin, stream = self._pinned.take(sum(sizes)), 0, self._xp.cuda.get_current_stream()
        for (target, source), size in zip(pairs, sizes, strict=True):
            part = block[begin : begin + source.nbytes].view(source.dtype).reshape(source.shape)
            part[...] = source
            target.set(part, stream=stream)  # type: ignore[attr-defined]
            begin += size
        self._pinned.give_back(block, stream.record())


class Uploads:
    """Two sets of buffers on the device take turns, and a stream of their own fills them: the copy of a batch begins
    once the device has done with the batch before the last, and ends, as a rule, before the last one does.

    The device alone waits.

    Args:
        backend: of a GPU.
        capacity: tokens of the largest batch.
    """

    def __init__(self, backend: Backend, capacity: int) -> None:
        self._xp, self._capacity = backend.xp, capacity
        self._bytes = capacity * sum(np.dtype(dtype).itemsize for dtype in _PARTS.values())
        self._slots = [self._parts(self._xp.empty(self._bytes, np.uint8)) for _ in range(2)]
        self._turn = 0
        self._stream = self._xp.cuda.Stream(non_blocking=True)
        self._pinned = PinnedMemory(self._xp)
        self._started: _Started | None = None

    def start(self, batch: PackedTokens) -> None:
        """Begin to copy the batch that comes after those that the device has been given so far."""
        if self._started is not None and self._started.batch is batch:
            return
        current, size = self._xp.cuda.get_current_stream(), len(batch.tokens)
        target: dict[str, Any] = {name: part[:size] for name, part in self._slots[self._turn].items()}
        self._turn ^= 1
        block = self._pinned.take(self._bytes)
        source = self._parts(block)
        for name, part in source.items():
            part[:size] = getattr(batch, name)
        # What reads these buffers was given to the device before now.
        self._stream.wait_event(current.record())
        for name, part in target.items():
            part.set(source[name][:size], stream=self._stream)
        done = self._stream.record()
        self._pinned.give_back(block, done)
        placed = PlacedTokens(cu_seqlens=batch.cu_seqlens, **target, censored=censored_positions(batch))
        self._started = _Started(batch, placed, done)

    def take(self, batch: PackedTokens) -> PlacedTokens:
        """The batch on the device, for what is given to it from now on, until the next but one is started."""
        self.start(batch)
        assert self._started is not None
        started, self._started = self._started, None
        self._xp.cuda.get_current_stream().wait_event(started.done)
        return started.placed

    def _parts(self, block: Array) -> dict[str, Array]:
        """Arrays by name, one behind the other in a block."""
        parts, begin = {}, 0
        for name, dtype in _PARTS.items():
            end = begin + self._capacity * np.dtype(dtype).itemsize
            parts[name] = block[begin:end].view(dtype)
            begin = end
        return parts

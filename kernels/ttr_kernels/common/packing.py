"""What follows from where packed sequences begin, at fixed places on a GPU.

A captured CUDA graph reads the same addresses whenever it is replayed, and launches the same blocks. So what operations
derive from `cu_seqlens` on the host (attention's lists of tiles, the rows' positions) must lie in arrays of a size that
does not depend on it. Inside `with inputs.used(cu_seqlens):` they ask for such arrays; `inputs.write(other)` fills them
for other sequences of no more rows in all, of which there are no more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from .arena import outside
from .arrays import Array


class _Input(NamedTuple):
    compute: Callable[[Array], Array]
    array: Array


class PackedInputs:
    """Arrays on the device that follow from `cu_seqlens`, by name.

    Args:
        xp: CuPy.
        sequences: how many sequences a batch has at most.
        copy: has the device copy host arrays to arrays there, in order with its work, and lets the host go on.
    """

    def __init__(self, xp: Any, sequences: int, copy: Callable[[list[tuple[Array, Array]]], None]) -> None:
        self.sequences = sequences
        self._xp, self._copy = xp, copy
        self._inputs: dict[Hashable, _Input] = {}
        self._cu_seqlens: Array | None = None

    @contextmanager
    def used(self, cu_seqlens: Array) -> Iterator[None]:
        """Inside, this thread's operations take what follows from these `cu_seqlens` from here."""
        before, _local.inputs, self._cu_seqlens = _local.inputs, self, cu_seqlens
        try:
            yield
        finally:
            _local.inputs = before

    def get(self, name: Hashable, compute: Callable[[Array], Array], length: int, fill: int = 0) -> Array:
        """The array of this name: `compute(cu_seqlens)` and after it `fill` up to `length` in all."""
        found = self._inputs.get(name)
        if found is None:
            assert self._cu_seqlens is not None

            def padded(cu_seqlens: Array) -> Array:
                rows = compute(cu_seqlens)
                if len(rows) > length:
                    raise ValueError(f"cu_seqlens: {name} takes {len(rows)} places, expected at most {length}")
                whole = np.full((length, *rows.shape[1:]), fill, rows.dtype)
                whole[: len(rows)] = rows
                return whole

            first = padded(self._cu_seqlens)
            with outside():
                found = self._inputs[name] = _Input(padded, self._xp.empty(first.shape, first.dtype))
            self._copy([(found.array, first)])
        return found.array

    def write(self, cu_seqlens: Array) -> None:
        """Fill all arrays for these sequences."""
        self._copy([(each.array, each.compute(cu_seqlens)) for each in self._inputs.values()])


class _Local(threading.local):
    inputs: PackedInputs | None = None


_local = _Local()


def current() -> PackedInputs | None:
    """Where this thread's operations take what follows from packed sequences; None: they compute it."""
    return _local.inputs

"""What processes of one run (its ranks) do together, as one small interface; and the run of one process, where nothing
of it costs anything."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from ttr_kernels.common.arrays import Array

Operation = Literal["sum", "max", "min"]


@dataclass(frozen=True)
class Span:
    """A communication that ran in the background: seconds of time.perf_counter, and bytes of the array."""

    name: str
    begin: float
    end: float
    bytes: int


class Communicator(Protocol):
    """The ranks 0 … size − 1 of a run. Every method is called by all of them, in the same order.

    Arrays are C-contiguous: float64, float32, float16, bfloat16 or integers. Sums have a fixed order: the same numbers
    on the same ranks give the same bits, on every rank and every time.

    Attributes:
        rank, size: of this process, from 0, and of all.
        local_rank, local_size: likewise, among the processes of this machine.
        name: of the engine, for people to read.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    name: str

    def all_reduce(self, array: Array, operation: Operation = "sum") -> None:
        """Replace `array` by its sum (largest, smallest) over all ranks. MPI's sums of 16-bit floats are float32's."""

    def start_all_reduce(self, array: Array) -> None:
        """Begin a sum as in `all_reduce`, in the background, after those begun before; until `wait` nothing else may
        use the array, and no other method be called."""

    def wait(self) -> list[Span]:
        """Wait until all that `start_all_reduce` began is done; what ran when, as far as that is known."""

    def broadcast(self, array: Array, root: int = 0) -> None:
        """Replace `array` by that of rank `root`."""

    def all_gather(self, array: Array) -> Array:
        """(size, *shape): the arrays of all ranks, which are of one shape."""

    def reduce_scatter(self, array: Array) -> Array:
        """This rank's row of the sum over all ranks of arrays (size, …)."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def close(self) -> None:
        """Let go of what the engine holds."""


class LocalCommunicator:
    """One process alone: nothing to wait for."""

    rank, size, local_rank, local_size = 0, 1, 0, 1
    name = "one process"

    def all_reduce(self, array: Array, operation: Operation = "sum") -> None:
        pass

    def start_all_reduce(self, array: Array) -> None:
        pass

    def wait(self) -> list[Span]:
        return []

    def broadcast(self, array: Array, root: int = 0) -> None:
        pass

    def all_gather(self, array: Array) -> Array:
        return array[None].copy()

    def reduce_scatter(self, array: Array) -> Array:
        row: Array = array[0].copy()
        return row

    def barrier(self) -> None:
        pass

    def close(self) -> None:
        pass


LOCAL = LocalCommunicator()


def totals(communicator: Communicator, *values: float) -> tuple[float, ...]:
    """Each value's sum over all ranks, added in their order: the same bits on all."""
    if communicator.size == 1:
        return values
    rows = communicator.all_gather(np.array(values, np.float64))
    return tuple(sum(column) for column in rows.T.tolist())


def exchange(communicator: Communicator, value: Any) -> list[Any]:
    """What every rank says, in the order of ranks. Values travel as JSON: nothing is unpickled."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = communicator.all_gather(np.array([len(text)], np.int64)).reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = text
    rows = communicator.all_gather(padded)
    return [json.loads(row[: int(length)].tobytes()) for row, length in zip(rows, lengths, strict=True)]

"""Where packed sequences begin, when each position happened, and what follows from that for every layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from ttr_kernels.common import packing
from ttr_kernels.common.arena import outside
from ttr_kernels.common.arrays import Array, DType, array_module, empty
from ttr_kernels.embedding import embedding
from ttr_kernels.rope import RopeTable, rope_cos_sin


@dataclass(frozen=True)
class Sequences:
    """Packed sequences: `cu_seqlens` (N + 1,) int32 and `times` (total,) float64 in the data set's unit.

    `times` is where the model computes; `cu_seqlens` is a NumPy array everywhere.

    Raises ValueError where the two do not fit together.
    """

    cu_seqlens: Array
    times: Array

    def __post_init__(self) -> None:
        if self.times.dtype != np.float64 or self.times.ndim != 1:
            raise ValueError(
                f"times: got shape {self.times.shape} of {self.times.dtype}, expected (total,) of float64 "
                "(a float32 UNIX time steps by 128 s)"
            )
        if self.cu_seqlens.ndim != 1 or not len(self.cu_seqlens) or self.cu_seqlens[-1] != len(self.times):
            raise ValueError(f"cu_seqlens: expected (N + 1,) from 0 to the {len(self.times)} times")

    @staticmethod
    def batch(times: Array) -> Sequences:
        """The sequences of a (B, T) batch: B of length T."""
        if times.ndim != 2:
            raise ValueError(f"times: got shape {times.shape}, expected (B, T)")
        starts = np.arange(times.shape[0] + 1, dtype=np.int32) * np.int32(times.shape[1])
        return Sequences(starts, array_module(times).ascontiguousarray(times).reshape(-1))

    @property
    def total(self) -> int:
        """Positions in all sequences together."""
        return len(self.times)

    def positions(self) -> Array:
        """(total,) int64, NumPy: the position of each row in its own sequence, from 0."""
        return _positions(self.cu_seqlens)

    def gaps(self) -> Array:
        """(total,) float64: time since the position before, 0 at the start of a sequence."""
        xp, times = array_module(self.times), self.times
        gaps = empty(self.total, np.float64, times)
        xp.subtract(times[1:], times[:-1], out=gaps[1:])
        fixed = packing.current()
        # Row 0 is a start, and may be so more than once.
        gaps[self._there("starts", _starts, 0 if fixed is None else fixed.sequences)] = 0.0
        return gaps

    def elapsed(self) -> Array:
        """(total,) float64: time since the first position of its sequence."""
        elapsed: Array = self.times - self.times[self._there("first rows", _first_rows, self.total)]
        return elapsed

    def behind(self, pace: float) -> Array:
        """(total,) float64: time since the first position of its sequence / pace − positions since then."""
        behind: Array = self.elapsed() / pace - self._rows()
        return behind

    def _rows(self) -> Array:
        """`positions`, where the model computes."""
        fixed = packing.current()
        if fixed is not None:
            return fixed.get("positions", _positions, self.total)
        # By the method, not by `_there`: a continued sequence counts the positions before, too.
        rows: Array = array_module(self.times).asarray(self.positions())
        return rows

    def _there(self, name: str, compute: Callable[[Array], Array], length: int) -> Array:
        """`compute(cu_seqlens)`, where the model computes."""
        fixed = packing.current()
        if fixed is not None:
            return fixed.get(name, compute, length)
        there: Array = array_module(self.times).asarray(compute(self.cu_seqlens))
        return there

    def rope(self, dim: int, base: float, dtype: DType, unit: float | None = None) -> RopeTable:
        """The rotation of every row, by its position in its own sequence; with a unit of time by its time / unit."""
        if unit is not None:
            return rope_by_time(self.times, unit, dim, base, dtype)
        xp = array_module(self.times)
        # Sequences share their positions: angles are computed once for each, and kept for other batches. Those of a
        # batch at fixed places may be as long as it.
        last = self.total if packing.current() is not None else int(np.diff(self.cu_seqlens).max(initial=1)) - 1
        longest = 1 << last.bit_length()
        device = None if xp is np else self.times.device.id  # type: ignore[attr-defined]
        table = _rope_table(longest, dim, base, "float64" if dtype == np.float64 else "float32", xp, device)
        rows = self._rows()
        return RopeTable(embedding(rows, table.cos), embedding(rows, table.sin))


def rope_by_time(times: Array, unit: float, dim: int, base: float, dtype: DType) -> RopeTable:
    """The rotation of every row by its time, in units that take the place of positions.

    Angles are formed and reduced in float64: a query and a key then differ by the angle of the gap between them to
    2e-16 of their times, however far these are from the data set's origin.
    """
    return rope_cos_sin(times / unit, dim, base=base, dtype=np.float64 if dtype == np.float64 else np.float32)


@functools.lru_cache(maxsize=8)
def _rope_table(positions: int, dim: int, base: float, dtype: str, xp: ModuleType, device: int | None) -> RopeTable:
    with outside():
        return rope_cos_sin(xp.arange(positions), dim, base=base, dtype=np.dtype(dtype))


def _positions(cu_seqlens: Array) -> Array:
    starts, lengths, total = cu_seqlens[:-1], np.diff(cu_seqlens), int(cu_seqlens[-1])
    starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    # Ones, but back to 0 at each start, summed up.
    steps, positions = empty(total, np.int64), empty(total, np.int64)
    steps.fill(1)
    steps[starts[:1]] = 0
    steps[starts[1:]] = 1 - lengths[:-1]
    np.cumsum(steps, out=positions)
    return positions


def _starts(cu_seqlens: Array) -> Array:
    starts: Array = cu_seqlens[:-1][cu_seqlens[:-1] < cu_seqlens[-1]]
    return starts


def _first_rows(cu_seqlens: Array) -> Array:
    return np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))

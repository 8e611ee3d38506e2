"""Sequences that go on where a cache stands."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ttr_kernels.common.arrays import Array, DType, array_module
from ttr_kernels.rope import RopeTable, rope_cos_sin

from .sequences import Sequences, rope_by_time


@dataclass(frozen=True)
class Continuation(Sequences):
    """New positions of sequences whose earlier ones are in a cache.

    Attributes:
        before: (N,) int64, NumPy: positions that each sequence has had before.
        previous_times: (N,) float64 like `times`: when the last of those happened; anything where there was none.
        first_times: (N,) float64 like `times`: when the first of those happened; None where nobody asks for `elapsed`.
    """

    before: Array
    previous_times: Array
    first_times: Array | None = None

    def positions(self) -> Array:
        """(total,) int64, NumPy: the position of each row in its own sequence, those before it counted."""
        positions: Array = super().positions() + np.repeat(self.before, np.diff(self.cu_seqlens))
        return positions

    def gaps(self) -> Array:
        """(total,) float64: time since the position before, 0 at the start of a sequence."""
        xp = array_module(self.times)
        gaps: Array = super().gaps()
        going_on = np.flatnonzero((self.before > 0) & (np.diff(self.cu_seqlens) > 0))
        rows, sequences = xp.asarray(self.cu_seqlens[:-1][going_on]), xp.asarray(going_on)
        gaps[rows] = self.times[rows] - self.previous_times[sequences]
        return gaps

    def elapsed(self) -> Array:
        """(total,) float64: time since the first position of its sequence, however long ago it was."""
        if self.first_times is None:
            raise ValueError("first_times: got None, expected when these sequences began")
        xp, elapsed = array_module(self.times), super().elapsed()
        going_on = np.flatnonzero(self.before > 0)
        since = xp.zeros(len(self.before))
        starts = np.minimum(self.cu_seqlens[:-1], max(self.total - 1, 0))[going_on]
        since[xp.asarray(going_on)] = self.times[xp.asarray(starts)] - self.first_times[xp.asarray(going_on)]
        result: Array = elapsed + since[xp.asarray(np.repeat(np.arange(len(self.before)), np.diff(self.cu_seqlens)))]
        return result

    def rope(self, dim: int, base: float, dtype: DType, unit: float | None = None) -> RopeTable:
        """The rotation of every row; the angles of these rows alone, however late in their sequences they come."""
        if unit is not None:
            return rope_by_time(self.times, unit, dim, base, dtype)
        wide = np.float64 if dtype == np.float64 else np.float32
        return rope_cos_sin(array_module(self.times).asarray(self.positions()), dim, base=base, dtype=wide)

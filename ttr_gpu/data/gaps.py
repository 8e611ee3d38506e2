"""Distribution of the gaps between neighbouring events, in one pass and little memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

# Bins per factor of ten, over 10^-15 .. 10^15: quantiles are right to 0.6 %.
_PER_DECADE = 200
_DECADES = 15

# Gaps from which on a common step is believed in; and finest step looked for, as a power of ten.
_GRID_LEAST, _FINEST = 100, 6


class Grid:
    """The step of the clock: the greatest number of which all gaps are multiples, if one is coarse enough to be known.

    Decimal steps down to 1e-6 are tried: the finest of them that all gaps are multiples of gives, by the greatest
    common divisor, the step. float64 times far from their origin are no exact multiples: a hundredth of a step is
    allowed for.
    """

    def __init__(self) -> None:
        self._digits, self._divisor, self._count = 0, 0, 0

    def add(self, gaps: np.ndarray[Any, Any]) -> None:
        """Take in positive gaps."""
        self._count += len(gaps)
        while self._digits <= _FINEST:
            multiples = gaps * 10.0**self._digits
            whole = np.rint(multiples)
            if (np.abs(multiples - whole) < 0.01).all() and whole.min() >= 1 and whole.max() < 2.0**53:
                self._divisor = int(np.gcd.reduce(np.append(whole.astype(np.int64), self._divisor)))
                return
            self._digits += 1
            self._divisor *= 10

    def step(self) -> float | None:
        """The step, in the unit of the gaps; None where there is none, or too few gaps to tell."""
        if self._digits > _FINEST or self._count < _GRID_LEAST:
            return None
        return self._divisor / 10.0**self._digits


class GapHistogram:
    """Counts of gaps in logarithmic bins; exactly: mean, extremes, mean and deviation of the logarithm, the grid."""

    def __init__(self) -> None:
        self.counts = np.zeros(2 * _DECADES * _PER_DECADE, np.int64)
        self.zeros, self.sum = 0, 0.0
        self.least, self.most = np.inf, 0.0
        self.log_sum, self.log_squares = 0.0, 0.0
        self._grid = Grid()

    @property
    def total(self) -> int:
        """Gaps seen, zero ones included."""
        return self.zeros + int(self.counts.sum())

    def add(self, gaps: np.ndarray[Any, Any]) -> None:
        """Count gaps, which are >= 0."""
        positive = gaps[gaps > 0]
        self.zeros += len(gaps) - len(positive)
        if not len(positive):
            return
        self.sum += float(positive.sum())
        self.least, self.most = min(self.least, float(positive.min())), max(self.most, float(positive.max()))
        logs = np.log(positive)
        self.log_sum += float(logs.sum())
        self.log_squares += float((logs * logs).sum())
        self._grid.add(positive)
        index = np.floor((np.log10(positive) + _DECADES) * _PER_DECADE).astype(np.int64)
        self.counts += np.bincount(np.clip(index, 0, len(self.counts) - 1), minlength=len(self.counts))

    def quantile(self, share: float, nonzero: bool = False) -> float | None:
        """The gap below which `share` of the gaps lie (of the positive ones with `nonzero`); None if there are none."""
        zeros = 0 if nonzero else self.zeros
        total = zeros + int(self.counts.sum())
        if not total:
            return None
        rank = share * total - zeros
        if rank <= 0 and zeros:
            return 0.0
        at = int(np.searchsorted(np.cumsum(self.counts), max(rank, 1)))
        middle = 10 ** ((at + 0.5) / _PER_DECADE - _DECADES)
        return float(min(max(middle, self.least), self.most))

    def decades(self) -> list[tuple[float, float, int]]:
        """(from, to, count) for each half decade between the extremes."""
        half = _PER_DECADE // 2
        counts = self.counts.reshape(-1, half).sum(axis=1)
        used = np.flatnonzero(counts)
        if not len(used):
            return []
        edges = 10 ** (np.arange(len(counts) + 1) / 2 - _DECADES)
        return [(float(edges[i]), float(edges[i + 1]), int(counts[i])) for i in range(used[0], used[-1] + 1)]

    def summary(self) -> dict[str, float | int | None]:
        """What a data set's attributes say about the gaps of its training split."""
        positive = self.total - self.zeros
        log_mean = self.log_sum / positive if positive else None
        variance = self.log_squares / positive - log_mean**2 if log_mean is not None else 0.0
        return {
            "log_mean": log_mean, "log_std": math.sqrt(max(variance, 0.0)) if positive else None,
            "least_nonzero": self.least if positive else None, "grid": self._grid.step(),
            "count": self.total, "zeros": self.zeros, "mean": self.sum / self.total if self.total else None,
            "median": self.quantile(0.5), "median_nonzero": self.quantile(0.5, nonzero=True),
            "p01": self.quantile(0.01), "p10": self.quantile(0.1), "p90": self.quantile(0.9),
            "p99": self.quantile(0.99), "max": self.most,
        }  # fmt: skip

"""Distribution of the gaps between neighbouring events, in one pass and little memory."""

from __future__ import annotations

from typing import Any

import numpy as np

# Bins per factor of ten, over 10^-15 .. 10^15: quantiles are right to 0.6 %.
_PER_DECADE = 200
_DECADES = 15


class GapHistogram:
    """Counts of gaps in logarithmic bins; exact mean and extremes."""

    def __init__(self) -> None:
        self.counts = np.zeros(2 * _DECADES * _PER_DECADE, np.int64)
        self.zeros, self.sum = 0, 0.0
        self.least, self.most = np.inf, 0.0

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
        return {
            "count": self.total, "zeros": self.zeros, "mean": self.sum / self.total if self.total else None,
            "median": self.quantile(0.5), "median_nonzero": self.quantile(0.5, nonzero=True),
            "p01": self.quantile(0.01), "p10": self.quantile(0.1), "p90": self.quantile(0.9),
            "p99": self.quantile(0.99), "max": self.most,
        }  # fmt: skip

"""How good distributions of gaps are: likelihood, error of their medians, calibration. In bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..nn.gap_distribution import GapDistribution

# Central intervals whose coverage is counted.
INTERVALS = (0.5, 0.8, 0.95)
# Values of the distribution function are counted in so many bins: the Kolmogorov-Smirnov statistic is right to 1e-4.
_BINS, _SHOWN = 10_000, 20
# Components that are evaluated at a time.
_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class GapFigures:
    """Figures over all gaps of a split, each a mean over gaps.

    Attributes:
        nll: −log p(gap) in nats, of a density per unit of time.
        dequantised_nll: with gaps spread over the cells of the clock's grid: −log(P(cell) / step); None without a grid.
        mae, rmse: mean absolute and root mean square error of the median, in units of time.
        coverage: share of gaps inside the central interval of each nominal share.
        pit: P(gap <= the observed one), the probability integral transform: shares in 20 bins, 0.05 if calibrated.
        ks: Kolmogorov-Smirnov distance of these probabilities from uniform; by time rescaling, of the compensators
            −log(1 − P) from unit exponentials (Brown et al. 2002).
        ks_critical: what 5 % of samples of the true process would exceed.
    """

    nll: float
    dequantised_nll: float | None
    mae: float
    rmse: float
    coverage: dict[float, float]
    pit: list[float]
    ks: float
    ks_critical: float


class GapScorer:
    """Adds up the figures of distributions and the gaps that then happened.

    Args:
        step: of the clock's grid, or None.
    """

    def __init__(self, step: float | None) -> None:
        self._step = step
        self._count = 0
        self._nats = self._cell_nats = self._absolute = self._squares = 0.0
        self._bins = np.zeros(_BINS, np.int64)
        self._inside = dict.fromkeys(INTERVALS, 0)

    def add(self, distribution: GapDistribution, gaps: Any, given_type: GapDistribution | None = None) -> None:
        """Take in gaps (n,), zero ones as they are scored, and the distributions (n) that they were drawn from.

        Args:
            given_type: the distributions that knew the type at the gap's end, where a model has such: the likelihood,
                which joins that of the type, is theirs.
        """
        self._count += len(gaps)
        likely = distribution if given_type is None else given_type
        self._nats += float(likely.nll(gaps).sum())
        if self._step is not None:
            self._cell_nats += float(likely.cell_nll(gaps, self._step).sum())
        errors = distribution.quantile(0.5) - gaps
        self._absolute += float(np.abs(errors).sum())
        self._squares += float((errors * errors).sum())
        below = distribution.cdf(gaps)
        self._bins += np.bincount(np.minimum((below * _BINS).astype(np.int64), _BINS - 1), minlength=_BINS)
        for share in INTERVALS:
            self._inside[share] += int((np.abs(below - 0.5) <= 0.5 * share).sum())

    def figures(self) -> GapFigures:
        """What was found. ValueError if there was no gap."""
        count = self._count
        if not count:
            raise ValueError("gaps: got none, expected at least one")
        found = np.concatenate([[0], np.cumsum(self._bins)]) / count
        return GapFigures(
            nll=self._nats / count,
            dequantised_nll=None if self._step is None else self._cell_nats / count,
            mae=self._absolute / count, rmse=math.sqrt(self._squares / count),
            coverage={share: inside / count for share, inside in self._inside.items()},
            pit=(self._bins.reshape(_SHOWN, -1).sum(axis=1) / count).tolist(),
            ks=float(np.abs(found - np.linspace(0, 1, _BINS + 1)).max()),
            # The asymptotic distribution's 95 % point (Smirnov 1948).
            ks_critical=1.3581 / math.sqrt(count),
        )  # fmt: skip


def in_parts(rows: int, components: int) -> Iterator[slice]:
    """Rows in pieces whose components are evaluated together."""
    size = max(1, _AT_ONCE // max(1, components))
    for begin in range(0, rows, size):
        yield slice(begin, min(begin + size, rows))

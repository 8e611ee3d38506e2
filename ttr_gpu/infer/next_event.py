"""What comes next in a stream of events: which type, and when, given that nothing has come for some time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ttr_kernels.common.arrays import Array

from ..nn.gap_distribution import GapDistribution


@dataclass(frozen=True)
class NextEvent:
    """The distribution of one stream's next event.

    Attributes:
        types: (V,) probabilities of its type.
        last_time: when the newest event happened, in the data set's unit (its origin included).
        at: until when nothing more has come; `last_time` if that is all that is known.
        gap: distribution of the time from the newest event to the next, one row; None if the model has no time head.
    """

    types: Array
    last_time: float
    at: float
    gap: GapDistribution | None

    def quantiles(self, probabilities: Array | list[float]) -> Array:
        """The times by which the next event will have come with these probabilities (P,): each at least `at`.

        ValueError for a model without a time head, or a probability outside [0, 1].
        """
        wanted, elapsed = np.asarray(probabilities, np.float64), np.array([self.at - self.last_time])
        times: Array = self.last_time + self._gap().quantiles_after(wanted, elapsed)[0]
        return times

    def density(self, times: Array) -> Array:
        """p(t) per unit of time at these times (n,), given that nothing has come until `at`: 0 up to there.

        ValueError for a model without a time head.
        """
        gap = self._gap()
        times = np.asarray(times, np.float64)
        survival = np.exp(gap.log_survival(np.array([self.at - self.last_time]))[0])
        density = gap.pdf(times - self.last_time)
        with np.errstate(divide="ignore", invalid="ignore"):
            result: Array = np.where(times > self.at, density / survival, 0.0)
        # Long overdue: no probability is left that float64 could tell.
        return result if survival > 0 else np.zeros_like(result)

    def _gap(self) -> GapDistribution:
        if self.gap is None:
            raise ValueError("this model does not say when the next event comes: train with model.time_components > 0")
        return self.gap

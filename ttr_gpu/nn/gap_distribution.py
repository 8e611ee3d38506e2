"""The distribution of gaps to the next event, one per row: what a time head answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ttr_kernels import log_normal_mixture
from ttr_kernels.common.arrays import Array


@dataclass(frozen=True)
class GapDistribution:
    """Mixtures of log-normals in the data set's own unit of time.

    Attributes:
        weight_logits, means, log_scales: (rows, K) float64 NumPy arrays; means and scales are those of log gap.
    """

    weight_logits: Array
    means: Array
    log_scales: Array

    def __getitem__(self, rows: Array | slice) -> GapDistribution:
        """The distributions of these rows."""
        return GapDistribution(self.weight_logits[rows], self.means[rows], self.log_scales[rows])

    def nll(self, gaps: Array) -> Array:
        """−log p(gap) in nats, of a density per unit of time; gaps (rows,) float64, positive."""
        losses, _ = log_normal_mixture.log_normal_mixture_forward(gaps, *self._parameters())
        return losses

    def pdf(self, gaps: Array) -> Array:
        """p(τ) per unit of time (rows,); gaps (rows,), or (n,) for a single row."""
        return log_normal_mixture.pdf(gaps, *self._parameters())

    def cdf(self, gaps: Array) -> Array:
        """P(gap <= τ) (rows,)."""
        return log_normal_mixture.cdf(gaps, *self._parameters())

    def log_survival(self, gaps: Array) -> Array:
        """log P(gap > τ) (rows,)."""
        return log_normal_mixture.log_survival(gaps, *self._parameters())

    def quantile(self, probability: Array | float) -> Array:
        """The τ with P(gap <= τ) = probability (rows,)."""
        return log_normal_mixture.quantile(probability, *self._parameters())

    def quantiles_after(self, probabilities: Array, elapsed: Array) -> Array:
        """The τ with P(gap <= τ | gap > elapsed) = probability: (rows, P) for (P,) and elapsed (rows,), float64."""
        # Only here: it loads numba, which training on a GPU can do without.
        from ttr_kernels.log_normal_mixture.waiting import waiting_quantiles

        return waiting_quantiles(probabilities, elapsed, *self._parameters())

    def sample(self, *, seed: int, offset: int = 0, rows: Array | None = None) -> Array:
        """One gap per row, a pure function of (seed, offset, row); `rows` (rows,) names other rows than 0, 1, …."""
        return log_normal_mixture.sample(*self._parameters(), seed=seed, offset=offset, rows=rows)

    def cell_nll(self, gaps: Array, step: float) -> Array:
        """Dequantised −log p of gaps on a grid of this step: −log(P(cell of the gap) / step), the cell being
        [gap − step/2, gap + step/2], cut off at 0. Probabilities of all cells sum to 1: it is bounded by log step."""
        low, high = np.maximum(gaps - 0.5 * step, 0.0), gaps + 0.5 * step
        share_below = self.cdf(low)
        below = self.cdf(high) - share_below
        # Where the distribution function is near 1, the difference of survivals is the exact one.
        above = np.exp(self.log_survival(low)) - np.exp(self.log_survival(high))
        mass = np.where(share_below > 0.5, above, below)
        with np.errstate(divide="ignore"):
            result: Array = np.log(step) - np.log(mass)
        return result

    def _parameters(self) -> tuple[Array, Array, Array]:
        return self.weight_logits, self.means, self.log_scales

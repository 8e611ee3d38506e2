"""The distribution of the gap to the next event: a mixture of log-normals (Shchur et al. 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from ttr_kernels.common.arrays import Array, array_module, contiguous, empty
from ttr_kernels.log_normal_mixture import (
    LogNormalMixtureSaved,
    log_normal_mixture_backward,
    log_normal_mixture_forward,
)
from ttr_kernels.matmul import LinearSaved, linear, linear_backward, linear_forward

from ..backend import to_host
from ..precision import Precision
from .gap_distribution import GapDistribution
from .parameter import Parameter, normal


@dataclass(frozen=True)
class TimeHeadSaved:
    """What the forward keeps for the backward.

    Attributes:
        slope: (total, K) d log σ / ds.
        losses: (total,) nats of each position, 0 where it is not scored.
        weight: (total,) of each position's loss in the mean.
    """

    project: LinearSaved
    mixture: LogNormalMixtureSaved
    slope: Array
    losses: Array
    weight: Array


class TimeHead:
    """log gap ~ Σ_k softmax(a)_k N(log_mean + log_std · m_k, σ_k),  (a, m, s) = W x + b,  σ = floor + log_std · exp(s).

    `log_mean` and `log_std` are location and scale of the training split's log gaps, so that the unit of time does not
    matter for training; the density is that of the gap in the data set's own unit. The kernel sees gap / exp(log_mean),
    whose density differs by the factor exp(log_mean) (the Jacobian): its logarithm is added to the loss.

    `min_sigma`, the floor, bounds the density: on times that repeat exactly (a clock's grid) it could grow for ever.
    A gap of zero, of which a log-normal knows nothing, is scored as if it were `zero_gap`.

    It computes in the master precision (float32), whatever the model's.
    """

    def __init__(
        self, embed_dim: int, components: int, *, log_mean: float, log_std: float, min_sigma: float, zero_gap: float,
        precision: Precision, rng: np.random.Generator, name: str,
    ) -> None:  # fmt: skip
        self.components, self.precision = components, precision
        self.log_mean, self.log_std, self.min_sigma, self.zero_gap = log_mean, log_std, min_sigma, zero_gap
        master = precision.master
        self.weight = Parameter(f"{name}.weight", normal(rng, (3 * components, embed_dim), 0.02, master))
        # Components begin at the quantiles of a normal distribution: together they are about the marginal one.
        shares = (np.arange(components) + 0.5) / components
        quantiles = [NormalDist().inv_cdf(share) for share in shares]
        width = 1.0 if components == 1 else 0.5
        bias = np.concatenate([np.zeros(components), quantiles, np.full(components, math.log(width))])
        self.bias = Parameter(f"{name}.bias", bias.astype(master), decay=False)

    @property
    def parameters(self) -> list[Parameter]:
        """All parameters, in the order of the forward."""
        return [self.weight, self.bias]

    def positive(self, gaps: Array) -> Array:
        """Gaps as they are scored: `zero_gap` for those of zero."""
        scored: Array = array_module(gaps).where(gaps > 0, gaps, self.zero_gap)
        return scored

    def distribution(self, x: Array) -> GapDistribution:
        """x (rows, C), from the final norm -> the distribution of the gap after each row."""
        raw = linear(x.astype(self.precision.master, copy=False), self.weight.value, self.bias.value)
        logits, means, log_scales, _ = self._mixture(raw)
        logits, means, log_scales = (to_host(array).astype(np.float64) for array in (logits, means, log_scales))
        return GapDistribution(logits, means + self.log_mean, log_scales)

    def loss_forward(self, x: Array, gaps: Array, scored: Array) -> tuple[Any, TimeHeadSaved]:
        """x (total, C) from the final norm, gaps (total,) float64 -> mean −log p(gap) in nats over what is scored.

        Args:
            scored: (total,) bool; where it is not, gaps may be anything.
        """
        xp, master = array_module(x), self.precision.master
        raw, project = linear_forward(contiguous(x, master), self.weight.value, self.bias.value)
        logits, means, log_scales, slope = self._mixture(raw)
        relative, unit = empty(gaps.shape, np.float64, x), math.exp(-self.log_mean)
        none = empty(gaps.shape, bool, x)
        xp.multiply(gaps, unit, out=relative)
        xp.copyto(relative, self.zero_gap * unit, where=xp.logical_not(xp.greater(gaps, 0, out=none), out=none))
        xp.copyto(relative, 1.0, where=xp.logical_not(scored, out=none))
        nll, mixture = log_normal_mixture_forward(relative, logits, means, log_scales)
        losses = xp.add(nll, master.type(self.log_mean), out=empty(nll.shape, master, x))
        xp.copyto(losses, master.type(0), where=none)
        weight = contiguous(scored, master)
        weight /= xp.maximum(scored.sum(), 1).astype(master)
        total = xp.multiply(losses, weight, out=empty(nll.shape, master, x)).sum(dtype=np.float64)
        return total, TimeHeadSaved(project, mixture, slope, losses, weight)

    def loss_backward(self, dloss: float, saved: TimeHeadSaved) -> Array:
        """-> dx (total, C) in the master precision; adds to the parameters' gradients."""
        k = self.components
        draw = empty((len(saved.slope), 3 * k), self.precision.master, saved.slope)
        dlosses = empty(saved.weight.shape, self.precision.master, saved.weight)
        array_module(dlosses).multiply(saved.weight, self.precision.master.type(dloss), out=dlosses)
        dlogits, dmeans, dlog_scales = draw[:, :k], draw[:, k : 2 * k], draw[:, 2 * k :]
        log_normal_mixture_backward(
            dlosses, saved.mixture, dweight_logits=dlogits, dmeans=dmeans, dlog_scales=dlog_scales
        )
        dmeans *= self.precision.master.type(self.log_std)
        dlog_scales *= saved.slope
        dx, _, _ = linear_backward(draw, saved.project, dweight=self.weight.gradient, dbias=self.bias.gradient)
        return dx

    def _mixture(self, raw: Array) -> tuple[Array, Array, Array, Array]:
        """Logits, means (relative to log_mean) and log σ, (rows, K) each; and d log σ / ds = 1 − floor / σ."""
        xp, number, k = array_module(raw), self.precision.master.type, self.components
        means, log_scales, slope = (empty((len(raw), k), raw.dtype, raw) for _ in range(3))
        xp.multiply(raw[:, k : 2 * k], number(self.log_std), out=means)
        scale = xp.add(raw[:, 2 * k :], number(math.log(self.log_std)), out=slope)
        # What has diverged is found by its loss.
        with np.errstate(over="ignore", invalid="ignore"):
            xp.logaddexp(scale, number(math.log(self.min_sigma)), out=log_scales)
            xp.exp(xp.subtract(scale, log_scales, out=slope), out=slope)
        return raw[:, :k], means, log_scales, slope

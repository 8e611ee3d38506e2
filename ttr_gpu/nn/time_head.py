"""The distribution of the gap to the next event: a mixture of log-normals (Shchur et al. 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from ttr_kernels.common.arrays import Array, array_module, contiguous, empty, is_array
from ttr_kernels.embedding import EmbeddingSaved, embedding_backward, embedding_forward
from ttr_kernels.geglu import GegluSaved, geglu_backward, geglu_forward
from ttr_kernels.log_normal_mixture import (
    LogNormalMixtureSaved,
    log_normal_mixture_backward,
    log_normal_mixture_forward,
)
from ttr_kernels.log_normal_mixture.survival import CensoredSaved, censored_backward, censored_forward
from ttr_kernels.matmul import LinearSaved, linear, linear_backward, linear_forward

from ..backend import to_host
from ..precision import Precision
from .gap_distribution import GapDistribution
from .parameter import Parameter, normal

# Types over which `marginal` mixes: the likeliest, with their probabilities scaled to 1.
MARGINAL_TYPES = 64


@dataclass(frozen=True)
class GivenTypeSaved:
    """What a head that is given the type keeps of its hidden layer."""

    enter: LinearSaved
    types: EmbeddingSaved
    hidden: GegluSaved


@dataclass(frozen=True)
class TimeHeadSaved:
    """What the forward keeps for the backward.

    Attributes:
        given: of the hidden layer; None without one.
        slope: (total, K) d log σ / ds.
        losses: (total,) nats of each position, 0 where it is not scored.
        weight: (total,) of each scored position's loss in the mean.
        censored: positions after which nothing came, and what their likelihood keeps; None where there are none.
        share: weight of each of those in the mean; a number, on a GPU an array of one.
    """

    given: GivenTypeSaved | None
    project: LinearSaved
    mixture: LogNormalMixtureSaved
    slope: Array
    losses: Array
    weight: Array
    censored: tuple[Array, CensoredSaved] | None
    share: Any


class TimeHead:
    """log gap ~ Σ_k softmax(a)_k N(log_mean + log_std · m_k, σ_k),  (a, m, s) = W x + b,  σ = floor + log_std · exp(s).

    `log_mean` and `log_std` are location and scale of the training split's log gaps, so that the unit of time does not
    matter for training; the density is that of the gap in the data set's own unit. The kernel sees gap / exp(log_mean),
    whose density differs by the factor exp(log_mean) (the Jacobian): its logarithm is added to the loss.

    With a number of `types` the distribution depends on the type v of the event at the gap's end: in place of x stands
    geglu(U x + e_v), with an embedding e of the types, so that joint likelihoods are p(v | h) p(gap | h, v).

    `min_sigma`, the floor, bounds the density: on times that repeat exactly (a clock's grid) it could grow for ever.
    A gap of zero, of which a log-normal knows nothing, is scored as if it were `zero_gap`.

    It computes in the master precision (float32), whatever the model's.
    """

    def __init__(
        self, embed_dim: int, components: int, *, log_mean: float, log_std: float, min_sigma: float, zero_gap: float,
        types: int | None, precision: Precision, rng: np.random.Generator, name: str,
    ) -> None:  # fmt: skip
        self.components, self.types, self.precision = components, types, precision
        self.log_mean, self.log_std, self.min_sigma, self.zero_gap = log_mean, log_std, min_sigma, zero_gap
        master = precision.master
        self.enter: Parameter | None = None
        self.table: Parameter | None = None
        deviation = 0.02
        if types is not None:
            enter = normal(rng, (2 * embed_dim, embed_dim), embed_dim**-0.5, master)
            self.enter = Parameter(f"{name}.enter.weight", enter)
            self.table = Parameter(f"{name}.type.weight", normal(rng, (types, 2 * embed_dim), 0.5, master))
            deviation = 0.05
        self.weight = Parameter(f"{name}.weight", normal(rng, (3 * components, embed_dim), deviation, master))
        # Components begin at the quantiles of a normal distribution: together they are about the marginal one.
        shares = (np.arange(components) + 0.5) / components
        quantiles = [NormalDist().inv_cdf(share) for share in shares]
        width = 1.0 if components == 1 else 0.5
        bias = np.concatenate([np.zeros(components), quantiles, np.full(components, math.log(width))])
        self.bias = Parameter(f"{name}.bias", bias.astype(master), decay=False)

    @property
    def parameters(self) -> list[Parameter]:
        """All parameters, in the order of the forward."""
        return [p for p in (self.enter, self.table, self.weight, self.bias) if p is not None]

    @property
    def marginal_components(self) -> int:
        """Log-normals in the distribution of a gap whose type is not known."""
        return self.components * (1 if self.types is None else min(MARGINAL_TYPES, self.types))

    def positive(self, gaps: Array) -> Array:
        """Gaps as they are scored: `zero_gap` for those of zero."""
        scored: Array = array_module(gaps).where(gaps > 0, gaps, self.zero_gap)
        return scored

    def distribution(self, x: Array, types: Array | None = None) -> GapDistribution:
        """x (rows, C), from the final norm -> the distribution of the gap after each row.

        types (rows,): of the events at the gaps' ends, for a head that is given them.
        """
        hidden, _ = self._enter(contiguous(x, self.precision.master), types)
        raw = linear(hidden, self.weight.value, self.bias.value)
        logits, means, log_scales, _ = self._mixture(raw)
        logits, means, log_scales = (to_host(array).astype(np.float64) for array in (logits, means, log_scales))
        return GapDistribution(logits, means + self.log_mean, log_scales)

    def marginal(self, x: Array, type_logits: Array) -> GapDistribution:
        """The distribution of the gap whatever the type at its end: Σ_v p(v) p(gap | v), over the likeliest types.

        x (rows, C) from the final norm, type_logits (rows, V) a NumPy array -> (rows, K · types).
        """
        rows, count = len(x), min(MARGINAL_TYPES, type_logits.shape[1])
        best = np.argpartition(-type_logits, count - 1, axis=1)[:, :count].astype(np.int32)
        logits = np.take_along_axis(type_logits, best, axis=1).astype(np.float64)
        each = self.distribution(x.repeat(count, axis=0), array_module(x).asarray(best.reshape(-1)))
        # Weights of the components of one type sum to 1 before they share that type's probability.
        shares = each.weight_logits - np.logaddexp.reduce(each.weight_logits, axis=1, keepdims=True)
        joint = shares.reshape(rows, count, -1) + logits[:, :, None]
        return GapDistribution(joint.reshape(rows, -1), each.means.reshape(rows, -1), each.log_scales.reshape(rows, -1))

    def loss_forward(
        self, x: Array, gaps: Array, scored: Array, targets: Array, censored: Array | None = None
    ) -> tuple[Any, TimeHeadSaved]:
        """x (total, C) from the final norm, gaps (total,) float64 -> mean −log p(gap) in nats over what is scored.

        Args:
            scored: (total,) bool; where it is not, gaps may be anything.
            targets: (total,) types at the gaps' ends, for a head that is given them; anything where not scored.
            censored: (n,) positions, none of them scored, after which nothing came for at least the gap: −log P(gap >
                that) of each is added to the sum, which is divided by the number of scored positions still.

        Raises ValueError for censored positions and a head that is given the type: the type has not come either.
        """
        if censored is not None and self.types is not None:
            raise ValueError("censored: got positions, expected None for a time head that is given the type")
        xp, master = array_module(x), self.precision.master
        types = None if self.types is None else xp.where(scored, targets, 0)
        hidden, given = self._enter(contiguous(x, master), types)
        raw, project = linear_forward(hidden, self.weight.value, self.bias.value)
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
        share = 1 / xp.maximum(scored.sum(), 1).astype(master)
        weight *= share
        total = xp.multiply(losses, weight, out=empty(nll.shape, master, x)).sum(dtype=np.float64)
        if censored is None:
            return total, TimeHeadSaved(given, project, mixture, slope, losses, weight, None, share)
        at = xp.asarray(censored)
        survived, kept = censored_forward(gaps[at] * unit, logits[at], means[at], log_scales[at])
        losses[at] = survived.astype(master)
        total = total + share * survived.sum()
        return total, TimeHeadSaved(given, project, mixture, slope, losses, weight, (at, kept), share)

    def loss_backward(self, dloss: Any, saved: TimeHeadSaved, accumulate: bool = True) -> Array:
        """-> dx (total, C) in the master precision; adds to the parameters' gradients, or writes those of its products
        (not that of `table`)."""
        k, master = self.components, self.precision.master
        draw = empty((len(saved.slope), 3 * k), self.precision.master, saved.slope)
        dlosses = empty(saved.weight.shape, self.precision.master, saved.weight)
        factor = dloss.astype(master) if is_array(dloss) else master.type(dloss)
        array_module(dlosses).multiply(saved.weight, factor, out=dlosses)
        dlogits, dmeans, dlog_scales = draw[:, :k], draw[:, k : 2 * k], draw[:, 2 * k :]
        log_normal_mixture_backward(
            dlosses, saved.mixture, dweight_logits=dlogits, dmeans=dmeans, dlog_scales=dlog_scales
        )
        if saved.censored is not None:
            at, kept = saved.censored
            each = array_module(draw).full(len(at), dloss) * saved.share
            for part, gradient in zip((dlogits, dmeans, dlog_scales), censored_backward(each, kept), strict=True):
                part[at] = gradient.astype(draw.dtype)
        dmeans *= self.precision.master.type(self.log_std)
        dlog_scales *= saved.slope
        dhidden, _, _ = linear_backward(
            draw, saved.project, dweight=self.weight.gradient, dbias=self.bias.gradient, accumulate=accumulate
        )
        if saved.given is None or self.enter is None or self.table is None:
            return dhidden
        dfused, _ = geglu_backward(dhidden, saved.given.hidden)
        embedding_backward(dfused, saved.given.types, dtable=self.table.gradient)
        dx, _, _ = linear_backward(dfused, saved.given.enter, dweight=self.enter.gradient, accumulate=accumulate)
        return dx

    def _enter(self, x: Array, types: Array | None) -> tuple[Array, GivenTypeSaved | None]:
        """x itself, or the hidden layer of a head that is given the type."""
        if self.enter is None or self.table is None:
            return x, None
        if types is None:
            raise ValueError("types: got None, expected those of the next events, which this time head is given")
        fused, enter = linear_forward(x, self.enter.value)
        embedded, embedding = embedding_forward(types, self.table.value)
        fused += embedded
        hidden, geglu = geglu_forward(fused)
        return hidden, GivenTypeSaved(enter, embedding, geglu)

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

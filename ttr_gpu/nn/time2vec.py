"""Time2Vec features (Kazemi et al. 2019) of timestamps and of gaps, brought to the model's width."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ttr_kernels.common.arrays import Array, array_module, empty
from ttr_kernels.matmul import LinearSaved, linear_backward, linear_forward
from ttr_kernels.time2vec import Time2VecSaved, time2vec_backward, time2vec_forward

from ..backend import to_host
from ..precision import Precision
from .parameter import Parameter, normal
from .sequences import Sequences


@dataclass(frozen=True)
class TimeEncodingSaved:
    """What the forward keeps for the backward."""

    features: list[Time2VecSaved]
    project: LinearSaved


# Of s(u), whose range is about ±10 for sequences of some thousand events.
_PACE_PERIODS = 24.0, 1.0


def time_kinds(features: str, pace: float) -> list[str]:
    """The parts of a TimeEncoding, in order; none where nothing of time is embedded."""
    kinds = {"none": [], "both": ["absolute", "gap"]}.get(features, [features])
    return [*kinds, "pace"] if pace else kinds


class TimeEncoding:
    """y = W · [time2vec(t / span), time2vec(log(1 + gap / scale)), time2vec(s(u))], any of the parts.

    Timestamps are divided by the longest span, so that one optimizer step turns a phase by at most the learning rate
    whatever the unit; the periods begin spread evenly in log between `scale` and `span`. Gaps enter as logarithms: they
    range over many orders of magnitude.

    u = time since the sequence began / pace − number of events since: how far the sequence is behind a steady pace (for
    one event per mean gap, the compensated count of a Poisson process). Where what was missed is made up for, or what
    was too much is followed by a rest, the next event depends on it, and attention, an average, would have to sum up
    the whole past to know it. s(u) = sign(u) log(1 + |u|).
    """

    def __init__(
        self, embed_dim: int, *, features: str, features_dim: int, scale: float, span: float, pace: float = 0.0,
        precision: Precision, rng: np.random.Generator, name: str,
    ) -> None:  # fmt: skip
        self.span, self.scale, self.pace, self.precision = max(span, scale), scale, pace, precision
        self.kinds = time_kinds(features, pace)
        master = precision.master
        self.frequency: list[Parameter] = []
        self.phase: list[Parameter] = []
        for kind in self.kinds:
            if kind == "absolute":
                longest, shortest = 1.0, self.scale / self.span
            elif kind == "pace":
                longest, shortest = _PACE_PERIODS
            else:
                longest, shortest = 2 * np.log1p(self.span / self.scale) + 1.0, 1.0
            periods = np.geomspace(longest, shortest, features_dim - 1)
            # Feature 0 is linear, and of order one over the range.
            frequency = np.concatenate([[1 / longest], 2 * np.pi / periods])
            phase = rng.uniform(-np.pi, np.pi, features_dim)
            phase[0] = 0.0
            self.frequency.append(Parameter(f"{name}.{kind}.frequency", frequency.astype(master), decay=False))
            self.phase.append(Parameter(f"{name}.{kind}.phase", phase.astype(master), decay=False))
        width = features_dim * len(self.kinds)
        # As loud as the token embedding, whose deviation is 0.02 too.
        self.project = Parameter(f"{name}.weight", normal(rng, (embed_dim, width), 0.02 * width**-0.5, master))

    @property
    def parameters(self) -> list[Parameter]:
        """All parameters, in the order of the forward."""
        return [*self.frequency, *self.phase, self.project]

    def periods(self) -> dict[str, Array]:
        """Periods of the features that have one, in the unit of the times, for each of `kinds` (features_dim − 1,).

        Of gaps, and of how far a sequence is behind its pace, which enter as logarithms: where the first period that
        began at 0 ends.
        """
        found = {}
        for kind, frequency in zip(self.kinds, self.frequency, strict=True):
            turns = np.abs(to_host(frequency.value)[1:].astype(np.float64))
            period = 2 * np.pi / np.maximum(turns, np.finfo(np.float32).tiny)
            unit = self.pace if kind == "pace" else self.scale
            found[kind] = self.span * period if kind == "absolute" else unit * np.expm1(np.minimum(period, 700.0))
        return found

    def forward(self, sequences: Sequences) -> tuple[Array, TimeEncodingSaved]:
        """-> y (total, C)."""
        saved, compute, times = [], self.precision.compute, sequences.times
        xp, width = array_module(times), self.project.value.shape[1] // len(self.kinds)
        features = empty((sequences.total, self.project.value.shape[1]), compute, times)
        for index, (kind, frequency, phase) in enumerate(zip(self.kinds, self.frequency, self.phase, strict=True)):
            if kind == "absolute":
                t = xp.divide(times, self.span, out=empty(times.shape, times.dtype, times))
            elif kind == "pace":
                behind = sequences.behind(self.pace)
                t = xp.sign(behind) * xp.log1p(xp.abs(behind))
            else:
                t = sequences.gaps()
                xp.log1p(xp.divide(t, self.scale, out=t), out=t)
            part = features[:, width * index : width * (index + 1)]
            saved.append(time2vec_forward(t, frequency.value, phase.value, dtype=compute, out=part)[1])
        y, project = linear_forward(features, self.project.cast(compute))
        return y, TimeEncodingSaved(saved, project)

    def backward(self, dy: Array, saved: TimeEncodingSaved, accumulate: bool = True) -> None:
        """Adds to the parameters' gradients, or writes its matrix's; timestamps have none."""
        dfeatures, _, _ = linear_backward(dy, saved.project, dweight=self.project.gradient, accumulate=accumulate)
        width = dfeatures.shape[-1] // len(self.kinds)
        parts = [dfeatures[:, width * index : width * (index + 1)] for index in range(len(self.kinds))]
        for part, kept, frequency, phase in zip(parts, saved.features, self.frequency, self.phase, strict=True):
            time2vec_backward(part, kept, dfrequency=frequency.gradient, dphase=phase.gradient)

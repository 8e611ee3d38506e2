"""Steps that stand out: a loss or a gradient far above those of the steps before."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.batches import Batch
from ..model import TransformerModel

_STEPS, _LEAST = 64, 16
# Standard deviations of a normal distribution per median absolute deviation.
_DEVIATIONS = 1.4826


@dataclass(frozen=True)
class Spike:
    """What stood out: "loss" or "gradient norm", its value, and the median of the steps before."""

    what: str
    value: float
    median: float


class SpikeDetector:
    """Looks at each step's loss and gradient norm beside the last 64 steps'.

    A value is a spike if it is more than `threshold` robust standard deviations (from the median absolute deviation,
    which earlier spikes hardly move) above the median, the norm in logarithms. What deviates by less than a hundredth
    of the median is none, or the first ripple of a flat curve would be one. A threshold of 0 finds nothing.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._losses: deque[float] = deque(maxlen=_STEPS)
        self._norms: deque[float] = deque(maxlen=_STEPS)

    def look(self, loss: float, norm: float | None) -> Spike | None:
        """Take in a step (its norm is None if it overflowed); the spike that it is, if it is one."""
        found = None
        if norm is not None and norm > 0 and math.isfinite(norm):
            median = self._median_below(self._norms, math.log(norm))
            found = None if median is None else Spike("gradient norm", norm, math.exp(median))
        median = self._median_below(self._losses, loss)
        return found if median is None else Spike("loss", loss, median)

    def _median_below(self, seen: deque[float], value: float) -> float | None:
        """The median of what was seen, if the value is far above it; the value is then among what was seen."""
        median = None
        if self.threshold > 0 and len(seen) >= _LEAST:
            values = np.array(seen)
            middle = float(np.median(values))
            deviation = _DEVIATIONS * float(np.median(np.abs(values - middle)))
            if value - middle > self.threshold * max(deviation, 0.01 * abs(middle)):
                median = middle
        seen.append(value)
        return median


def worst_sequences(
    model: TransformerModel, batches: list[Batch], time_weight: float = 1.0
) -> tuple[list[int], list[float]]:
    """Sequences of these batches and their mean losses under the model as it is, the worst first.

    `time_weight` weighs the loss of the gaps, as in the loss that is trained.
    """
    sums: dict[int, list[Any]] = {}
    for batch in batches:
        scores = model.evaluate_batch(batch)
        losses = scores.losses if scores.time_losses is None else scores.losses + time_weight * scores.time_losses
        for number, sequence in enumerate(batch.sequence_ids):
            part = slice(int(batch.cu_seqlens[number]), int(batch.cu_seqlens[number + 1]))
            sums.setdefault(int(sequence), []).append(losses[part])
    means = {sequence: float(np.concatenate(parts).mean()) for sequence, parts in sums.items()}
    ordered = sorted(means, key=lambda sequence: -means[sequence])
    return ordered, [means[sequence] for sequence in ordered]

"""An exponential moving average of the weights, out of which the noise of single steps averages (Morales-Brotons et al.
2024, *Exponential Moving Average of Weights in Deep Learning: Dynamics and Benefits*)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ttr_kernels.common.arrays import Array

from ..model import TransformerModel


class Averages:
    """θ̄ ← d θ̄ + (1 − d) θ after update n, with d = min(decay, (1 + n) / (10 + n)): first weights are soon forgotten.

    The model's gradients serve as scratch memory, so that no further copy of the weights is needed.
    """

    def __init__(self, model: TransformerModel, decay: float) -> None:
        self.model, self.decay = model, decay
        self.values = model.flat.values.copy()

    def update(self, number: int) -> None:
        """Take in the weights after update `number`, from 1. Gradients are undefined afterwards."""
        keep = min(self.decay, (1 + number) / (10 + number))
        scratch = self.model.flat.gradients
        self.model.backend.xp.subtract(self.model.flat.values, self.values, out=scratch)
        scratch *= self.values.dtype.type(1 - keep)
        self.values += scratch

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """The model computes with the averages inside the block. Gradients are undefined afterwards."""
        flat = self.model.flat
        flat.gradients[...] = flat.values
        try:
            flat.values[...] = self.values
            self.model.values_changed()
            yield
        finally:
            flat.values[...] = flat.gradients
            self.model.values_changed()

    def state(self) -> dict[str, Array]:
        """The averages by parameter, as views."""
        arrays = {}
        for p in self.model.parameters:
            start = self.model.flat.offset(p)
            arrays[p.name] = self.values[start : start + p.value.size].reshape(p.value.shape)
        return arrays

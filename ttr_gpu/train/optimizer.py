"""AdamW over a model's flat parameters, or Muon for the matrices of its blocks and AdamW for the rest."""

from __future__ import annotations

from ttr_kernels.adamw import adamw, clip_scale, global_norm
from ttr_kernels.common.arrays import Array

from ..model import TransformerModel
from ..nn.parameter import Parameter
from .config import TrainConfig
from .muon import hidden_matrices, muon


class Optimizer:
    """Moments of every parameter, and the update.

    Attributes:
        first: AdamW's first moments and Muon's momentum, laid out like `model.flat.values`.
        second: AdamW's second moments, of the parameters that are not Muon's.
    """

    def __init__(self, model: TransformerModel, config: TrainConfig) -> None:
        self.model, self.config = model, config
        xp = model.backend.xp
        self.matrices = hidden_matrices(model) if config.optimizer == "muon" else []
        # They come first in the flat values.
        self.muon_end = sum(p.value.size for p, _ in self.matrices)
        self.first = xp.zeros_like(model.flat.values)
        self.second = xp.zeros_like(model.flat.values[self.muon_end :])
        self._groups = _groups(model, self.muon_end)

    def gradient_norm(self) -> float:
        """Norm of all gradients; NaN or infinite where any gradient is. Waits for a GPU."""
        return float(global_norm([self.model.flat.gradients]))

    def update(self, step: int, rate: float, norm: float, scale: float = 1.0) -> None:
        """One step with gradients times `scale`, clipped; `norm` is theirs before scaling."""
        flat, config = self.model.flat, self.config
        scale *= clip_scale(norm * scale, config.clip_norm)
        for p, parts in self.matrices:
            momentum = self._part(self.first, p)
            for part in parts:
                # An orthogonal update grows with the root of the width, Adam's with the width itself.
                relative = p.rate**0.5
                muon(
                    p.value[part], p.gradient[part], momentum[part], learning_rate=rate * relative,
                    beta=config.momentum, weight_decay=config.weight_decay / relative, gradient_scale=scale,
                )  # fmt: skip
        for start, end, decay, relative in self._groups:
            part, second = slice(start, end), slice(start - self.muon_end, end - self.muon_end)
            # Divided by the rate, so that a step shrinks weights by the same share whatever the width.
            adamw(
                flat.values[part], flat.gradients[part], self.first[part], self.second[second],
                learning_rate=rate * relative, step=step, beta1=config.beta1, beta2=config.beta2, eps=config.eps,
                weight_decay=config.weight_decay / relative if decay else 0.0, gradient_scale=scale,
            )  # fmt: skip
        self.model.values_changed()

    def state(self) -> dict[str, Array]:
        """What it remembers, by parameter, as views: "<parameter>/first" and "/second", or of Muon "/momentum"."""
        arrays = {}
        for p in self.model.parameters:
            if self.model.flat.offset(p) < self.muon_end:
                arrays[f"{p.name}/momentum"] = self._part(self.first, p)
            else:
                arrays[f"{p.name}/first"] = self._part(self.first, p)
                arrays[f"{p.name}/second"] = self._part(self.second, p, self.muon_end)
        return arrays

    def _part(self, moments: Array, p: Parameter, skipped: int = 0) -> Array:
        start = self.model.flat.offset(p) - skipped
        part: Array = moments[start : start + p.value.size].reshape(p.value.shape)
        return part


def _groups(model: TransformerModel, begin: int) -> list[tuple[int, int, bool, float]]:
    """(begin, end, whether they decay, relative rate) of neighbours in the flat values that are updated alike."""
    groups: list[tuple[int, int, bool, float]] = []
    for p in sorted(model.parameters, key=model.flat.offset):
        start = model.flat.offset(p)
        end, kind = start + p.value.size, (p.decay, p.rate)
        if start < begin:
            continue
        if groups and groups[-1][2:] == kind:
            groups[-1] = (groups[-1][0], end, *kind)
        else:
            groups.append((start, end, *kind))
    return groups

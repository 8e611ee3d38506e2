"""AdamW over a model's flat parameters."""

from __future__ import annotations

from ttr_kernels.adamw import adamw, clip_scale, global_norm
from ttr_kernels.common.arrays import Array
from ttr_kernels.common.cuda.launch import address

from ..model import TransformerModel
from .config import TrainConfig


class Optimizer:
    """Moments of every parameter, and the update.

    Attributes:
        first, second: moments, laid out like `model.flat.values`.
    """

    def __init__(self, model: TransformerModel, config: TrainConfig) -> None:
        self.model, self.config = model, config
        xp = model.backend.xp
        self.first = xp.zeros_like(model.flat.values)
        self.second = xp.zeros_like(model.flat.values)

    def gradient_norm(self) -> float:
        """Norm of all gradients; NaN or infinite where any gradient is. Waits for a GPU."""
        return float(global_norm([self.model.flat.gradients]))

    def update(self, step: int, rate: float, norm: float, scale: float = 1.0) -> None:
        """One step with gradients times `scale`, clipped; `norm` is theirs before scaling."""
        flat, config = self.model.flat, self.config
        scale *= clip_scale(norm * scale, config.clip_norm)
        for part, decay in ((slice(0, flat.decay_end), config.weight_decay), (slice(flat.decay_end, None), 0.0)):
            adamw(
                flat.values[part], flat.gradients[part], self.first[part], self.second[part], learning_rate=rate,
                step=step, beta1=config.beta1, beta2=config.beta2, eps=config.eps, weight_decay=decay,
                gradient_scale=scale,
            )  # fmt: skip
        self.model.values_changed()

    def state(self) -> dict[str, Array]:
        """The moments by parameter: "<parameter>/first" and "<parameter>/second", views."""
        arrays = {}
        base = self.model.flat.values
        for p in self.model.parameters:
            start = (address(p.value) - address(base)) // base.itemsize
            for name, moments in (("first", self.first), ("second", self.second)):
                arrays[f"{p.name}/{name}"] = moments[start : start + p.value.size].reshape(p.value.shape)
        return arrays

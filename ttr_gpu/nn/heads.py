"""The distribution of the next token or event type."""

from __future__ import annotations

from typing import Any

import numpy as np

from ttr_kernels.common.arrays import Array
from ttr_kernels.cross_entropy import (
    LinearCrossEntropySaved,
    linear_cross_entropy_backward,
    linear_cross_entropy_forward,
)
from ttr_kernels.matmul import linear

from ..precision import Precision
from .parameter import Parameter, normal


class TokenHead:
    """Distribution of the next token: softmax(x Wᵀ), W tied to the embedding or not; x from the final norm."""

    def __init__(
        self, vocabulary_size: int, embed_dim: int, *, tied_to: Parameter | None, precision: Precision,
        rng: np.random.Generator, name: str,
    ) -> None:  # fmt: skip
        self.precision, self.tied = precision, tied_to is not None
        self.weight = tied_to or Parameter(
            f"{name}.weight", normal(rng, (vocabulary_size, embed_dim), 0.02, precision.master)
        )

    @property
    def parameters(self) -> list[Parameter]:
        """All parameters of its own."""
        return [] if self.tied else [self.weight]

    def logits(self, x: Array) -> Array:
        """x (rows, C) -> (rows, V): for inference, where few rows are asked for."""
        return linear(x, self.weight.cast(self.precision.compute))

    def loss_forward(
        self, x: Array, targets: Array, *, label_smoothing: float = 0.0, z_loss: float = 0.0, gradients: bool = True,
        gradient_scale: Any = 1.0,
    ) -> tuple[Any, LinearCrossEntropySaved]:  # fmt: skip
        """x (total, C), targets (total,) with −1 for none -> mean cross-entropy in nats."""
        return linear_cross_entropy_forward(
            x, self.weight.cast(self.precision.compute), targets, label_smoothing=label_smoothing, z_loss=z_loss,
            gradients=gradients, gradient_scale=gradient_scale,
        )  # fmt: skip

    def loss_backward(self, dloss: Any, saved: LinearCrossEntropySaved, accumulate: bool = True) -> Array:
        """-> dx (total, C); adds to the weight's gradient, or writes it."""
        dx, _, _ = linear_cross_entropy_backward(
            dloss, saved, dweight=self.weight.gradient, accumulate=accumulate
        )  # fmt: skip
        return dx

"""What the last block's output is turned into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ttr_kernels.common.arrays import Array
from ttr_kernels.cross_entropy import (
    LinearCrossEntropySaved,
    linear_cross_entropy_backward,
    linear_cross_entropy_forward,
)
from ttr_kernels.matmul import linear
from ttr_kernels.rms_norm import RmsNormSaved, rms_norm, rms_norm_backward, rms_norm_forward

from ..precision import Precision
from .parameter import Parameter, normal


@dataclass(frozen=True)
class TokenHeadSaved:
    """What the forward keeps for the backward."""

    norm: RmsNormSaved
    loss: LinearCrossEntropySaved


class TokenHead:
    """Final norm, then the distribution of the next token: softmax(norm(x) Wᵀ), W tied to the embedding or not."""

    def __init__(
        self, vocabulary_size: int, embed_dim: int, *, tied_to: Parameter | None, norm_eps: float, precision: Precision,
        rng: np.random.Generator, name: str,
    ) -> None:  # fmt: skip
        self.precision, self.norm_eps, self.tied = precision, norm_eps, tied_to is not None
        self.norm = Parameter("final_norm.weight", np.ones(embed_dim, precision.master), decay=False)
        self.weight = tied_to or Parameter(
            f"{name}.weight", normal(rng, (vocabulary_size, embed_dim), 0.02, precision.master)
        )

    @property
    def parameters(self) -> list[Parameter]:
        """All parameters of its own, in the order of the forward."""
        return [self.norm] if self.tied else [self.norm, self.weight]

    def logits(self, x: Array) -> Array:
        """x (rows, C) -> (rows, V): for inference, where few rows are asked for."""
        normed = rms_norm(x, self.norm.value, eps=self.norm_eps)
        return linear(normed, self.weight.cast(self.precision.compute))

    def loss_forward(
        self, x: Array, targets: Array, *, label_smoothing: float = 0.0, z_loss: float = 0.0, gradients: bool = True,
        gradient_scale: float = 1.0,
    ) -> tuple[Any, TokenHeadSaved]:  # fmt: skip
        """x (total, C), targets (total,) with −1 for none -> mean cross-entropy in nats."""
        normed, norm = rms_norm_forward(x, self.norm.value, eps=self.norm_eps)
        loss, saved = linear_cross_entropy_forward(
            normed, self.weight.cast(self.precision.compute), targets, label_smoothing=label_smoothing, z_loss=z_loss,
            gradients=gradients, gradient_scale=gradient_scale,
        )  # fmt: skip
        return loss, TokenHeadSaved(norm, saved)

    def loss_backward(self, dloss: float, saved: TokenHeadSaved) -> Array:
        """-> dx (total, C); adds to the parameters' gradients."""
        dnormed, _, _ = linear_cross_entropy_backward(dloss, saved.loss, dweight=self.weight.gradient)
        dx, _ = rms_norm_backward(dnormed, saved.norm, dx=dnormed, dweight=self.norm.gradient)
        return dx

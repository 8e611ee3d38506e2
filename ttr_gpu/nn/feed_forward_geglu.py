"""The gated feed-forward (Shazeer 2020, *GLU variants improve Transformer*):  y = (gelu(x Wgᵀ) · x Wvᵀ) Woᵀ."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ttr_kernels.common.arrays import Array
from ttr_kernels.dropout_add import DropoutAddSaved, dropout_add_backward, dropout_add_forward
from ttr_kernels.geglu import GegluSaved, geglu_backward, geglu_forward
from ttr_kernels.matmul import LinearSaved, linear_backward, linear_forward

from ..precision import Precision
from .dropout import DropoutKey
from .parameter import Parameter, normal


@dataclass(frozen=True)
class FeedForwardSaved:
    """What the forward keeps for the backward."""

    up: LinearSaved
    gate: GegluSaved
    dropout: DropoutAddSaved | None
    down: LinearSaved


class FeedForwardGeGLU:
    """Gate and value in one (2F, C) matrix, their GeGLU, dropout, and the way back in a (C, F) matrix."""

    def __init__(
        self, embed_dim: int, hidden_dim: int, *, dropout: float, output_scale: float, precision: Precision,
        rng: np.random.Generator, name: str, site: int,
    ) -> None:  # fmt: skip
        self.dropout, self.precision, self.site = dropout, precision, site
        master = precision.master
        self.up = Parameter(f"{name}.up.weight", normal(rng, (2 * hidden_dim, embed_dim), embed_dim**-0.5, master))
        down = normal(rng, (embed_dim, hidden_dim), output_scale * hidden_dim**-0.5, master)
        self.down = Parameter(f"{name}.down.weight", down)

    @property
    def parameters(self) -> list[Parameter]:
        """All parameters, in the order of the forward."""
        return [self.up, self.down]

    def forward(self, x: Array, dropout: DropoutKey | None = None) -> tuple[Array, FeedForwardSaved]:
        """x (total, C) -> y (total, C). Dropout only where a key is given."""
        hidden, up, gate, mask = self._hidden(x, dropout)
        y, down = linear_forward(hidden, self.down.cast(self.precision.compute))
        return y, FeedForwardSaved(up, gate, mask, down)

    def recompute(self, x: Array, dropout: DropoutKey | None = None) -> FeedForwardSaved:
        """What the forward of the same x and dropout saved, without its last product."""
        hidden, up, gate, mask = self._hidden(x, dropout)
        return FeedForwardSaved(up, gate, mask, LinearSaved(hidden, self.down.cast(self.precision.compute), False))

    def _hidden(
        self, x: Array, dropout: DropoutKey | None
    ) -> tuple[Array, LinearSaved, GegluSaved, DropoutAddSaved | None]:
        both, up = linear_forward(x, self.up.cast(self.precision.compute))
        hidden, gate = geglu_forward(both)
        mask = None
        if dropout is not None and self.dropout > 0:
            hidden, mask = dropout_add_forward(hidden, rate=self.dropout, **dropout.at(self.site), out=hidden)
        return hidden, up, gate, mask

    def backward(self, dy: Array, saved: FeedForwardSaved, accumulate: bool = True) -> Array:
        """dy (total, C) -> dx (total, C); adds to the parameters' gradients, or writes them."""
        dhidden, _, _ = linear_backward(dy, saved.down, dweight=self.down.gradient, accumulate=accumulate)
        if saved.dropout is not None:
            dhidden = dropout_add_backward(dhidden, saved.dropout, dx=dhidden)
        # The gradient takes the place of what the GeGLU read: it is not needed any more.
        dboth, _ = geglu_backward(dhidden, saved.gate, dx=saved.gate.x)
        dx, _, _ = linear_backward(dboth, saved.up, dweight=self.up.gradient, accumulate=accumulate)
        return dx

"""The norm after the last block, which the heads share."""

from __future__ import annotations

import numpy as np

from ttr_kernels.common.arrays import Array
from ttr_kernels.rms_norm import RmsNormSaved, rms_norm, rms_norm_backward, rms_norm_forward

from ..precision import Precision
from .parameter import Parameter


class FinalNorm:
    """y = norm(x): what the token head and the time head read."""

    def __init__(self, embed_dim: int, *, eps: float, precision: Precision) -> None:
        self.eps = eps
        self.weight = Parameter("final_norm.weight", np.ones(embed_dim, precision.master), decay=False)

    def __call__(self, x: Array) -> Array:
        """x (rows, C) -> y like x, for inference."""
        return rms_norm(x, self.weight.value, eps=self.eps)

    def forward(self, x: Array) -> tuple[Array, RmsNormSaved]:
        """x (rows, C) -> y like x."""
        return rms_norm_forward(x, self.weight.value, eps=self.eps)

    def backward(self, dy: Array, saved: RmsNormSaved) -> Array:
        """dy (rows, C) -> dx, in its place; adds to the gain's gradient."""
        dx, _ = rms_norm_backward(dy, saved, dx=dy, dweight=self.weight.gradient)
        return dx

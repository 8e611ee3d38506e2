"""Cross-entropy of a linear layer's logits, a chunk of rows at a time, gradients included."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..common.arrays import FLOAT32, FLOAT64, Array, array_module, implementation
from ..matmul import linear, matmul
from . import LinearCrossEntropySaved, Smoothing


def run(
    x: Array, weight: Array, bias: Array | None, targets: Array, options: Smoothing, count: Any, chunk: int,
    gradients: bool,
) -> tuple[Any, LinearCrossEntropySaved]:  # fmt: skip
    """The loss, and (with `gradients`) dx, dweight and dbias for an upstream gradient of 1."""
    xp, module = array_module(x), implementation(x, __package__)
    rows, statistics = len(x), FLOAT64 if x.dtype == FLOAT64 else FLOAT32
    losses, best = xp.empty(rows, statistics), xp.empty(rows, np.int32)
    dx = xp.empty_like(x, order="C") if gradients else None
    dweight = xp.zeros(weight.shape, statistics) if gradients else None
    dbias = xp.zeros(len(weight), statistics) if gradients and bias is not None else None
    wide = weight if x.dtype == weight.dtype else weight.astype(x.dtype)
    logits = xp.empty((min(chunk, rows), len(weight)), x.dtype)
    for begin in range(0, rows, chunk):
        part = slice(begin, min(begin + chunk, rows))
        block = linear(x[part], weight, bias, out=logits[: part.stop - begin])
        # The logits become their own gradient.
        module.losses_and_gradient(block, targets[part], options, count, losses[part], best[part], gradients)
        if dx is None or dweight is None:
            continue
        matmul(block, wide, out=dx[part])
        matmul(block.T, x[part], out=dweight, accumulate=True)
        if dbias is not None:
            module.add_bias_gradient(block, dbias)
    return module.mean_loss(losses, count), LinearCrossEntropySaved(losses, best, count, dx, dweight, dbias)

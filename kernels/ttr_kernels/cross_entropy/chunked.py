"""Cross-entropy of a linear layer's logits, a chunk of rows at a time, gradients included."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..common.arrays import FLOAT32, FLOAT64, Array, implementation
from ..matmul import linear, matmul
from . import CrossEntropySaved, LinearCrossEntropySaved, Smoothing


def run(
    x: Array, weight: Array, bias: Array | None, targets: Array, options: Smoothing, count: int, chunk: int,
    gradients: bool,
) -> tuple[Any, LinearCrossEntropySaved]:  # fmt: skip
    """The loss, and (with `gradients`) dx, dweight and dbias for an upstream gradient of 1."""
    rows, statistics = len(x), FLOAT64 if x.dtype == FLOAT64 else FLOAT32
    losses, best = np.empty(rows, statistics), np.empty(rows, np.int32)
    dx = np.empty_like(x, order="C") if gradients else None
    dweight = np.zeros(weight.shape, statistics) if gradients else None
    dbias = np.zeros(len(weight), statistics) if gradients and bias is not None else None
    wide = weight if x.dtype == weight.dtype else weight.astype(x.dtype)
    logits = np.empty((min(chunk, rows), len(weight)), x.dtype)
    module = implementation(x, __package__)
    for begin in range(0, rows, chunk):
        part = slice(begin, min(begin + chunk, rows))
        block = linear(x[part], weight, bias, out=logits[: part.stop - begin])
        _, losses[part], normalizer = module.forward(block, targets[part], options, count)
        best[part] = module.best_class(block)
        if dx is None or dweight is None:
            continue
        saved = CrossEntropySaved(block, targets[part], losses[part], normalizer, count, options)
        module.backward(1.0, saved, block)
        matmul(block, wide, out=dx[part])
        matmul(block.T, x[part], out=dweight, accumulate=True)
        if dbias is not None:
            dbias += block.sum(axis=0, dtype=statistics)
    loss = statistics.type(losses.sum(dtype=np.float64) / max(count, 1))
    return loss, LinearCrossEntropySaved(losses, best, count, dx, dweight, dbias)

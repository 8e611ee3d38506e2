"""Cross-entropy of a linear layer's logits, a chunk of rows at a time, gradients included."""

from __future__ import annotations

from typing import Any

from ..common.arrays import FLOAT32, FLOAT64, INT32, Array, contiguous, empty, implementation, is_array, on_gpu, zeros
from ..matmul import linear, matmul
from . import CrossEntropySaved, LinearCrossEntropySaved, Smoothing

_CLASSES = 64  # a GPU works on a multiple of this


def run(
    x: Array, weight: Array, bias: Array | None, targets: Array, options: Smoothing, count: Any, chunk: int,
    gradients: bool, gradient_scale: Any,
) -> tuple[Any, LinearCrossEntropySaved]:  # fmt: skip
    """The loss, and (with `gradients`) dx, dweight and dbias for an upstream gradient of `gradient_scale`."""
    module = implementation(x, __package__)
    rows, statistics = len(x), FLOAT64 if x.dtype == FLOAT64 else FLOAT32
    losses, best = empty(rows, statistics, x), empty(rows, INT32, x)
    dx = empty(x.shape, x.dtype, x) if gradients else None
    classes = len(weight)
    wide = contiguous(weight, x.dtype)
    if on_gpu(x):
        # The classes that are added have logits of 0 and, as nothing writes to those, gradients of 0.
        weight = wide = _padded(wide)
        bias = None if bias is None else _padded(bias)
    # Written by the first chunk, added to by the others.
    dweight = (empty if rows else zeros)(weight.shape, statistics, x) if gradients else None
    dbias = zeros(len(weight), statistics, x) if gradients and bias is not None else None
    logits = empty((min(chunk, rows), len(weight)), x.dtype, x)
    for begin in range(0, rows, chunk):
        part = slice(begin, min(begin + chunk, rows))
        block = linear(x[part], weight, bias, out=logits[: part.stop - begin])
        # The logits become their own gradient.
        logit, target = block[:, :classes], targets[part]
        at_once = gradients and not is_array(gradient_scale) and gradient_scale == 1.0
        module.losses_and_gradient(logit, target, options, count, losses[part], best[part], at_once)
        if gradients and not at_once:
            _, row_losses, normalizer = module.forward(logit, target, options, count)
            saved = CrossEntropySaved(logit, target, row_losses, normalizer, count, options)
            module.backward(gradient_scale, saved, logit)
        if dx is None or dweight is None:
            continue
        matmul(block, wide, out=dx[part])
        matmul(block.T, x[part], out=dweight, accumulate=begin > 0)
        if dbias is not None:
            module.add_bias_gradient(block, dbias)
    if dweight is not None:
        dweight = dweight[:classes]
    if dbias is not None:
        dbias = dbias[:classes]
    kept = LinearCrossEntropySaved(losses, best, count, dx, dweight, dbias, gradient_scale)
    return module.mean_loss(losses, count), kept


def _padded(parameter: Array) -> Array:
    """Zeros after the last row, so that rows of logits are whole cache lines: of matrices whose rows do not begin at
    multiples of 16 bytes, tensor cores are fed slowly (50257 classes in 16-bit floats)."""
    classes = len(parameter)
    if classes % _CLASSES == 0:
        return parameter
    shape = classes + -classes % _CLASSES, *parameter.shape[1:]
    padded = empty(shape, parameter.dtype, parameter)
    padded[:classes] = parameter
    padded[classes:] = 0
    return padded

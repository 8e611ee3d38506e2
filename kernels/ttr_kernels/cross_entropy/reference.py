"""Cross-entropy in float64, as the formulas stand in the docstrings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.arrays import Array

if TYPE_CHECKING:
    from . import CrossEntropySaved, LinearCrossEntropySaved, Smoothing


def forward(logits: Array, targets: Array, options: Smoothing, count: int) -> tuple[Any, Array, Array]:
    counted = targets != options.ignore_index
    lse = np.logaddexp.reduce(logits, axis=1)
    hit = logits[np.arange(len(logits)), np.where(counted, targets, 0)]
    smooth = options.label_smoothing
    losses = lse - (1 - smooth) * hit + options.z_loss * lse**2
    if smooth > 0:
        losses -= smooth * logits.mean(axis=1)
    losses = np.where(counted, losses, 0.0)
    largest = logits.max(axis=1)
    return mean_loss(losses, count), losses, np.stack([largest, np.exp(lse - largest)])


def backward(dloss: float, saved: CrossEntropySaved, dlogits: Array) -> None:
    options, rows = saved.smoothing, np.arange(len(dlogits))
    counted = saved.targets != options.ignore_index
    largest, total = saved.normalizer[:, :, None]
    lse = largest + np.log(total)
    gradient = np.exp(saved.logits - lse) * (1 + 2 * options.z_loss * lse)
    gradient -= options.label_smoothing / dlogits.shape[1]
    gradient[rows, np.where(counted, saved.targets, 0)] -= 1 - options.label_smoothing
    dlogits[...] = gradient * counted[:, None] * (dloss / max(saved.count, 1))


def mean_loss(losses: Array, count: int) -> Any:
    return np.float64(losses.sum() / max(count, 1))


def losses_and_gradient(
    logits: Array, targets: Array, options: Smoothing, count: int, losses: Array, best: Array, gradient: bool
) -> None:
    from . import CrossEntropySaved

    best[...] = logits.argmax(axis=1)
    _, losses[...], normalizer = forward(logits, targets, options, count)
    if gradient:
        backward(1.0, CrossEntropySaved(logits, targets, losses, normalizer, count, options), logits)


def linear_backward(
    dloss: float, saved: LinearCrossEntropySaved, dx: Array, dweight: Array, dbias: Array | None, accumulate: bool
) -> None:
    assert saved.dx is not None
    assert saved.dweight is not None
    dx[...] = saved.dx * dloss
    dweight[...] = saved.dweight * dloss + (dweight if accumulate else 0)
    if dbias is not None and saved.dbias is not None:
        dbias[...] = saved.dbias * dloss + (dbias if accumulate else 0)


def add_bias_gradient(dlogits: Array, dbias: Array) -> None:
    dbias += dlogits.sum(axis=0)

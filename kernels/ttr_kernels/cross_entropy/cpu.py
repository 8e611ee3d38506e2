"""Cross-entropy on CPU cores: per row a maximum, a sum, and in the backward one more pass that may be in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.arrays import FLOAT32, Array, contiguous_rows, empty, result_rows
from ..common.compilation import jit, jit_exact
from ..common.parallel import parallel_for
from ..common.reductions import add_column_sums
from ..common.storage import load, store
from ..common.tile_multiply import maximum
from ..common.vector_math import exp_of_nonpositive, log

if TYPE_CHECKING:
    from . import CrossEntropySaved, LinearCrossEntropySaved, Smoothing

_ZERO = np.float32(0.0)


def forward(logits: Array, targets: Array, options: Smoothing, count: int) -> tuple[Any, Array, Array]:
    flat, rows, stride = contiguous_rows(logits)
    losses, normalizer = empty(rows, FLOAT32), empty((2, rows), FLOAT32)
    parallel_for(
        _forward, rows, flat, stride, logits.shape[1], targets, options.ignore_index,
        np.float32(options.label_smoothing), np.float32(options.z_loss), losses, normalizer, grain=_grain(logits),
    )  # fmt: skip
    return mean_loss(losses, count), losses, normalizer


def mean_loss(losses: Array, count: int) -> Any:
    return np.float32(losses.sum(dtype=np.float64) / max(count, 1))


def backward(dloss: float, saved: CrossEntropySaved, dlogits: Array) -> None:
    # In place from here on: a kernel that sees one array vectorises.
    if dlogits.ctypes.data != saved.logits.ctypes.data or dlogits.strides != saved.logits.strides:
        dlogits[...] = saved.logits
    flat, rows, stride = result_rows("dlogits", dlogits)
    options = saved.smoothing
    parallel_for(
        _backward, rows, flat, stride, dlogits.shape[1], saved.targets, options.ignore_index,
        np.float32(options.label_smoothing), np.float32(options.z_loss), saved.normalizer,
        np.float32(dloss / max(saved.count, 1)), grain=_grain(dlogits),
    )  # fmt: skip


def losses_and_gradient(
    logits: Array, targets: Array, options: Smoothing, count: int, losses: Array, best: Array, gradient: bool
) -> None:
    """Write the losses and most probable classes of these rows; with `gradient`, logits become their own."""
    flat, rows, stride = contiguous_rows(logits)
    parallel_for(
        _losses_and_gradient, rows, flat, stride, logits.shape[1], targets, options.ignore_index,
        np.float32(options.label_smoothing), np.float32(options.z_loss), losses, empty((2, rows), FLOAT32), best,
        np.float32(1.0 / max(count, 1)), gradient, grain=_grain(logits),
    )  # fmt: skip


def linear_backward(dloss: Any, saved: LinearCrossEntropySaved, dx: Array, dweight: Array, dbias: Array | None) -> None:
    """dx = saved.dx · dloss, and the parameters' gradients likewise, but added."""
    assert saved.dx is not None
    assert saved.dweight is not None
    number = np.float32(dloss)
    if number != 1 or dx is not saved.dx:
        _scale_into(saved.dx, number, dx, False)
    _scale_into(saved.dweight, number, dweight, True)
    if dbias is not None and saved.dbias is not None:
        _scale_into(saved.dbias, number, dbias, True)


def _scale_into(x: Array, number: Any, y: Array, accumulate: bool) -> None:
    """y = number · x, or y += number · x."""
    source, rows, stride = contiguous_rows(x)
    to, _, to_stride = result_rows("gradient", y)
    width = y.shape[-1]
    parallel_for(
        _scale, rows, source, stride, number, to, to_stride, width, accumulate, grain=max(1, 65536 // max(width, 1))
    )


@jit
def _scale(
    x: Any, stride: int, number: Any, y: Any, y_stride: int, width: int, accumulate: bool, begin: int, end: int
) -> None:
    for row in range(begin, end):
        for j in range(width):
            value = number * load(x, row * stride + j)
            if accumulate:
                value += load(y, row * y_stride + j)
            store(y, row * y_stride + j, value)


def add_bias_gradient(dlogits: Array, dbias: Array) -> None:
    add_column_sums(dlogits, dbias)


def _grain(logits: Array) -> int:
    grain: int = max(1, 32768 // max(logits.shape[1], 1))
    return grain


@jit_exact
def _plain_loss(largest: Any, total: Any, hit: Any) -> Any:
    # Both terms are small where the loss is; lse − hit would round to the logits' magnitude first.
    return log(total) - (hit - largest)


@jit
def _forward(
    logits: Any, stride: int, width: int, targets: Any, ignore_index: int, smoothing: Any, z: Any, losses: Any,
    normalizer: Any, begin: int, end: int,
) -> None:  # fmt: skip
    for row in range(begin, end):
        at = row * stride
        largest = np.float32(-np.inf)
        for j in range(width):
            largest = maximum(largest, load(logits, at + j))
        total, below = _ZERO, _ZERO
        for j in range(width):
            difference = load(logits, at + j) - largest
            total += exp_of_nonpositive(difference)
            below += difference
        normalizer[0, row] = largest
        normalizer[1, row] = total
        target = targets[row]
        if target == ignore_index:
            losses[row] = _ZERO
        else:
            hit = load(logits, at + target)
            lse = largest + log(total)
            loss = _plain_loss(largest, total, hit) + z * lse * lse
            if smoothing > _ZERO:
                loss += smoothing * ((hit - largest) - below / np.float32(width))
            losses[row] = loss


@jit
def _backward(
    logits: Any, stride: int, width: int, targets: Any, ignore_index: int, smoothing: Any, z: Any, normalizer: Any,
    scale: Any, begin: int, end: int,
) -> None:  # fmt: skip
    share = smoothing / np.float32(width)
    for row in range(begin, end):
        at = row * stride
        if targets[row] == ignore_index:
            for j in range(width):
                store(logits, at + j, _ZERO)
        else:
            largest, total = normalizer[0, row], normalizer[1, row]
            factor = scale * (np.float32(1.0) + np.float32(2.0) * z * (largest + log(total))) / total
            # The target's entry is formed before it is rounded to the storage dtype.
            hit = exp_of_nonpositive(load(logits, at + targets[row]) - largest) * factor
            for j in range(width):
                weight = exp_of_nonpositive(load(logits, at + j) - largest)
                store(logits, at + j, weight * factor - scale * share)
            store(logits, at + targets[row], hit - scale * (share + np.float32(1.0) - smoothing))


@jit
def _losses_and_gradient(
    logits: Any, stride: int, width: int, targets: Any, ignore_index: int, smoothing: Any, z: Any, losses: Any,
    normalizer: Any, best: Any, scale: Any, gradient: bool, begin: int, end: int,
) -> None:  # fmt: skip
    # Row by row, so that a row is still in the cache when it is read again.
    for row in range(begin, end):
        _best(logits, stride, width, best, row, row + 1)
        _forward(logits, stride, width, targets, ignore_index, smoothing, z, losses, normalizer, row, row + 1)
        if gradient:
            _backward(logits, stride, width, targets, ignore_index, smoothing, z, normalizer, scale, row, row + 1)


@jit
def _best(logits: Any, stride: int, width: int, best: Any, begin: int, end: int) -> None:
    for row in range(begin, end):
        largest = np.float32(-np.inf)
        for j in range(width):
            largest = maximum(largest, load(logits, row * stride + j))
        index = 0
        while index < width - 1 and load(logits, row * stride + index) != largest:
            index += 1
        best[row] = index

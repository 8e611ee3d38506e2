"""Cross-entropy on CPU cores: per row a maximum, a sum, and in the backward one more pass that may be in place.

A row is computed with while the next one is fetched: exponentials take about as long as memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.arrays import FLOAT32, Array, contiguous_rows, empty, result_rows
from ..common.compilation import jit_exact, jit_within
from ..common.parallel import parallel_for
from ..common.ranges import jit_ranges
from ..common.reductions import add_column_sums
from ..common.storage import load, store
from ..common.tile_multiply import maximum
from ..common.vector_math import exp_of_nonpositive, log
from ..common.vectors import LINE, fetch, fetch_row, fetch_to_write

if TYPE_CHECKING:
    from . import CrossEntropySaved, LinearCrossEntropySaved, Smoothing

_ZERO = np.float32(0.0)
# Logits that are looked at together: in one such block the row's largest is first.
_BLOCK = 256


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
    source, _, source_stride = contiguous_rows(saved.logits)
    flat, rows, stride = result_rows("dlogits", dlogits)
    in_place = dlogits.ctypes.data == saved.logits.ctypes.data and dlogits.strides == saved.logits.strides
    options = saved.smoothing
    parallel_for(
        _backward, rows, source, source_stride, in_place, flat, stride, dlogits.shape[1], saved.targets,
        options.ignore_index, np.float32(options.label_smoothing), np.float32(options.z_loss), saved.normalizer,
        np.float32(dloss / max(saved.count, 1)), grain=_grain(dlogits),
    )  # fmt: skip


def losses_and_gradient(
    logits: Array, targets: Array, options: Smoothing, count: int, losses: Array, best: Array, gradient: bool
) -> None:
    """Write the losses and most probable classes of these rows; with `gradient`, logits become their own."""
    flat, rows, stride = contiguous_rows(logits)
    parallel_for(
        _losses_and_gradient, rows, flat, stride, logits.shape[1], targets, options.ignore_index,
        np.float32(options.label_smoothing), np.float32(options.z_loss), losses, best,
        np.float32(1.0 / max(count, 1)), gradient, grain=_grain(logits),
    )  # fmt: skip


def linear_backward(
    dloss: Any, saved: LinearCrossEntropySaved, dx: Array, dweight: Array, dbias: Array | None, accumulate: bool
) -> None:
    """dx = saved.dx · dloss, and the parameters' gradients likewise, or added."""
    assert saved.dx is not None
    assert saved.dweight is not None
    number = np.float32(dloss)
    if number != 1 or dx is not saved.dx:
        _scale_into(saved.dx, number, dx, False)
    _scale_into(saved.dweight, number, dweight, accumulate)
    if dbias is not None and saved.dbias is not None:
        _scale_into(saved.dbias, number, dbias, accumulate)


def _scale_into(x: Array, number: Any, y: Array, accumulate: bool) -> None:
    """y = number · x, or y += number · x."""
    source, rows, stride = contiguous_rows(x)
    to, _, to_stride = result_rows("gradient", y)
    width = y.shape[-1]
    parallel_for(
        _scale, rows, source, stride, number, to, to_stride, width, accumulate, grain=max(1, 65536 // max(width, 1))
    )


@jit_ranges
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


@jit_within
def _exponentials(logits: Any, at: int, following: int, width: int, weights: Any) -> Any:
    """weights = e^(logits − largest) of the row that begins at `at`, while the one at `following` is fetched;
    -> largest, where it is first, Σ weights, Σ (logits − largest)."""
    largest, block = np.float32(-np.inf), 0
    for first in range(0, width, _BLOCK):
        here = np.float32(-np.inf)
        for j in range(first, min(first + _BLOCK, width)):
            here = maximum(here, load(logits, at + j))
        if here > largest:
            largest, block = here, first
    best, last = block, min(block + _BLOCK, width) - 1
    while best < last and load(logits, at + best) != largest:
        best += 1
    total, below = _ZERO, _ZERO
    for first in range(0, width, _BLOCK):
        last = min(first + _BLOCK, width)
        fetch_row(logits, following + first, last - first)
        for j in range(first, last):
            difference = load(logits, at + j) - largest
            weight = exp_of_nonpositive(difference)
            store(weights, j, weight)
            total += weight
            below += difference
    return largest, best, total, below


@jit_within
def _loss(hit: Any, largest: Any, total: Any, below: Any, width: int, smoothing: Any, z: Any) -> Any:
    lse = largest + log(total)
    loss = _plain_loss(largest, total, hit) + z * lse * lse
    if smoothing > _ZERO:
        loss += smoothing * ((hit - largest) - below / np.float32(width))
    return loss


@jit_ranges
def _forward(
    logits: Any, stride: int, width: int, targets: Any, ignore_index: int, smoothing: Any, z: Any, losses: Any,
    normalizer: Any, begin: int, end: int,
) -> None:  # fmt: skip
    weights = np.empty(width, np.float32)
    for row in range(begin, end):
        at, target = row * stride, targets[row]
        largest, _, total, below = _exponentials(logits, at, at + stride, width, weights)
        normalizer[0, row] = largest
        normalizer[1, row] = total
        losses[row] = _ZERO
        if target != ignore_index:
            losses[row] = _loss(load(logits, at + target), largest, total, below, width, smoothing, z)


@jit_within
def _factor(largest: Any, total: Any, z: Any, scale: Any) -> Any:
    """What a row's weights are multiplied by."""
    return scale * (np.float32(1.0) + np.float32(2.0) * z * (largest + log(total))) / total


@jit_ranges
def _backward(
    logits: Any, stride: int, in_place: bool, dlogits: Any, to_stride: int, width: int, targets: Any, ignore_index: int,
    smoothing: Any, z: Any, normalizer: Any, scale: Any, begin: int, end: int,
) -> None:  # fmt: skip
    share = smoothing / np.float32(width)
    for row in range(begin, end):
        at, target = row * to_stride, targets[row]
        if target == ignore_index:
            for j in range(width):
                store(dlogits, at + j, _ZERO)
        else:
            if not in_place:
                # From here on in place: what reads and writes one array is sure to read first.
                for j in range(width):
                    dlogits[np.uintp(at + j)] = logits[np.uintp(row * stride + j)]
            largest, total = normalizer[0, row], normalizer[1, row]
            factor = _factor(largest, total, z, scale)
            # The target's entry is formed before it is rounded to the storage dtype.
            hit = exp_of_nonpositive(load(dlogits, at + target) - largest) * factor
            for first in range(0, width, _BLOCK):
                last = min(first + _BLOCK, width)
                for j in range(first, last, LINE // logits.itemsize):
                    fetch(logits, (row + 1) * stride + j)
                    fetch_to_write(dlogits, at + to_stride + j)
                for j in range(first, last):
                    weight = exp_of_nonpositive(load(dlogits, at + j) - largest)
                    store(dlogits, at + j, weight * factor - scale * share)
            store(dlogits, at + target, hit - scale * (share + np.float32(1.0) - smoothing))


@jit_ranges
def _losses_and_gradient(
    logits: Any, stride: int, width: int, targets: Any, ignore_index: int, smoothing: Any, z: Any, losses: Any,
    best: Any, scale: Any, gradient: bool, begin: int, end: int,
) -> None:  # fmt: skip
    weights, share = np.empty(width, np.float32), smoothing / np.float32(width)
    # Row by row, so that a row is still in the cache when it becomes its gradient.
    for row in range(begin, end):
        at, target = row * stride, targets[row]
        largest, best[row], total, below = _exponentials(logits, at, at + stride, width, weights)
        losses[row] = _ZERO
        if target != ignore_index:
            losses[row] = _loss(load(logits, at + target), largest, total, below, width, smoothing, z)
        if not gradient:
            continue
        if target == ignore_index:
            for j in range(width):
                store(logits, at + j, _ZERO)
        else:
            factor = _factor(largest, total, z, scale)
            for j in range(width):
                store(logits, at + j, load(weights, j) * factor - scale * share)
            rest = scale * (share + np.float32(1.0) - smoothing)
            store(logits, at + target, load(weights, target) * factor - rest)

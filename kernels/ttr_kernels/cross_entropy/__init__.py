"""Cross-entropy of a softmax, with label smoothing (Szegedy et al. 2016, §7) and z-loss (Chowdhery et al. 2022, §5).

    loss_i = lse_i − (1 − ε) logit_i[target_i] − ε mean_v(logit_iv) + z lse_i²        lse_i = log Σ_v exp(logit_iv)
    loss   = mean of loss_i over the rows whose target is not ignored (0 if there is none)

`linear_cross_entropy` is the same on logits x Wᵀ, of which it never holds more than a few rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..common.arrays import (
    INTEGERS,
    Array,
    check,
    check_out,
    check_parameter,
    check_parameter_gradient,
    empty,
    implementation,
    is_array,
    on_gpu,
    takes_cuda_arrays,
)


@dataclass(frozen=True)
class Smoothing:
    """Options of the loss: label smoothing ε, weight z of the z-loss, and the target that means "none"."""

    label_smoothing: float
    z_loss: float
    ignore_index: int


@dataclass(frozen=True)
class CrossEntropySaved:
    """What the forward keeps for the backward."""

    logits: Array  # (rows, V)
    targets: Array  # (rows,)
    losses: Array  # (rows,) float32: loss_i, 0 where the target is ignored
    # (2, rows) float32: the row's largest logit, and Σ_v exp(logit_iv − largest); as one number, lse_i, they would be
    # rounded to the logits' magnitude.
    normalizer: Array
    # Rows whose target is not ignored: an int, or on a GPU an int32 array of shape (), which has not been waited for.
    count: Any
    smoothing: Smoothing


@dataclass(frozen=True)
class LinearCrossEntropySaved:
    """What the forward keeps for the backward: the gradients themselves, for an upstream gradient of gradient_scale."""

    losses: Array  # (rows,) float32, 0 where the target is ignored
    best: Array  # (rows,) int32: the most probable class
    count: Any  # as above
    dx: Array | None  # (rows, C) like x; None without gradients
    dweight: Array | None  # (V, C) float32
    dbias: Array | None  # (V,) float32
    gradient_scale: Any = 1.0  # a number, or on a GPU an array of one


@takes_cuda_arrays
def cross_entropy_forward(
    logits: Array, targets: Array, *, ignore_index: int = -1, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Any, CrossEntropySaved]:
    """Mean cross-entropy in nats.

    Args:
        logits: (rows, V) float32, bfloat16 or float16 (float64 runs the reference). −inf excludes a class (with
            label smoothing the loss is then infinite).
        targets: (rows,) int32 or int64, in [0, V) or `ignore_index`.
        label_smoothing: ε in [0, 1).
        z_loss: weight of lse², which keeps logits from drifting.

    Returns:
        (loss, saved): a float32 scalar, on a GPU an array of shape (); `saved.losses` has the loss of each row.

    Raises:
        TypeError, ValueError: an array of the wrong kind, shape or dtype, a target outside the vocabulary (its position
            and value are named; on a GPU, where to look would be to wait, the loss is NaN), or an option out of range.
    """
    check(logits=(logits, "rows V"), targets=(targets, "rows", INTEGERS))
    count = _check_targets(targets, logits.shape[1], ignore_index, logits)
    smoothing = _smoothing(label_smoothing, z_loss, ignore_index)
    loss, losses, normalizer = implementation(logits, __package__).forward(logits, targets, smoothing, count)
    return loss, CrossEntropySaved(logits, targets, losses, normalizer, count, smoothing)


@takes_cuda_arrays
def cross_entropy_backward(dloss: Any, saved: CrossEntropySaved, *, dlogits: Array | None = None) -> Array:
    """dlogit_iv = dloss / count · ( p_iv (1 + 2 z lse_i) − (1 − ε) [v = target_i] − ε / V ), 0 in ignored rows.

    Args:
        dloss: gradient of the loss, a scalar (if it is an array on the GPU, it is not waited for).
        saved: from the forward.
        dlogits: like logits, is *written*; may be `saved.logits`, which is then gone.
    """
    dlogits = check_out("dlogits", dlogits, saved.logits.shape, saved.logits.dtype, saved.logits)
    scale = dloss if on_gpu(dlogits) else float(dloss)
    implementation(dlogits, __package__).backward(scale, saved, dlogits)
    return dlogits


@takes_cuda_arrays
def linear_cross_entropy_forward(
    x: Array,
    weight: Array,
    targets: Array,
    *,
    bias: Array | None = None,
    ignore_index: int = -1,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    rows_per_chunk: int | None = None,
    gradients: bool = True,
    gradient_scale: Any = 1.0,
) -> tuple[Any, LinearCrossEntropySaved]:
    """Mean cross-entropy of the logits x Wᵀ + b, chunk by chunk of rows.

    A chunk's logits become their own gradient in place, and from it the chunk's part of dx and dW follows, so the
    forward does the work of the backward too, and no more logits exist than one chunk's. The chunks are added in order:
    the result does not depend on threads other than through BLAS.

    Args:
        x: (rows, C) float32, bfloat16 or float16 (float64 runs the reference).
        weight: (V, C), bias: (V,): of the dtype of x, or float32.
        targets, ignore_index, label_smoothing, z_loss: as for `cross_entropy_forward`.
        rows_per_chunk: default: `default_rows_per_chunk`.
        gradients: False computes losses alone (evaluation).
        gradient_scale: kept gradients are multiplied by this before they are rounded to the dtype of x. A mean over
            thousands of rows has gradients that float16 cannot hold; with the dloss of the backward here, it can. On a
            GPU it may be an array of one number there.
    """
    check(x=(x, "rows C"), weight=(weight, "V C"), bias=(bias, "V"), targets=(targets, "rows", INTEGERS))
    check_parameter("weight", weight, x.dtype)
    if bias is not None:
        check_parameter("bias", bias, x.dtype)
    count = _check_targets(targets, len(weight), ignore_index, x)
    smoothing = _smoothing(label_smoothing, z_loss, ignore_index)
    rows = rows_per_chunk or default_rows_per_chunk(len(weight), on_gpu(x))
    if rows < 1:
        raise ValueError(f"rows_per_chunk: got {rows}, expected at least 1")
    from .chunked import run

    scale = gradient_scale if on_gpu(x) and is_array(gradient_scale) else float(gradient_scale)
    return run(x, weight, bias, targets, smoothing, count, rows, gradients, scale)


def default_rows_per_chunk(classes: int, gpu: bool) -> int:
    """Rows of logits that `linear_cross_entropy_forward` holds at once.

    On a CPU as many as make 2^20 elements, which stay in the cache, but at least 512: each chunk reads W twice and its
    gradient once, and writes that. On a GPU 2^26 elements.
    """
    if gpu:
        # Tiles of a matrix product have 128 rows.
        return max(128, (1 << 26) // max(classes, 1) // 128 * 128)
    return max(512, (1 << 20) // max(classes, 1))


@takes_cuda_arrays
def linear_cross_entropy_backward(
    dloss: Any,
    saved: LinearCrossEntropySaved,
    *,
    dx: Array | None = None,
    dweight: Array | None = None,
    dbias: Array | None = None,
    accumulate: bool = True,
) -> tuple[Array, Array, Array | None]:
    """The saved gradients times dloss: dx is *written*, dweight and dbias (float32) are *accumulated* into, or with
    accumulate=False written too.

    Without `dx` the saved array itself is scaled and returned.
    """
    if saved.dx is None or saved.dweight is None:
        raise ValueError("saved: the forward ran with gradients=False")
    if is_array(saved.gradient_scale) or saved.gradient_scale != 1.0:
        dloss = dloss / saved.gradient_scale
    dx = saved.dx if dx is None else check_out("dx", dx, saved.dx.shape, saved.dx.dtype, saved.dx)
    dweight = check_parameter_gradient("dweight", dweight, saved.dweight.shape, dx.dtype, dx)
    if saved.dbias is not None:
        dbias = check_parameter_gradient("dbias", dbias, saved.dbias.shape, dx.dtype, dx)
    else:
        dbias = None
    implementation(dx, __package__).linear_backward(dloss, saved, dx, dweight, dbias, accumulate)
    return dx, dweight, dbias


def _smoothing(label_smoothing: float, z_loss: float, ignore_index: int) -> Smoothing:
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing: got {label_smoothing}, expected a number in [0, 1)")
    if not z_loss >= 0.0:
        raise ValueError(f"z_loss: got {z_loss}, expected a number >= 0")
    return Smoothing(label_smoothing, z_loss, ignore_index)


def _check_targets(targets: Array, vocabulary: int, ignore_index: int, like: Array) -> Any:
    """The number of targets that count; ValueError if one of them is no class."""
    if on_gpu(like):
        return implementation(like, __package__).count_targets(targets, ignore_index)
    counted, wrong, large = (empty(targets.shape, bool) for _ in range(3))
    np.not_equal(targets, ignore_index, out=counted)
    np.less(targets, 0, out=wrong)
    np.greater_equal(targets, vocabulary, out=large)
    np.logical_or(wrong, large, out=wrong)
    np.logical_and(wrong, counted, out=wrong)
    if wrong.any():
        at = int(wrong.argmax())
        raise ValueError(
            f"targets: got {targets[at]} at position {at}, expected 0 .. {vocabulary - 1}, or {ignore_index} to ignore"
        )
    return int(np.count_nonzero(counted))

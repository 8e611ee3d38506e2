"""Cross-entropy on a GPU. Nothing waits for the device: the count of targets and the loss stay there."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.arrays import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    INT32,
    INT64,
    Array,
    DType,
    contiguous,
    contiguous_rows,
    empty,
    result_rows,
)
from ..common.cuda.launch import CXX_TYPES, Kernel, vector_elements
from ..common.cuda.reductions import add_column_sums, element_stride
from ..common.cuda.rows import RowLayout, layout_of

if TYPE_CHECKING:
    from . import CrossEntropySaved, LinearCrossEntropySaved, Smoothing

_ROWS = Path(__file__).with_name("cross_entropy.cu")
_SCALARS = Path(__file__).with_name("scalars.cu")
# Elements that a thread holds at once, and threads of the rows that take several rounds of that. Two such blocks fit a
# multiprocessor, so that the rows under way (50257 16-bit logits: 26 MB on 132 of them) stay in the second-level cache.
_ELEMENTS, _THREADS = 16, 512


def count_targets(targets: Array, ignore_index: int) -> Array:
    """How many targets count: int32, of shape ()."""
    count = empty((), INT32, targets)
    kernel = _scalar_kernel("count_targets", FLOAT32, 1, targets.dtype)
    kernel.launch(targets, (1,), (1024,), (targets, element_stride(targets), len(targets), int(ignore_index), count))
    return count


def forward(logits: Array, targets: Array, options: Smoothing, count: Array) -> tuple[Any, Array, Array]:
    flat, rows, stride = contiguous_rows(logits)
    layout = _layout(logits.dtype, logits.shape[1])
    losses, normalizer = empty(rows, FLOAT32, logits), empty((2, rows), FLOAT32, logits)
    _row_kernel("cross_entropy_forward", logits.dtype, targets.dtype, layout).launch(
        logits, layout.grid(rows), layout.block,
        (flat, stride, rows, logits.shape[1], *_task(targets, options), losses, normalizer),
    )  # fmt: skip
    return mean_loss(losses, count), losses, normalizer


def mean_loss(losses: Array, count: Array) -> Array:
    """float32, of shape ()."""
    mean = empty((), FLOAT32, losses)
    kernel = _scalar_kernel("mean_loss", FLOAT32, 1, INT32)
    kernel.launch(losses, (1,), (1024,), (losses, len(losses), count, mean))
    return mean


def backward(dloss: Any, saved: CrossEntropySaved, dlogits: Array) -> None:
    flat, rows, stride = contiguous_rows(saved.logits)
    to, _, to_stride = result_rows("dlogits", dlogits)
    targets, layout = saved.targets, _layout(dlogits.dtype, dlogits.shape[1])
    at, value = _number(dloss, dlogits)
    _row_kernel("cross_entropy_backward", dlogits.dtype, targets.dtype, layout).launch(
        dlogits, layout.grid(rows), layout.block,
        (flat, stride, rows, dlogits.shape[1], *_task(targets, saved.smoothing), saved.normalizer, saved.count,
         0 if at is None else at, value, to, to_stride),
    )  # fmt: skip


def losses_and_gradient(
    logits: Array, targets: Array, options: Smoothing, count: Array, losses: Array, best: Array, gradient: bool
) -> None:
    """Write the losses and most probable classes of these rows; with `gradient`, logits become their own."""
    flat, rows, stride = result_rows("logits", logits)
    layout = _layout(logits.dtype, logits.shape[1])
    _row_kernel("cross_entropy_in_place", logits.dtype, targets.dtype, layout).launch(
        logits, layout.grid(rows), layout.block,
        (flat, stride, rows, logits.shape[1], *_task(targets, options), count, losses, best, int(gradient)),
    )  # fmt: skip


add_bias_gradient = add_column_sums


def linear_backward(
    dloss: Any, saved: LinearCrossEntropySaved, dx: Array, dweight: Array, dbias: Array | None, accumulate: bool
) -> None:
    """dx = saved.dx · dloss, and the parameters' gradients likewise, or added."""
    assert saved.dx is not None
    assert saved.dweight is not None
    number = _number(dloss, dx)
    is_known_one = number[0] is None and number[1] == 1.0
    if dx is not saved.dx or not is_known_one:
        _multiply("dx", saved.dx, number, dx, False)
    _multiply("dweight", saved.dweight, number, dweight, accumulate)
    if dbias is not None and saved.dbias is not None:
        _multiply("dbias", saved.dbias, number, dbias, accumulate)


def _multiply(name: str, x: Array, number: tuple[Array | None, float], y: Array, accumulate: bool) -> None:
    at, value = number
    if y.ndim == 1:  # of any stride
        x, y = x[:, None], y[:, None]
    source, rows, stride = contiguous_rows(x)
    to, _, to_stride = result_rows(name, y)
    width = y.shape[-1]
    if stride == to_stride == width:
        rows, width = 1, rows * width
        stride = to_stride = width
    vector = vector_elements(y.itemsize, (width, stride, to_stride), (source, to))
    _scalar_kernel("multiply", y.dtype, vector, INT32).launch(
        y, (-(-width // (256 * vector)), min(rows, 65535)), (256,),
        (source, stride, 0 if at is None else at, value, int(accumulate), to, to_stride, rows, width),
    )  # fmt: skip


def _number(value: Any, like: Array) -> tuple[Array | None, float]:
    """A number for a kernel: an array if it is on the device, where it is left, or else its value."""
    if type(value) is type(like):
        return contiguous(value, FLOAT32), 0.0
    return None, float(value)


def _task(targets: Array, options: Smoothing) -> tuple[Array, int, int, float, float]:
    return (
        targets, element_stride(targets), int(options.ignore_index), float(options.label_smoothing),
        float(options.z_loss),
    )  # fmt: skip


@functools.cache
def _layout(dtype: DType, width: int) -> RowLayout:
    vector = 16 // dtype.itemsize
    layout = layout_of(width, vector)
    return layout if layout.threads <= _THREADS else RowLayout(vector, _THREADS, _ELEMENTS // vector)


@functools.cache
def _row_kernel(name: str, dtype: DType, target_dtype: DType, layout: RowLayout) -> Kernel:
    return Kernel(_ROWS, name, {**layout.defines(dtype), "TTR_INDEX_BYTES": target_dtype.itemsize})


@functools.cache
def _scalar_kernel(name: str, dtype: DType, vector: int, target_dtype: DType) -> Kernel:
    sizes = {"TTR_VECTOR": vector, "TTR_INDEX_BYTES": target_dtype.itemsize}
    return Kernel(_SCALARS, name, {"TTR_T": CXX_TYPES[dtype], **sizes})


# Vocabularies of a warp per row, of a block per row, all in registers, and of several tiles.
INSTANTIATIONS = [
    *(
        _row_kernel(name, dtype, INT32, _layout(dtype, vocabulary))
        for dtype in (FLOAT32, BFLOAT16, FLOAT16)
        for vocabulary in (256, 4096, 50257)
        for name in ("cross_entropy_forward", "cross_entropy_backward", "cross_entropy_in_place")
    ),
    *(_scalar_kernel("count_targets", FLOAT32, 1, dtype) for dtype in (INT32, INT64)),
    _scalar_kernel("mean_loss", FLOAT32, 1, INT32),
    *(_scalar_kernel("multiply", dtype, 16 // dtype.itemsize, INT32) for dtype in (FLOAT32, BFLOAT16, FLOAT16)),
]

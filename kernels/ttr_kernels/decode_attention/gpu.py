"""Decoding attention on a GPU: pieces of the rings' keys on all multiprocessors, then their combination."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..attention.gpu import LINEAR, LOG, NO_BIAS, WIDTHS
from ..common.arrays import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    Array,
    DType,
    array_module,
    contiguous_rows,
    kernel_view,
    result_rows,
)
from ..common.cuda.launch import CXX_TYPES, Kernel, scratch, vector_elements

if TYPE_CHECKING:
    from ..attention import TimeBias

_SOURCE = Path(__file__).with_name("decode_attention.cu")
# Keys of a piece and threads of a block, as the kernels have them.
_PIECE, _THREADS, _COMBINING_THREADS = 128, 128, 256
# Floats of queries that a thread holds; it holds as many of results.
_HELD = 64


def decode(
    q: Array, k: Array, v: Array, lengths: Array, rings: Array, scale: float, span: int, times: Array | None,
    key_times: Array | None, time_bias: TimeBias | None, out: Array,
) -> None:  # fmt: skip
    sequences, heads, dim = q.shape
    capacity, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    if dim > WIDTHS[-1]:
        raise ValueError(f"q: got head dim {dim}, expected at most {WIDTHS[-1]} on a GPU")
    if not out.size:
        return
    (q, _, q_stride), (k, _, k_stride), (v, _, v_stride) = (contiguous_rows(array, 2) for array in (q, k, v))
    result, _, stride = result_rows("out", out, 2)
    vector = vector_elements(q.itemsize, (dim, q_stride, k_stride, v_stride), (q, k, v))
    layout = _layout(dim, vector, group)
    bias = NO_BIAS if time_bias is None else LINEAR if time_bias.kind == "linear" else LOG
    # On the host they are known: nothing waits for the GPU to say how much work there is.
    pieces = max(1, -(-min(span, int(lengths.max())) // _PIECE))
    width = -(-dim // 4) * 4
    partial = scratch(out, (sequences * pieces * heads, width), FLOAT32, "results of pieces")
    statistics = scratch(out, (sequences * pieces * heads, 2), FLOAT32, "statistics of pieces")
    indices = _on_device(out, lengths, rings)
    _kernel("decode_attention_pieces", out.dtype, layout, bias).launch(
        out, (sequences * pieces, kv_heads * -(-group // layout.heads)), (_THREADS,),
        (q, q_stride, k, k_stride, v, v_stride, indices[0], indices[1], scale, capacity, span, heads, group, dim,
         pieces, partial, width, statistics, *_time_arguments(times, key_times, time_bias)),
    )  # fmt: skip
    _kernel("decode_attention_combine", out.dtype, layout, bias).launch(
        out, (sequences * heads,), (_COMBINING_THREADS,),
        (partial, width, statistics, indices[0], span, heads, dim, pieces, result, stride),
    )  # fmt: skip


def _time_arguments(times: Array | None, key_times: Array | None, bias: TimeBias | None) -> list[Array]:
    if bias is None or times is None or key_times is None:
        return []
    xp = array_module(bias.rate)
    rate, tau = (xp.ascontiguousarray(each, FLOAT32) for each in (bias.rate, bias.tau))
    return [kernel_view(times), kernel_view(key_times), rate, tau]


def _on_device(like: Array, lengths: Array, rings: Array) -> Array:
    """(2, B): both beside `like`. The layers of a model ask for the same ones: they are copied once."""
    xp = array_module(like)
    device = None if xp is np else like.device.id  # type: ignore[attr-defined]
    return _kept_indices(lengths.tobytes(), rings.tobytes(), xp, device)


@functools.lru_cache(maxsize=8)
def _kept_indices(lengths: bytes, rings: bytes, xp: Any, device: Any) -> Array:
    made: Array = xp.asarray(np.stack([np.frombuffer(each, np.int64) for each in (lengths, rings)]))
    return made


class _Layout(NamedTuple):
    """Elements that move at once, threads of a row, vectors of each thread, and query heads that share a block."""

    vector: int
    lanes: int
    items: int
    heads: int


@functools.cache
def _layout(dim: int, vector: int, group: int) -> _Layout:
    vectors = -(-dim // vector)
    lanes = min(32, 1 << (vectors - 1).bit_length())
    items = -(-vectors // lanes)
    blocks = -(-group * items * vector // _HELD)
    return _Layout(vector, lanes, items, -(-group // blocks))


@functools.cache
def _kernel(name: str, dtype: DType, layout: _Layout, bias: int) -> Kernel:
    macros = {"TTR_VECTOR": layout.vector, "TTR_LANES": layout.lanes, "TTR_ITEMS": layout.items}
    return Kernel(_SOURCE, name, {"TTR_T": CXX_TYPES[dtype], "TTR_HEADS": layout.heads, "TTR_BIAS": bias, **macros})


# Head dims of the presets with no bias or the log bias; of the rest a sample, among them the most registers.
_USUAL = [
    *((dtype, dim, 1, bias) for dtype in (BFLOAT16, FLOAT32) for dim in (32, 64) for bias in (NO_BIAS, LOG)),
    (BFLOAT16, 64, 1, LINEAR),
    (FLOAT16, 64, 1, LOG),
    (BFLOAT16, 64, 4, LOG),
    (BFLOAT16, 128, 8, LOG),
    (FLOAT32, 128, 8, LOG),
]
INSTANTIATIONS = [
    _kernel(f"decode_attention_{name}", dtype, _layout(dim, 16 // dtype.itemsize, group), bias)
    for dtype, dim, group, bias in _USUAL
    for name in ("pieces", "combine")
]

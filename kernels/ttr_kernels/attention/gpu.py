"""Launch of the GPU attention kernels: tile sizes, the work list, and arrays in the form in which kernels take them.

A block takes one tile of one sequence for one head. Which tiles there are is computed on the host from the offsets of
the sequences, where they are anyway, sorted by work (under a causal mask the last queries see the most keys), and
copied to the device; lists are kept, so that a batch of known lengths computes and copies nothing.

Rows travel as (address, stride). They must begin at multiples of 16 bytes, and the head dim must be a multiple of 8;
arrays for which that does not hold are copied, padded with zeros, and such results are copied back.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common import packing
from ..common.arena import outside
from ..common.arrays import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    INT32,
    Array,
    DType,
    array_module,
    contiguous,
    empty,
    flat_rows,
    kernel_view,
)
from ..common.cuda.launch import CXX_TYPES, Kernel, address
from ..common.philox import keep_threshold
from .newest_keys import newest_key_times

if TYPE_CHECKING:
    from . import AttentionSaved, Dropout, TimeBias, TimeBiasGrad, Visibility

# Head dims for which there are kernels; others are padded with zeros in shared memory.
WIDTHS = (32, 64, 96, 128, 192, 256)
NO_BIAS, LINEAR, LOG = 0, 1, 2
_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Tiles:
    """Queries and keys of a tile, and the warps of a block, which share the queries (in backward_keys the keys)."""

    queries: int
    keys: int
    warps: int
    slices: int = 1  # backward_keys: blocks that share the columns of dk and dv


def forward_tiles(width: int, itemsize: int) -> Tiles:
    if itemsize == 4:
        return Tiles(64, 32 if width <= 192 else 16, 4)
    # A warp with 32 rows loads half as much from shared memory per product as one with 16. Beside its results of 128
    # columns there are registers for the weights of 32 keys, not of 64.
    return Tiles(128, 32 if width == 128 else 64, 4) if width <= 128 else Tiles(64, 64 if width == 192 else 32, 4)


def queries_tiles(width: int, itemsize: int) -> Tiles:
    """Of backward_queries: beside its queries a block keeps their dout."""
    if itemsize == 4:
        return Tiles(64, 32, 4) if width <= 96 else Tiles(64, 16, 4) if width <= 128 else Tiles(32, 16, 2)
    return Tiles(128, 16 if width == 128 else 32, 4) if width <= 128 else Tiles(64, 32, 4)


def keys_tiles(width: int, itemsize: int) -> Tiles:
    """Of backward_keys: beside its keys a block keeps their values, and it has two results."""
    if itemsize == 4:
        return Tiles(32, 64, 4) if width <= 128 else Tiles(16, 32, 2, slices=2)
    return Tiles(32 if width == 128 else 64, 64, 4) if width <= 128 else Tiles(32, 64, 4, slices=2)


def shared_bytes(file: str, tiles: Tiles, width: int, itemsize: int) -> int:
    """Shared memory of a block, as the file lays it out."""
    row = width * itemsize
    if file == "backward_keys":
        return (2 * tiles.keys + 4 * tiles.queries) * row + 32 * tiles.queries
    kept = 1 if file == "forward" else 2
    return (kept * tiles.queries + 4 * tiles.keys) * row + 16 * tiles.keys + 8 * tiles.queries


_TILES = {"forward": forward_tiles, "backward_queries": queries_tiles, "backward_keys": keys_tiles}


def forward(
    q: Array, k: Array, v: Array, scale: float, visibility: Visibility, times: Array | None, key_times: Array | None,
    time_bias: TimeBias | None, dropout: Dropout, out: Array,
) -> Array:  # fmt: skip
    heads, group = q.shape[-2], q.shape[-2] // k.shape[-2]
    width = _width(q.shape[-1])
    log_normalizer = empty((_queries(visibility), heads), FLOAT32, q)
    q, scale = _with_positive_scale(q, scale)
    rows = [_Rows(array) for array in (q, k, v)]
    result = _Rows(out, result=True)
    kernel, tiles = _kernel("forward", q.dtype, width, _kind(time_bias), dropout.rate > 0)
    work = _work_list(q, visibility, tiles.queries, by_keys=False)
    arguments = [
        work, *_each(rows), result.array, result.stride, log_normalizer,
        group, result.dim, scale, int(visibility.causal), visibility.window,
        *_time_arguments(times, key_times, time_bias, visibility), *_dropout_arguments(dropout, heads),
    ]  # fmt: skip
    kernel.launch(q, (len(work), heads), (32 * tiles.warps,), arguments)
    result.finish()
    return log_normalizer


def backward(
    dout: Array, saved: AttentionSaved, dq: Array, dk: Array, dv: Array, gradient: TimeBiasGrad | None
) -> None:
    visibility, dtype = saved.visibility, dout.dtype
    heads, kv_heads = saved.q.shape[-2], saved.k.shape[-2]
    group, total = heads // kv_heads, _queries(visibility)
    width = _width(dout.shape[-1])
    q, scale = _with_positive_scale(saved.q, saved.scale)
    rows_q, rows_k, rows_v, rows_do = (_Rows(array) for array in (q, saved.k, saved.v, dout))
    result_q, result_k, result_v = (_Rows(array, result=True) for array in (dq, dk, dv))
    rows_out, dim = _Rows(saved.out), result_q.dim

    statistics = empty((heads, total, 2), FLOAT32, dout)
    _statistics_kernel(dtype).launch(
        dout, (-(-total * heads // 16),), (128,),
        [rows_do.array, rows_do.stride, rows_out.array, rows_out.stride, saved.log_normalizer, statistics,
         total, heads, dim],
    )  # fmt: skip

    inputs = [*_each([rows_q, rows_k, rows_v, rows_do]), statistics, total]
    kind, dropping = _kind(saved.time_bias), saved.dropout.rate > 0
    last = [
        *_time_arguments(saved.times, saved.key_times, saved.time_bias, visibility),
        *_dropout_arguments(saved.dropout, heads),
    ]  # fmt: skip
    sight = [int(visibility.causal), visibility.window]

    kernel, tiles = _kernel("backward_keys", dtype, width, kind, dropping)
    work = _work_list(dout, visibility, tiles.keys, by_keys=True)
    kernel.launch(
        dout, (len(work), kv_heads, tiles.slices), (32 * tiles.warps,),
        [work, *inputs, result_k.array, result_k.stride, result_v.array, result_v.stride, group, dim, scale, *sight,
         *last],
    )  # fmt: skip

    kernel, tiles = _kernel("backward_queries", dtype, width, kind, dropping)
    work = _work_list(dout, visibility, tiles.queries, by_keys=False)
    partial = [] if gradient is None else [empty((heads, len(work), 2), FLOAT32, dout)]
    kernel.launch(
        dout, (len(work), heads), (32 * tiles.warps,),
        [work, *inputs, result_q.array, result_q.stride, group, dim, scale, saved.scale, *sight, *last, *partial],
    )  # fmt: skip
    for result in (result_q, result_k, result_v):
        result.finish()
    if gradient is not None and saved.time_bias is not None and len(work):
        rate, tau = kernel_view(saved.time_bias.rate), kernel_view(saved.time_bias.tau)
        drate, dtau = contiguous(gradient.rate), contiguous(gradient.tau)
        _gradients_kernel(dtype).launch(
            dout, (heads,), (128,), [partial[0], len(work), rate, tau, drate, dtau]
        )  # fmt: skip
        if drate is not gradient.rate:
            gradient.rate[...] = drate
        if dtau is not gradient.tau:
            gradient.tau[...] = dtau


class _Rows:
    """An array (..., heads, dim) as kernels take it: element (row, head, d) at row · stride + head · dim + d.

    A result that kernels cannot take gets an array of its own; `finish` copies it to its place.
    """

    def __init__(self, given: Array, result: bool = False) -> None:
        self.dim = -(-given.shape[-1] // 8) * 8
        self._given: Array | None = None
        try:
            self.array, _, self.stride = flat_rows(given, 2)
            fits = self.dim == given.shape[-1] and self.stride * given.itemsize % 16 == 0
            fits = fits and (given.size == 0 or address(self.array) % 16 == 0)
        except ValueError:
            fits = False
        if not fits:
            xp = array_module(given)
            self._padded = xp.zeros((*given.shape[:-1], self.dim), given.dtype)
            if result:
                self._given = given
            else:
                self._padded[..., : given.shape[-1]] = given
            self.array, _, self.stride = flat_rows(self._padded, 2)

    def finish(self) -> None:
        if self._given is not None:
            self._given[...] = self._padded[..., : self._given.shape[-1]]


def _each(rows: list[_Rows]) -> list[Any]:
    return [argument for row in rows for argument in (row.array, row.stride)]


def _with_positive_scale(q: Array, scale: float) -> tuple[Array, float]:
    """q and scale of the same logits with scale > 0, which the kernels' running maximum relies on."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (array_module(q).zeros_like(q), 1.0)


def _width(dim: int) -> int:
    for width in WIDTHS:
        if dim <= width:
            return width
    raise ValueError(f"q: got head dim {dim}, expected at most {WIDTHS[-1]} on a GPU")


def _queries(visibility: Visibility) -> int:
    return int(visibility.query_offsets[-1])


def _kind(bias: TimeBias | None) -> int:
    return NO_BIAS if bias is None else LINEAR if bias.kind == "linear" else LOG


def _time_arguments(
    times: Array | None, key_times: Array | None, bias: TimeBias | None, visibility: Visibility
) -> list[Array]:
    if bias is None or times is None or key_times is None:
        return []
    if bias.kind == "linear" and times is not key_times:
        times = newest_key_times(times, key_times, visibility)
    return [kernel_view(array) for array in (times, key_times, bias.rate, bias.tau)]


def _dropout_arguments(dropout: Dropout, heads: int) -> list[Any]:
    if dropout.rate == 0:
        return []
    at: Any = 0 if dropout.offset_at is None else dropout.offset_at
    return [keep_threshold(dropout.rate), 1 / (1 - dropout.rate), *dropout.key(heads), at]


def _work_list(like: Array, visibility: Visibility, tile: int, by_keys: bool) -> Array:
    """(tiles, 5) int32, see sequence.cuh; the tiles with the most visible pairs first."""
    q, k = visibility.query_offsets, visibility.key_offsets
    causal, window = visibility.causal, visibility.window
    fixed = packing.current()
    if fixed is not None:
        # Queries and keys are the same packed rows. Each sequence has at most one tile that is not full; what is added
        # has no rows.
        return fixed.get(
            ("tiles", tile, by_keys, causal, window),
            lambda cu_seqlens: _tiles(cu_seqlens, cu_seqlens, causal, window, tile, by_keys),
            int(q[-1]) // tile + fixed.sequences,
        )
    xp = array_module(like)
    device = None if xp is np else like.device.id  # type: ignore[attr-defined]
    return _kept_work_list(q.tobytes(), k.tobytes(), causal, window, tile, by_keys, xp, device)


@functools.lru_cache(maxsize=64)
def _kept_work_list(
    query_offsets: bytes, key_offsets: bytes, causal: bool, window: int, tile: int, by_keys: bool, xp: Any, device: Any
) -> Array:
    q, k = np.frombuffer(query_offsets, np.int64), np.frombuffer(key_offsets, np.int64)
    with outside():
        made: Array = xp.asarray(_tiles(q, k, causal, window, tile, by_keys))
    return made


def _tiles(q: Array, k: Array, causal: bool, window: int, tile: int, by_keys: bool) -> Array:
    q, k = q.astype(np.int64), k.astype(np.int64)
    if max(q[-1], k[-1]) >= 2**31:
        raise ValueError(f"q: got {max(q[-1], k[-1])} rows in all, expected fewer than 2^31 on a GPU")
    lengths, key_lengths = np.diff(q), np.diff(k)
    tiled = key_lengths if by_keys else lengths
    tiles = -(-tiled // tile)
    n = np.repeat(np.arange(len(tiles)), tiles)
    first = (np.arange(len(n)) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * tile
    last = np.minimum(first + tile, tiled[n]) - 1
    shift = key_lengths[n] - lengths[n]
    if by_keys:
        begin = np.maximum(0, first - shift) if causal else 0
        end = np.minimum(lengths[n], last - shift + window) if window else lengths[n]
    else:
        begin = np.maximum(0, first + shift - window + 1) if window else 0
        end = np.minimum(key_lengths[n], last + shift + 1) if causal else key_lengths[n]
    order = np.argsort(-np.maximum(end - begin, 0), kind="stable")
    rows: Array = np.stack([q[n], lengths[n], k[n], key_lengths[n], first], axis=-1)[order].astype(INT32)
    return rows


@functools.cache
def _kernel(file: str, dtype: DType, width: int, bias: int, dropping: bool) -> tuple[Kernel, Tiles]:
    tiles = _TILES[file](width, dtype.itemsize)
    macros: dict[str, int | str] = {
        "TTR_T": CXX_TYPES[dtype],
        "TTR_HEAD_DIM": width,
        "TTR_BIAS": bias,
        "TTR_DROPOUT": int(dropping),
        "TTR_QUERIES": tiles.queries,
        "TTR_KEYS": tiles.keys,
        "TTR_WARPS": tiles.warps,
    }
    if file == "backward_keys":
        macros["TTR_SLICES"] = tiles.slices
    shared = shared_bytes(file, tiles, width, dtype.itemsize)
    return Kernel(_HERE / f"{file}.cu", f"attention_{file}", macros, shared), tiles


@functools.cache
def _statistics_kernel(dtype: DType) -> Kernel:
    return Kernel(_HERE / "backward_rows.cu", "attention_row_statistics", {"TTR_T": CXX_TYPES[dtype]})


@functools.cache
def _gradients_kernel(dtype: DType) -> Kernel:
    return Kernel(_HERE / "backward_rows.cu", "attention_bias_gradients", {"TTR_T": CXX_TYPES[dtype]})


# What users with default settings meet: head dims of the presets, no bias or the log bias, with and without dropout. Of
# the rest a sample: dtypes and kinds of bias differ in a few instructions.
_USUAL = [
    *((dtype, width, bias, dropping) for dtype in (BFLOAT16, FLOAT32) for width in (32, 64) for bias in (NO_BIAS, LOG)
      for dropping in (False, True)),
    *((BFLOAT16, 128, bias, False) for bias in (NO_BIAS, LINEAR, LOG)),
    (BFLOAT16, 128, LOG, True),
    (BFLOAT16, 64, LINEAR, False),
    (FLOAT16, 64, NO_BIAS, False),
    (FLOAT16, 64, LOG, True),
]  # fmt: skip
INSTANTIATIONS: list[Kernel] = [
    *(_kernel(file, *variant)[0] for variant in _USUAL for file in _TILES),
    *(kernel(dtype) for dtype in (FLOAT32, BFLOAT16, FLOAT16) for kernel in (_statistics_kernel, _gradients_kernel)),
]

"""Linear attention on a GPU: all chunks of all sequences at once, but for one scan over the chunks' sums.

Features of queries and keys are computed first and kept for the call, (rows, heads, M) float32. What each chunk adds to
the past is a matrix (M, D + 1) per head; a scan turns it into what the chunk sees of those before it, and then every
chunk is a few products of small matrices. The backward does the same with the future. All of it is float32, and each
result is summed by one block in a fixed order.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.arrays import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INT64,
    Array,
    DType,
    array_module,
    contiguous_rows,
    empty,
    kernel_view,
    result_rows,
)
from ..common.cuda.launch import CXX_TYPES, Kernel, scratch

if TYPE_CHECKING:
    from ..attention import TimeBias
    from . import LinearAttentionSaved, LinearAttentionState

_HERE = Path(__file__).resolve().parent
# Positions of a chunk, rows and columns of a tile, threads of a block, as the kernels have them.
_CHUNK, _SIDE, _THREADS = 64, 64, 256


def forward(
    q: Array, k: Array, v: Array, features: Array, scale: float, offsets: Array, times: Array | None,
    time_bias: TimeBias | None, out: Array,
) -> Array:  # fmt: skip
    normalizer = empty((int(offsets[-1]), q.shape[-2]), FLOAT32, q)
    if out.size:
        past = _Past(q, k, v, features, scale, offsets, times, time_bias)
        past.compute(0, None)
        past.outputs(out, normalizer)
    return normalizer


def extend(
    q: Array, k: Array, v: Array, features: Array, scale: float, offsets: Array, times: Array | None,
    time_bias: TimeBias | None, state: LinearAttentionState, rings: Array, out: Array,
) -> None:  # fmt: skip
    if not out.size:
        return
    xp = array_module(q)
    past, device_rings = _Past(q, k, v, features, scale, offsets, times, time_bias), xp.asarray(rings)
    counts = np.diff(offsets)
    if (counts == 1).all():
        past.step(device_rings, state, out)
    else:
        past.compute(device_rings, state)
        past.outputs(out, scratch(q, (past.rows, past.heads), FLOAT32, "normalizers"))
    if times is not None:
        some = counts > 0
        state.times[xp.asarray(rings[some])] = times[xp.asarray(offsets[1:][some] - 1)]


def backward(dout: Array, saved: LinearAttentionSaved, dq: Array, dk: Array, dv: Array, rates: Array | None) -> None:
    if not dout.size:
        return
    past = _Past(
        saved.q, saved.k, saved.v, saved.features, saved.scale, saved.offsets, saved.times, saved.time_bias
    )  # fmt: skip
    past.compute(0, None)
    rows, heads, dim, count = past.rows, past.heads, past.dim, past.count
    (given, _, given_stride), (result, _, result_stride) = contiguous_rows(dout, 2), contiguous_rows(saved.out, 2)
    u = scratch(dout, (rows, heads, dim + 1), FLOAT32, "upstream gradients")
    past.launch(
        "backward", "upstream", (-(-rows * heads // (_THREADS // 32)),), given, given_stride, result, result_stride,
        saved.normalizer, rows, heads, dim, u,
    )  # fmt: skip
    future = scratch(dout, past.sums.shape, FLOAT32, "sums of the future")
    past.launch(
        "backward", "query_sums", (past.chunks, heads, past.tiles * past.columns), past.phi_q, u, *past.places, heads,
        dim, count, future,
    )  # fmt: skip

    # The shares of the rates' gradients: of each chunk by scan_back, dvalues, dkeys and dqueries.
    blocks = past.sequences * past.scan_blocks, past.chunks, past.chunks * past.tiles, past.chunks * past.tiles
    ends = np.cumsum(blocks).tolist()
    every = scratch(dout, (ends[-1], heads), FLOAT64, "gradients of rates")
    parts = [every[end - block : end] for end, block in zip(ends, blocks, strict=True)]
    past.launch(
        "backward", "scan_back", (past.sequences, heads, past.scan_blocks), future, past.sums, past.places[0],
        past.chunks_of, *past.places[1:], heads, count * (dim + 1), parts[0],
    )  # fmt: skip
    inputs = [past.phi_q, past.exponents, past.v, past.v_stride, u]
    sizes = [heads, past.group, dim, count]
    dvalues = scratch(dout, (rows, heads, dim), FLOAT32, "gradients of values")
    past.launch(
        "backward", "dvalues", (past.chunks, heads, past.columns), *inputs, future, *past.places, *sizes, dvalues,
        parts[1],
    )  # fmt: skip
    dexponents = scratch(dout, (rows, heads, count), FLOAT32, "gradients of exponents")
    past.launch(
        "backward", "dkeys", (past.chunks, heads, past.tiles), *inputs, future, *past.places, *sizes, dexponents,
        parts[2],
    )  # fmt: skip
    # Last, since it puts its result in the place of the queries' features.
    past.launch(
        "backward", "dqueries", (past.chunks, heads, past.tiles), *inputs, past.sums, *past.places, *sizes, parts[3]
    )  # fmt: skip
    past.through_features(past.phi_q, saved.q, 1, "dq", dq)
    past.through_features(dexponents, saved.k, past.group, "dk", dk)
    flat, _, stride = result_rows("dv", dv, 2)
    past.launch(
        "backward", "sum_groups", (-(-dv.size // _THREADS),), dvalues, rows, past.kv_heads, past.group, dim, flat,
        stride,
    )  # fmt: skip
    if rates is not None:
        past.launch("backward", "rates", (heads,), every, len(every), heads, rates)


class _Past:
    """One call: features, and what each chunk sees of those before it."""

    def __init__(
        self, q: Array, k: Array, v: Array, features: Array, scale: float, offsets: Array, times: Array | None,
        time_bias: TimeBias | None,
    ) -> None:  # fmt: skip
        xp = array_module(q)
        self.like, self.scale = q, scale
        self.rows, self.heads, self.dim = int(offsets[-1]), q.shape[-2], q.shape[-1]
        self.kv_heads = k.shape[-2]
        self.group, self.count, self.sequences = self.heads // self.kv_heads, len(features), len(offsets) - 1
        self.features = xp.ascontiguousarray(features)
        self.directions = xp.ascontiguousarray(features.T)
        self.decays = times is not None and time_bias is not None
        # Tiles of features and of columns, and blocks that scan a head's sums.
        self.tiles, self.columns = -(-self.count // _SIDE), -(-self.dim // _SIDE)
        self.scan_blocks = -(-self.count * (self.dim + 1) // _THREADS)
        work = _work(q, offsets)
        self.chunks, self.table, self.chunks_of = len(work.chunks), work.chunks, work.chunks_of
        self.v, _, self.v_stride = contiguous_rows(v, 2)
        self.phi_q, _ = self._features(q, self.heads, "queries")
        self.exponents, self._largest = self._features(k, self.kv_heads, "keys")
        self.shifts = scratch(q, (self.chunks + self.sequences, self.heads), FLOAT32, "shifts")
        self.sums = scratch(q, (self.chunks, self.heads, self.count, self.dim + 1), FLOAT32, "sums of the past")
        # Where chunks begin and how they decay: what nearly all kernels take. Without decay there are no times.
        nothing: Any = 0  # no address
        self._times, self._bases, of_heads = nothing, nothing, nothing
        if times is not None and time_bias is not None:
            self._times, self._bases = kernel_view(times), scratch(q, (self.chunks, self.heads), FLOAT64, "bases")
            of_heads = xp.ascontiguousarray(time_bias.rate / time_bias.tau, FLOAT32)
        self.places = [self.table, self.shifts, self._times, self._bases, of_heads]

    def launch(self, file: str, name: str, grid: tuple[int, ...], *arguments: Any) -> None:
        threads = 32 if name == "shifts" else _THREADS
        _kernel(file, name, self.like.dtype, self.decays).launch(self.like, grid, (threads,), arguments)

    def compute(self, rings: Any, state: LinearAttentionState | None) -> None:
        """`sums` becomes what each chunk sees of those before it, from `state` on, which goes on; or from nothing."""
        of_state: tuple[Any, Any, Any] = (0, 0, 0) if state is None else (state.sums, state.shift, state.times)
        state_sums, state_shift, state_times = of_state
        self.launch(
            "forward", "shifts", (self.sequences, self.heads), self._largest, self.table, self.chunks_of, self.heads,
            self.group, self.shifts, self._times, self._bases, rings, state_shift, state_times,
        )  # fmt: skip
        self.launch(
            "forward", "key_sums", (self.chunks, self.heads, self.tiles * self.columns), self.exponents, self.v,
            self.v_stride, *self.places, self.heads, self.group, self.dim, self.count, self.sums,
        )  # fmt: skip
        self.launch(
            "forward", "scan", (self.sequences * self.heads, self.scan_blocks), self.sums, self.table, self.chunks_of,
            *self.places[1:], self.heads, self.count * (self.dim + 1), rings, state_sums,
        )  # fmt: skip

    def step(self, rings: Array, state: LinearAttentionState, out: Array) -> None:
        """One position of each sequence, without chunks."""
        result, _, stride = result_rows("out", out, 2)
        self.launch(
            "step", "step", (self.sequences, self.heads), self.phi_q, self.exponents, self._largest, self.v,
            self.v_stride, self._times, self.places[-1], rings, state.sums, state.shift, state.times, self.heads,
            self.group, self.dim, self.count, result, stride,
        )  # fmt: skip

    def outputs(self, out: Array, normalizer: Array) -> None:
        """The chunks' results from their own positions and from those before."""
        result, _, stride = result_rows("out", out, 2)
        self.launch(
            "forward", "outputs", (self.chunks, self.heads, self.columns), self.phi_q, self.exponents, self.v,
            self.v_stride, self.sums, *self.places, self.heads, self.group, self.dim, self.count, result, stride,
            normalizer,
        )  # fmt: skip

    def through_features(self, gradient: Array, x: Array, group: int, name: str, dx: Array) -> None:
        """dx from the gradient of x's exponents (rows, heads of x · group, M)."""
        (flat, _, stride), (result, _, result_stride) = contiguous_rows(x, 2), result_rows(name, dx, 2)
        heads = x.shape[-2]
        self.launch(
            "features", "through_features", (-(-self.rows // _SIDE), heads, self.columns), gradient, flat, stride,
            self.rows, heads, group, self.dim, self.features, self.count, math.sqrt(self.scale), result, result_stride,
        )  # fmt: skip

    def _features(self, x: Array, heads: int, of: str) -> tuple[Array, Array]:
        """(φ of queries or exponents of keys, largest exponents of keys)."""
        flat, _, stride = contiguous_rows(x, 2)
        result = scratch(self.like, (self.rows, heads, self.count), FLOAT32, f"features of {of}")
        largest = scratch(self.like, (self.rows, heads), FLOAT32, f"largest exponents of {of}")
        self.launch(
            "features", "features", (-(-self.rows // _SIDE), heads), flat, stride, self.rows, heads, self.dim,
            self.directions, self.count, math.sqrt(self.scale), result, largest, int(of == "queries"),
        )  # fmt: skip
        return result, largest


@dataclass(frozen=True)
class _Work:
    """chunks (C, 3): first row, positions, sequence. chunks_of (N + 1,): where each sequence's chunks begin."""

    chunks: Array
    chunks_of: Array


def _work(like: Array, offsets: Array) -> _Work:
    xp = array_module(like)
    device = None if xp is np else like.device.id  # type: ignore[attr-defined]
    return _kept_work(offsets.tobytes(), xp, device)


@functools.lru_cache(maxsize=64)
def _kept_work(given: bytes, xp: Any, device: Any) -> _Work:
    offsets = np.frombuffer(given, INT64)
    lengths = np.diff(offsets)
    counts = -(-lengths // _CHUNK)
    chunks_of = np.concatenate([[0], np.cumsum(counts)]).astype(INT64)
    sequence = np.repeat(np.arange(len(counts)), counts)
    first = (np.arange(len(sequence)) - chunks_of[sequence]) * _CHUNK
    chunks = np.stack([offsets[sequence] + first, np.minimum(_CHUNK, lengths[sequence] - first), sequence], axis=-1)
    return _Work(xp.asarray(np.ascontiguousarray(chunks, INT64)), xp.asarray(chunks_of))


@functools.cache
def _kernel(file: str, name: str, dtype: DType, decays: bool) -> Kernel:
    macros: dict[str, int | str] = {"TTR_T": CXX_TYPES[dtype]}
    if file != "features":
        macros["TTR_DECAYS"] = int(decays)
    return Kernel(_HERE / f"{file}.cu", f"linear_attention_{name}", macros)


_KERNELS = {
    "features": ("features", "through_features"),
    "forward": ("shifts", "key_sums", "scan", "outputs"),
    "step": ("step",),
    "backward": ("upstream", "query_sums", "scan_back", "dvalues", "dkeys", "dqueries", "sum_groups", "rates"),
}
# Every dtype with decay, and the commonest without.
_VARIANTS = [(FLOAT32, True), (BFLOAT16, True), (FLOAT16, True), (BFLOAT16, False)]
INSTANTIATIONS = [
    *(
        _kernel("features", name, dtype, True)
        for dtype in (FLOAT32, BFLOAT16, FLOAT16)
        for name in _KERNELS["features"]
    ),
    *(
        _kernel(file, name, dtype, decays)
        for dtype, decays in _VARIANTS
        for file in ("forward", "step", "backward")
        for name in _KERNELS[file]
    ),
]

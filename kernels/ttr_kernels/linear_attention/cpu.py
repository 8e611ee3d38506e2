"""Launch of the CPU kernels of linear attention: who computes what; and decoding, position by position."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ..attention.cpu_tile import Rows
from ..common.arrays import FLOAT32, FLOAT64, INT64, Array, contiguous_rows, empty, kernel_view, result_rows
from ..common.parallel import parallel_for, single_threaded_blas
from ..common.scratch import scratch_of_threads, thread_scratch
from ..common.tile_multiply import padded
from .cpu_chunk import CHUNK, SMALLEST, Sizes
from .cpu_kernels import backward_units, forward_units, scratch_floats

if TYPE_CHECKING:
    from ..attention import TimeBias
    from . import LinearAttentionSaved, LinearAttentionState


def forward(
    q: Array, k: Array, v: Array, features: Array, scale: float, offsets: Array, times: Array | None,
    time_bias: TimeBias | None, out: Array,
) -> Array:  # fmt: skip
    nothing = np.empty(0, INT64)
    state = np.empty((0, 0, 0, 0), FLOAT32), np.empty((0, 0), FLOAT32), np.empty(0, FLOAT64)
    return _forward(q, k, v, features, scale, offsets, times, time_bias, out, state, nothing)


def extend(
    q: Array, k: Array, v: Array, features: Array, scale: float, offsets: Array, times: Array | None,
    time_bias: TimeBias | None, state: LinearAttentionState, rings: Array, out: Array,
) -> None:  # fmt: skip
    if (np.diff(offsets) == 1).all():
        _step(q, k, v, features, scale, times, time_bias, state, rings, out)
        return
    given = state.sums, state.shift, state.times
    _forward(q, k, v, features, scale, offsets, times, time_bias, out, given, rings)
    some = np.diff(offsets) > 0
    if times is not None:
        state.times[rings[some]] = times[offsets[1:][some] - 1]


def _forward(
    q: Array, k: Array, v: Array, features: Array, scale: float, offsets: Array, times: Array | None,
    time_bias: TimeBias | None, out: Array, state: tuple[Array, Array, Array], rings: Array,
) -> Array:  # fmt: skip
    sizes = _sizes(q, k, features, scale)
    normalizer = empty((int(offsets[-1]), sizes.heads), FLOAT32)
    inputs = _rows(q), _rows(k), _rows(v), _padded(features), Rows(*result_rows("out", out, 2)[::2]), normalizer
    units, shared = _units(offsets, sizes.kv_heads), (offsets, *_times(times, time_bias, sizes))
    floats = scratch_floats(sizes.heads // sizes.kv_heads, sizes.dim, sizes.features, 0, 1)
    scratch = scratch_of_threads(floats, "linear attention")
    parallel_for(forward_units, len(units), units, *inputs, *shared, *state, rings, sizes, scratch, even=False)
    return normalizer


def backward(dout: Array, saved: LinearAttentionSaved, dq: Array, dk: Array, dv: Array, rates: Array | None) -> None:
    q, k, bias = saved.q, saved.k, saved.time_bias
    sizes = _sizes(q, k, saved.features, saved.scale)
    # Of each sequence: summed in a fixed order.
    rate_parts = empty((len(saved.offsets) - 1, sizes.heads), FLOAT64)
    rate_parts.fill(0)
    inputs = _rows(q), _rows(k), _rows(saved.v), _padded(saved.features), _rows(saved.out), saved.normalizer
    units = _units(saved.offsets, sizes.kv_heads)
    shared = saved.offsets, *_times(saved.times, bias, sizes)
    results = (Rows(*result_rows(name, array, 2)[::2]) for name, array in (("dq", dq), ("dk", dk), ("dv", dv)))
    given = _rows(dout), *results, rate_parts
    longest = int(np.diff(saved.offsets).max(initial=0))
    floats = scratch_floats(sizes.heads // sizes.kv_heads, sizes.dim, sizes.features, -(-longest // CHUNK), 3)
    scratch = scratch_of_threads(floats, "linear attention")
    parallel_for(backward_units, len(units), units, *inputs, *shared, *given, sizes, scratch, even=False)
    if rates is not None:
        rates += rate_parts.sum(axis=0)


def _step(
    q: Array, k: Array, v: Array, features: Array, scale: float, times: Array | None, time_bias: TimeBias | None,
    state: LinearAttentionState, rings: Array, out: Array,
) -> None:  # fmt: skip
    """One position of each sequence, all heads at once: the recurrence as it stands."""
    group = q.shape[1] // k.shape[1]
    root = np.float32(math.sqrt(scale))
    queries, keys = q.astype(FLOAT32) * root, k.astype(FLOAT32) * root
    with single_threaded_blas():
        exponents = np.repeat(keys @ features.T - (keys**2).sum(-1, keepdims=True) / 2, group, axis=1)
        phi_q = queries @ features.T
        phi_q = np.exp(phi_q - phi_q.max(axis=-1, keepdims=True))
        before = state.shift[rings]
        shift = np.maximum(before, exponents.max(axis=-1))
        factor = np.exp(before - shift)
        if time_bias is not None and times is not None:
            # Where there is no past, there is no time that it began.
            gaps = np.where(np.isfinite(before), (times - state.times[rings])[:, None], 0.0)
            factor = factor * np.exp(-gaps * (time_bias.rate / time_bias.tau)).astype(np.float32)
        phi_k = np.exp(exponents - shift[..., None])
        values = np.repeat(np.concatenate([v.astype(FLOAT32), np.ones((*v.shape[:2], 1), np.float32)], -1), group, 1)
        sums = state.sums[rings]
        sums *= factor[..., None, None]
        sums += phi_k[..., None] * values[:, :, None, :]
        result = (phi_q[:, :, None, :] @ sums)[:, :, 0]
    over = result[..., -1:]
    out[...] = result[..., :-1] * np.divide(1, over, out=np.zeros_like(over), where=over > SMALLEST)
    state.sums[rings], state.shift[rings] = sums, shift
    if times is not None:
        state.times[rings] = times


def _sizes(q: Array, k: Array, features: Array, scale: float) -> Sizes:
    return Sizes(q.shape[-2], k.shape[-2], q.shape[-1], len(features), np.float32(math.sqrt(scale)))


def _rows(array: Array) -> Rows:
    return Rows(*contiguous_rows(array, 2)[::2])


def _padded(features: Array) -> Array:
    """ω (M, D) flat, with zeros up to whole vectors in both directions."""
    m, d = features.shape
    whole = thread_scratch(padded(m) * padded(d), "linear attention features")[: padded(m) * padded(d)].reshape(
        padded(m), -1
    )
    whole.fill(0)
    whole[:m, :d] = features
    return whole.reshape(-1)


def _times(times: Array | None, bias: TimeBias | None, sizes: Sizes) -> tuple[Array, Array]:
    """(times, rate/tau of each head) as the kernels take them: no times without a bias."""
    rates = empty(sizes.heads, FLOAT32)
    if bias is None or times is None:
        rates.fill(0)
        return np.empty(0, FLOAT64), rates
    np.divide(bias.rate, bias.tau, out=rates, dtype=FLOAT64, casting="same_kind")
    return kernel_view(times), rates


def _units(offsets: Array, kv_heads: int) -> Array:
    """(sequence, key/value head) of each unit, the longest sequences first; none of an empty one."""
    lengths = np.diff(offsets)
    order = np.argsort(-lengths, kind="stable")
    some = order[lengths[order] > 0]
    units = empty((len(some) * kv_heads, 2), INT64)
    units[:, 0], units[:, 1] = np.repeat(some, kv_heads), np.tile(np.arange(kv_heads), len(some))
    return units

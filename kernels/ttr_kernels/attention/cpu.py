"""Launch of the CPU attention kernels: who computes what, and which buffers each thread needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.arrays import FLOAT32, FLOAT64, INT64, Array, contiguous_rows, empty, kernel_view, result_rows, zeros
from ..common.compilation import jit
from ..common.compiled_philox import factor_bits
from ..common.parallel import parallel_for
from ..common.philox import keep_threshold
from ..common.scratch import scratch_of_threads
from ..common.tile_multiply import padded
from .cpu_backward import BACKWARD_KEYS, MOST_BLOCKS, add_query_gradients, backward_floats, backward_units, row_dots
from .cpu_forward import QUERIES, forward_floats, forward_units
from .cpu_tile import LINEAR, LOG, NO_BIAS, Options, Rows
from .newest_keys import newest_key_times

if TYPE_CHECKING:
    from . import AttentionSaved, Dropout, TimeBias, TimeBiasGrad, Visibility

# A unit of the forward keeps its queries and results in the cache: this many floats of each.
_CHUNK_FLOATS = 1 << 16
# The backward is cut along the keys until there are this many units; each cut costs one more partial sum of dq.
_WANTED_UNITS = 32
_MOST_SPLITS = 8


def forward(
    q: Array, k: Array, v: Array, scale: float, visibility: Visibility, times: Array | None, key_times: Array | None,
    time_bias: TimeBias | None, dropout: Dropout, out: Array,
) -> Array:  # fmt: skip
    options = _options(q, k, scale, visibility, time_bias, dropout)
    rows_q, rows_k, rows_v = _rows(q), _rows(k), _rows(v)
    rows_out = Rows(*result_rows("out", out, 2)[::2])
    log_normalizer = empty((int(visibility.query_offsets[-1]), options.heads), FLOAT32)
    group = options.heads // options.kv_heads
    chunk = max(QUERIES, _CHUNK_FLOATS // (group * padded(options.dim)) // QUERIES * QUERIES)
    units = _forward_units(visibility.query_offsets, options.kv_heads, chunk)
    key = dropout.key(options.heads)
    shared = (*_time_arrays(times, key_times, time_bias, visibility), options, key)
    floats = forward_floats(min(chunk, padded(_longest(visibility.query_offsets))), group, padded(options.dim))
    parallel_for(
        forward_units, len(units), units, chunk, rows_q, rows_k, rows_v, rows_out, log_normalizer,
        visibility.query_offsets, visibility.key_offsets, *shared, scratch_of_threads(floats),
        grain=_grain(len(units)), even=False,
    )  # fmt: skip
    return log_normalizer


def backward(
    dout: Array, saved: AttentionSaved, dq: Array, dk: Array, dv: Array, gradient: TimeBiasGrad | None
) -> None:
    visibility, dropout = saved.visibility, saved.dropout
    options = _options(saved.q, saved.k, saved.scale, visibility, saved.time_bias, dropout)
    rows_do = _rows(dout)
    total = int(visibility.query_offsets[-1])
    dots = empty((total, options.heads), FLOAT32)
    parallel_for(row_dots, total, rows_do, _rows(saved.out), options.heads, options.dim, dots, grain=64)

    sequences = len(visibility.query_offsets) - 1
    longest = _longest(visibility.key_offsets)
    blocks = -(-longest // BACKWARD_KEYS)
    wanted = -(-_WANTED_UNITS // max(sequences * options.kv_heads, 1))
    splits = max(1, min(wanted, _MOST_SPLITS, blocks))
    blocks = max(1, min(MOST_BLOCKS, -(-blocks // splits)))
    units = _backward_units(visibility, options.kv_heads, splits)
    group = options.heads // options.kv_heads
    width = padded(options.dim)
    # Where every sequence's keys are one part, each unit writes its queries' gradients itself.
    whole = splits == 1 and longest <= blocks * BACKWARD_KEYS
    partial_dq = zeros(0 if whole else splits * total * options.heads * width, FLOAT32)
    rows_dq = Rows(*result_rows("dq", dq, 2)[::2])
    bias_sums = zeros((len(units), group, 2), FLOAT64)
    inputs = (_rows(saved.q), _rows(saved.k), _rows(saved.v), rows_do, saved.log_normalizer, dots)
    times = _time_arrays(saved.times, saved.key_times, saved.time_bias, visibility)
    key = dropout.key(options.heads)
    results = (
        rows_dq,
        partial_dq,
        Rows(*result_rows("dk", dk, 2)[::2]),
        Rows(*result_rows("dv", dv, 2)[::2]),
        bias_sums,
    )
    parallel_for(
        backward_units, len(units), units, splits, blocks, *inputs, visibility.query_offsets, visibility.key_offsets,
        *times, options, key, *results, scratch_of_threads(backward_floats(width, blocks)),
        grain=_grain(len(units)), even=False,
    )  # fmt: skip
    if not whole:
        parallel_for(
            add_query_gradients, total, partial_dq, splits, total, options.heads, rows_dq, options.dim, options.scale,
            grain=64,
        )  # fmt: skip
    if gradient is not None:
        _add_bias_gradients(bias_sums, options.kv_heads, gradient)


def _rows(array: Array) -> Rows:
    return Rows(*contiguous_rows(array, 2)[::2])


def _options(
    q: Array, k: Array, scale: float, visibility: Visibility, bias: TimeBias | None, dropout: Dropout
) -> Options:
    return Options(
        heads=q.shape[-2],
        kv_heads=k.shape[-2],
        dim=q.shape[-1],
        scale=np.float32(scale),
        causal=visibility.causal,
        window=visibility.window,
        bias=NO_BIAS if bias is None else LINEAR if bias.kind == "linear" else LOG,
        dropping=dropout.rate > 0,
        threshold=np.uint64(keep_threshold(dropout.rate)),
        scale_bits=factor_bits(1 / (1 - dropout.rate)),
    )


def _time_arrays(
    times: Array | None, key_times: Array | None, bias: TimeBias | None, visibility: Visibility
) -> tuple[Array, ...]:
    """(times, key times, rate, tau) as the kernels take them: empty where there is no bias."""
    if bias is None or times is None or key_times is None:
        nothing = np.empty(0, np.float64)
        return nothing, nothing, nothing.astype(np.float32), nothing.astype(np.float32)
    if bias.kind == "linear" and times is not key_times:
        times = newest_key_times(times, key_times, visibility)
    return kernel_view(times), kernel_view(key_times), kernel_view(bias.rate), kernel_view(bias.tau)


def _grain(units: int) -> int:
    # Enough ranges that no thread waits long for the last one, few enough that handing them out costs nothing.
    return max(1, units // 64)


def _forward_units(query_offsets: Array, kv_heads: int, chunk: int) -> Array:
    """(sequence, key/value head, first query row in the sequence) of each unit, longest first."""
    units = empty((_chunks(query_offsets, chunk) * kv_heads, 3), INT64)
    _fill_forward_units(query_offsets, kv_heads, chunk, units)
    return units


@jit
def _longest(offsets: Any) -> int:
    longest = 0
    for n in range(len(offsets) - 1):
        longest = max(longest, offsets[n + 1] - offsets[n])
    return longest


@jit
def _chunks(offsets: Any, chunk: int) -> int:
    count = 0
    for n in range(len(offsets) - 1):
        count += (offsets[n + 1] - offsets[n] + chunk - 1) // chunk
    return count


@jit
def _fill_forward_units(offsets: Any, kv_heads: int, chunk: int, units: Any) -> None:
    longest = _longest(offsets)
    unit = 0
    # Under a causal mask later chunks see more keys: begin with them.
    for first in range((longest - 1) // chunk * chunk, -1, -chunk):
        for n in range(len(offsets) - 1):
            if first < offsets[n + 1] - offsets[n]:
                for head in range(kv_heads):
                    units[unit, 0], units[unit, 1], units[unit, 2] = n, head, first
                    unit += 1


def _backward_units(visibility: Visibility, kv_heads: int, splits: int) -> Array:
    """(sequence, key/value head, split) of each unit: a split takes every `splits`-th block of keys."""
    sequences = len(visibility.query_offsets) - 1
    units = empty((sequences, splits, kv_heads, 3), INT64)
    units[..., 0] = np.arange(sequences)[:, None, None]
    units[..., 1] = np.arange(kv_heads)
    units[..., 2] = np.arange(splits)[:, None]
    return units.reshape(-1, 3)


def _add_bias_gradients(bias_sums: Array, kv_heads: int, gradient: TimeBiasGrad) -> None:
    # bias_sums (units, group, 2): of all heads in turn for each sequence and split, summed in that order.
    totals = bias_sums.reshape(-1, kv_heads, *bias_sums.shape[1:]).sum(axis=0)
    gradient.rate[...] += totals[..., 0].reshape(-1).astype(gradient.rate.dtype)
    gradient.tau[...] += totals[..., 1].reshape(-1).astype(gradient.tau.dtype)

"""Decoding attention on CPU cores: pieces of the rings' keys on all of them, then their combination."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..attention.cpu_tile import LINEAR, LOG, NO_BIAS, Rows
from ..common.arrays import Array, contiguous_rows, kernel_view, result_rows
from ..common.parallel import get_threads, parallel_for
from ..common.ranges import jit_ranges
from .cpu_pieces import KEYS, Options, attend_piece, combine_pieces

if TYPE_CHECKING:
    from ..attention import TimeBias

# Floats of keys and values that are worth a thread of their own, and results to be combined.
_PIECE_FLOATS, _RESULT_FLOATS = 1 << 16, 1 << 15


def decode(
    q: Array, k: Array, v: Array, lengths: Array, rings: Array, scale: float, span: int, times: Array | None,
    key_times: Array | None, time_bias: TimeBias | None, out: Array,
) -> None:  # fmt: skip
    sequences, heads, dim = q.shape
    capacity, kv_heads = k.shape[1:3]
    bias = NO_BIAS if time_bias is None else LINEAR if time_bias.kind == "linear" else LOG
    options = Options(heads, kv_heads, dim, capacity, span, bias, np.float32(scale))
    # One more than the keys fill: the newest positions may go around the end of the ring.
    pieces = -(-min(span, int(lengths.max(initial=0))) // KEYS) + 1
    units = sequences * pieces
    partial = np.empty(units * heads * dim, np.float32)
    statistics = np.empty((2, units * heads), np.float32)
    grain = max(1, _PIECE_FLOATS // (2 * KEYS * kv_heads * dim), -(-units // (8 * get_threads())))
    parallel_for(
        _attend, units, pieces, _rows(q), _rows(k), _rows(v), kernel_view(lengths), kernel_view(rings),
        *_time_arrays(times, key_times, time_bias), options, partial, statistics, grain=grain, even=False,
    )  # fmt: skip
    parallel_for(
        _combine, sequences, pieces, heads, dim, partial, statistics, Rows(*result_rows("out", out, 2)[::2]),
        grain=max(1, _RESULT_FLOATS // (pieces * heads * dim)),
    )  # fmt: skip


@jit_ranges
def _attend(
    pieces: int, q: Any, k: Any, v: Any, lengths: Any, rings: Any, times: Any, key_times: Any, rate: Any, tau: Any,
    options: Any, partial: Any, statistics: Any, begin: int, end: int,
) -> None:  # fmt: skip
    query = np.empty(options.heads * options.dim, np.float32)
    logits = np.empty(options.heads * KEYS, np.float32)
    ages = np.empty(KEYS, np.float32)
    for unit in range(begin, end):
        attend_piece(
            unit, pieces, q, k, v, lengths, rings, times, key_times, rate, tau, options, query, logits, ages, partial,
            statistics,
        )  # fmt: skip


@jit_ranges
def _combine(pieces: int, heads: int, dim: int, partial: Any, statistics: Any, out: Any, begin: int, end: int) -> None:
    result = np.empty(dim, np.float32)
    for sequence in range(begin, end):
        combine_pieces(
            sequence, pieces, heads, dim, partial, statistics, out.flat, sequence * out.stride, result
        )  # fmt: skip


def _rows(array: Array) -> Rows:
    return Rows(*contiguous_rows(array, 2)[::2])


def _time_arrays(times: Array | None, key_times: Array | None, bias: TimeBias | None) -> tuple[Array, ...]:
    """(times, key times, rate, tau) as the kernels take them: empty where there is no bias."""
    if bias is None or times is None or key_times is None:
        nothing = np.empty(0, np.float64)
        return nothing, nothing, nothing.astype(np.float32), nothing.astype(np.float32)
    return kernel_view(times), key_times.reshape(-1), kernel_view(bias.rate), kernel_view(bias.tau)

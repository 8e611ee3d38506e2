"""The two kernels of decoding attention: a softmax over each piece of a sequence's keys, and their combination.

A field of a tuple that is read inside a loop keeps it from becoming vector code: arrays are taken out of theirs first.

A piece is at most KEYS slots of a ring that follow each other; its partial result and its statistics (the largest
logit, the sum of the weights relative to it) are written, and combined in the order of the pieces.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..attention.cpu_tile import LINEAR, NO_BIAS, add_time_bias, scaled_ages
from ..common.compilation import jit
from ..common.storage import load, store
from ..common.tile_multiply import maximum
from ..common.vector_math import exp_of_nonpositive

KEYS = 128
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_MINUS_INFINITY = np.float32(-np.inf)


class Options(NamedTuple):
    """Scalars of one call; span is the number of newest positions that are seen."""

    heads: int
    kv_heads: int
    dim: int
    capacity: int
    span: int
    bias: int
    scale: np.float32


@jit
def attend_pieces(
    pieces: int, q: Any, k: Any, v: Any, lengths: Any, rings: Any, times: Any, key_times: Any, rate: Any, tau: Any,
    options: Any, partial: Any, statistics: Any, begin: int, end: int,
) -> None:  # fmt: skip
    """Units [begin, end): piece unit % pieces of sequence unit // pieces, all heads."""
    heads, dim = options.heads, options.dim
    group = heads // options.kv_heads
    query = np.empty(heads * dim, np.float32)
    logits = np.empty(heads * KEYS, np.float32)
    ages = np.empty(KEYS, np.float32)
    keys, key_stride, queries = k.flat, k.stride, q.flat
    for unit in range(begin, end):
        sequence = unit // pieces
        length = lengths[sequence]
        first, count = _slots(length, options.capacity, options.span, unit % pieces)
        if count == 0:
            for head in range(heads):
                statistics[0, unit * heads + head] = _MINUS_INFINITY
            continue
        ring_row = rings[sequence] * options.capacity
        row = ring_row + first
        for i in range(heads * dim):
            query[np.uintp(i)] = load(queries, sequence * q.stride + i) * options.scale

        for j in range(count):
            for kv_head in range(options.kv_heads):
                key = (row + j) * key_stride + kv_head * dim
                for head in range(kv_head * group, (kv_head + 1) * group):
                    at = head * dim
                    logit = _ZERO
                    for d in range(dim):
                        logit += query[np.uintp(at + d)] * load(keys, key + d)
                    logits[np.uintp(head * KEYS + j)] = logit

        if options.bias != NO_BIAS:
            time = times[sequence]
            if options.bias == LINEAR:
                # Relative to the newest key: a softmax does not see the difference, float32 would if it is large.
                time = key_times[ring_row + (length - 1) % options.capacity]
            for head in range(heads):
                scaled_ages(ages, time, key_times, row, count, tau[head])
                add_time_bias(logits, head * KEYS, count, options.bias, ages, rate[head])
        for head in range(heads):
            largest, total = _softmax(logits, head * KEYS, count)
            statistics[0, unit * heads + head] = largest
            statistics[1, unit * heads + head] = total
        _add_values(logits, v, row, count, options, partial, unit * heads * dim)


@jit
def _slots(length: int, capacity: int, span: int, piece: int) -> Any:
    """(first slot, count) of a piece of the newest min(length, span) positions; a count of 0 beyond the last piece."""
    visible = min(length, span)
    start = (length - visible) % capacity
    # What lies before the end of the ring, and then what has gone around it.
    before = min(visible, capacity - start)
    pieces = (before + KEYS - 1) // KEYS
    if piece < pieces:
        return start + piece * KEYS, min(KEYS, before - piece * KEYS)
    first = (piece - pieces) * KEYS
    return first, max(0, min(KEYS, visible - before - first))


@jit
def _softmax(s: Any, at: int, count: int) -> Any:
    """Logits become weights relative to the largest: (the largest, the sum of the weights)."""
    largest = _MINUS_INFINITY
    for j in range(count):
        largest = maximum(largest, s[np.uintp(at + j)])
    total = _ZERO
    for j in range(count):
        weight = exp_of_nonpositive(s[np.uintp(at + j)] - largest)
        s[np.uintp(at + j)] = weight
        total += weight
    return largest, total


@jit
def _add_values(weights: Any, v: Any, row: int, count: int, options: Any, result: Any, result_at: int) -> None:
    """result[head] = Σ_j weights[head, j] · v[row + j], four keys at a time: the result is read and written once."""
    dim = options.dim
    group = options.heads // options.kv_heads
    values, stride = v.flat, v.stride
    for i in range(options.heads * dim):
        result[np.uintp(result_at + i)] = _ZERO
    for j in range(0, count - 3, 4):
        for kv_head in range(options.kv_heads):
            value = (row + j) * stride + kv_head * dim
            for head in range(kv_head * group, (kv_head + 1) * group):
                at, w = result_at + head * dim, head * KEYS + j
                w0, w1, w2, w3 = (
                    weights[np.uintp(w)], weights[np.uintp(w + 1)], weights[np.uintp(w + 2)], weights[np.uintp(w + 3)],
                )  # fmt: skip
                for d in range(dim):
                    result[np.uintp(at + d)] += (
                        w0 * load(values, value + d) + w1 * load(values, value + stride + d)
                        + w2 * load(values, value + 2 * stride + d) + w3 * load(values, value + 3 * stride + d)
                    )  # fmt: skip
    for j in range(count // 4 * 4, count):
        for kv_head in range(options.kv_heads):
            value = (row + j) * stride + kv_head * dim
            for head in range(kv_head * group, (kv_head + 1) * group):
                at, w0 = result_at + head * dim, weights[np.uintp(head * KEYS + j)]
                for d in range(dim):
                    result[np.uintp(at + d)] += w0 * load(values, value + d)


@jit
def combine_pieces(
    pieces: int, heads: int, dim: int, partial: Any, statistics: Any, out: Any, begin: int, end: int
) -> None:
    """out of sequences [begin, end): partial results weighted by their log-sum-exp, in the order of the pieces."""
    flat = out.flat
    for sequence in range(begin, end):
        for head in range(heads):
            largest = _MINUS_INFINITY
            for piece in range(pieces):
                largest = maximum(largest, statistics[0, (sequence * pieces + piece) * heads + head])
            target = sequence * out.stride + head * dim
            if largest == _MINUS_INFINITY:
                for d in range(dim):
                    store(flat, target + d, _ZERO)
                continue
            result = np.zeros(dim, np.float32)
            total = _ZERO
            for piece in range(pieces):
                row = (sequence * pieces + piece) * heads + head
                if statistics[0, row] > _MINUS_INFINITY:
                    factor = exp_of_nonpositive(statistics[0, row] - largest)
                    total += factor * statistics[1, row]
                    for d in range(dim):
                        result[np.uintp(d)] += factor * partial[np.uintp(row * dim + d)]
            inverse = _ONE / total
            for d in range(dim):
                store(flat, target + d, result[np.uintp(d)] * inverse)

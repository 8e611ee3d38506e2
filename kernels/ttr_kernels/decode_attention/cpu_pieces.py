"""The two parts of decoding attention: a softmax over each piece of a sequence's keys, and their combination.

A field of a tuple that is read inside a loop keeps it from becoming vector code: arrays are taken out of theirs first.

A piece is at most KEYS slots of a ring that follow each other; its partial result and its statistics (the largest
logit, the sum of the weights relative to it) are written, and combined in the order of the pieces.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..attention.cpu_tile import LINEAR, NO_BIAS, add_time_bias, scaled_ages
from ..common.compilation import jit_within
from ..common.storage import load, store
from ..common.tile_multiply import LANES, maximum
from ..common.vector_math import exp_of_nonpositive
from ..common.vectors import address_of
from .cpu_blocks import add_block_of_values, add_wide_block_of_values, block_logits

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


@jit_within
def attend_piece(
    unit: int, pieces: int, q: Any, k: Any, v: Any, lengths: Any, rings: Any, times: Any, key_times: Any, rate: Any,
    tau: Any, options: Any, query: Any, logits: Any, ages: Any, partial: Any, statistics: Any,
) -> None:  # fmt: skip
    """Piece unit % pieces of sequence unit // pieces, all heads. Buffers: query (H·D), logits (H·KEYS), ages (KEYS)."""
    heads, dim = options.heads, options.dim
    sequence = unit // pieces
    length = lengths[sequence]
    first, count = _slots(length, options.capacity, options.span, unit % pieces)
    if count == 0:
        for head in range(heads):
            statistics[0, unit * heads + head] = _MINUS_INFINITY
        return
    ring_row = rings[sequence] * options.capacity
    row = ring_row + first
    queries, query_row = q.flat, sequence * q.stride
    for i in range(heads * dim):
        query[np.uintp(i)] = load(queries, query_row + i) * options.scale
    _logits(logits, query, k.flat, v.flat, k.stride, v.stride, row, count, options)
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
    _add_values(logits, v.flat, v.stride, row, count, options, partial, unit * heads * dim)


@jit_within
def _slots(length: int, capacity: int, span: int, piece: int) -> Any:
    """(first slot, count) of a piece of the newest min(length, span) positions; a count of 0 beyond the last piece."""
    visible = min(length, span)
    # A full ring is read from its first slot on: all of it is seen.
    start = (length - visible) % capacity if visible < capacity else 0
    # What lies before the end of the ring, and then what has gone around it.
    before = min(visible, capacity - start)
    pieces = (before + KEYS - 1) // KEYS
    if piece < pieces:
        return start + piece * KEYS, min(KEYS, before - piece * KEYS)
    first = (piece - pieces) * KEYS
    return first, max(0, min(KEYS, visible - before - first))


@jit_within
def _in_blocks(count: int, dim: int) -> int:
    """How many of so many positions are worked on in blocks of LANES; the rest, one by one."""
    return count // LANES * LANES if dim % LANES == 0 else 0


@jit_within
def _logits(
    logits: Any, query: Any, keys: Any, values: Any, stride: int, value_stride: int, row: int, count: int, options: Any
) -> None:
    """logits[head, j] = query[head] · keys[row + j]; meanwhile the first values are fetched."""
    dim, kv_heads = options.dim, options.kv_heads
    group = options.heads // kv_heads
    whole = _in_blocks(count, dim)
    for j in range(0, whole, LANES):
        for kv_head in range(kv_heads):
            key = (row + j) * stride + kv_head * dim
            ahead = address_of(keys, key + LANES * stride)
            if j + LANES >= whole:
                ahead = address_of(values, row * value_stride + kv_head * dim)
            for head in range(kv_head * group, (kv_head + 1) * group):
                block_logits(logits, head * KEYS + j, keys, key, stride, query, head * dim, dim, ahead)
    for j in range(whole, count):
        for kv_head in range(kv_heads):
            key = (row + j) * stride + kv_head * dim
            for head in range(kv_head * group, (kv_head + 1) * group):
                at = head * dim
                logit = _ZERO
                for d in range(dim):
                    logit += query[np.uintp(at + d)] * load(keys, key + d)
                logits[np.uintp(head * KEYS + j)] = logit


@jit_within
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


@jit_within
def _add_values(
    weights: Any, values: Any, stride: int, row: int, count: int, options: Any, result: Any, result_at: int
) -> None:
    """result[head] = Σ_j weights[head, j] · values[row + j]."""
    dim, kv_heads = options.dim, options.kv_heads
    group = options.heads // kv_heads
    for i in range(options.heads * dim):
        result[np.uintp(result_at + i)] = _ZERO
    whole = _in_blocks(count, dim)
    for j in range(0, whole, LANES):
        for kv_head in range(kv_heads):
            value = (row + j) * stride + kv_head * dim
            ahead = address_of(values, value + LANES * stride)
            for head in range(kv_head * group, (kv_head + 1) * group):
                at, w = result_at + head * dim, head * KEYS + j
                for d in range(0, dim - 2 * LANES + 1, 2 * LANES):
                    add_wide_block_of_values(result, at + d, weights, w, values, value + d, stride, ahead)
                if dim % (2 * LANES) != 0:
                    d = dim - LANES
                    add_block_of_values(result, at + d, weights, w, values, value + d, stride, ahead)
    for j in range(whole, count):
        for kv_head in range(kv_heads):
            value = (row + j) * stride + kv_head * dim
            for head in range(kv_head * group, (kv_head + 1) * group):
                at, w0 = result_at + head * dim, weights[np.uintp(head * KEYS + j)]
                for d in range(dim):
                    result[np.uintp(at + d)] += w0 * load(values, value + d)


@jit_within
def combine_pieces(
    sequence: int, pieces: int, heads: int, dim: int, partial: Any, statistics: Any, out: Any, target: int, result: Any
) -> None:
    """out[target:] of a sequence: partial results weighted by their log-sum-exp, in the order of the pieces.

    result is a buffer (D).
    """
    for head in range(heads):
        largest = _MINUS_INFINITY
        for piece in range(pieces):
            largest = maximum(largest, statistics[0, (sequence * pieces + piece) * heads + head])
        at = target + head * dim
        if largest == _MINUS_INFINITY:
            for d in range(dim):
                store(out, at + d, _ZERO)
            continue
        for d in range(dim):
            result[np.uintp(d)] = _ZERO
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
            store(out, at + d, result[np.uintp(d)] * inverse)

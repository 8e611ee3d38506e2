"""The forward kernel on CPU cores: blocks of keys stream past a chunk of queries under an online softmax."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..common.compilation import jit_within
from ..common.ranges import jit_ranges_with_slot
from ..common.tile_multiply import PAD, maximum
from ..common.vector_math import exp_of_nonpositive, log
from .cpu_tile import (
    NO_BIAS,
    add_tile_times_keys,
    add_time_bias,
    columns_seen,
    draw_factors,
    fetch,
    mask_row,
    multiply_into_tile,
    scaled_ages,
    store_row,
    take_times,
    transpose,
    visible_keys,
)

# Queries and keys of a tile of logits: 32 KiB of float32.
QUERIES = 64
KEYS = 128
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_MINUS_INFINITY = np.float32(-np.inf)


def forward_floats(chunk: int, group: int, width: int) -> int:
    """Floats of scratch that `forward_units` needs for chunks of at most `chunk` queries."""
    rows = group * (-(-chunk // QUERIES) * QUERIES)
    return rows * (2 * width + 2) + 3 * KEYS * width + QUERIES * KEYS


@jit_ranges_with_slot
def forward_units(
    units: Any, chunk: int, q: Any, k: Any, v: Any, out: Any, log_normalizer: Any,
    query_offsets: Any, key_offsets: Any, times: Any, key_times: Any, rate: Any, tau: Any,
    options: Any, key: Any, scratch: Any, slot: int, begin: int, end: int,
) -> None:  # fmt: skip
    """Attention of units [begin, end): each a sequence, a key/value head and a chunk of queries, with all its heads."""
    halves = np.empty((2, KEYS // 4), np.uint64)
    factors, ages, tile_times = np.empty(KEYS, np.float32), np.empty(KEYS, np.float32), np.empty(KEYS, np.float64)
    _units(
        units, chunk, q, k, v, out, log_normalizer, query_offsets, key_offsets, times, key_times, rate, tau, options,
        key, scratch[slot], halves, factors, ages, tile_times, begin, end,
    )  # fmt: skip


@jit_within
def _units(
    units: Any, chunk: int, q: Any, k: Any, v: Any, out: Any, log_normalizer: Any,
    query_offsets: Any, key_offsets: Any, times: Any, key_times: Any, rate: Any, tau: Any,
    options: Any, key: Any, scratch: Any, halves: Any, factors: Any, ages: Any, tile_times: Any, begin: int, end: int,
) -> None:  # fmt: skip
    dim, group = options.dim, options.heads // options.kv_heads
    width = (dim + PAD - 1) // PAD * PAD
    for unit in range(begin, end):
        sequence, kv_head, first = units[unit, 0], units[unit, 1], units[unit, 2]
        query_row, key_row = query_offsets[sequence], key_offsets[sequence]
        length, key_length = query_offsets[sequence + 1] - query_row, key_offsets[sequence + 1] - key_row
        shift = key_length - length
        count = min(chunk, length - first)
        rows = (count + QUERIES - 1) // QUERIES * QUERIES

        queries_at = 0
        result_at = queries_at + group * rows * width
        largest_at = result_at + group * rows * width
        total_at = largest_at + group * rows
        keys_at = total_at + group * rows
        transposed_at = keys_at + KEYS * width
        values_at = transposed_at + KEYS * width
        tile_at = values_at + KEYS * width

        for g in range(group):
            head = kv_head * group + g
            at, row = queries_at + g * rows * width, query_row + first
            fetch(scratch, at, width, q.flat, q.stride, row, count, head, dim, options.scale)
        for i in range(group * rows * width):
            scratch[np.uintp(result_at + i)] = _ZERO
        for i in range(group * rows):
            scratch[np.uintp(largest_at + i)] = _MINUS_INFINITY
            scratch[np.uintp(total_at + i)] = _ZERO

        low, _ = visible_keys(first, key_length, shift, options.causal, options.window)
        _, high = visible_keys(first + count - 1, key_length, shift, options.causal, options.window)
        for tile_key in range(low // KEYS * KEYS, high, KEYS):
            keys = min(KEYS, key_length - tile_key)
            keys_padded = (keys + PAD - 1) // PAD * PAD
            fetch(scratch, keys_at, width, k.flat, k.stride, key_row + tile_key, keys, kv_head, dim, _ONE)
            transpose(scratch, transposed_at, scratch, keys_at, keys_padded, width, KEYS)
            fetch(scratch, values_at, width, v.flat, v.stride, key_row + tile_key, keys, kv_head, dim, _ONE)
            if options.bias != NO_BIAS:
                take_times(tile_times, key_times, key_row + tile_key, keys)
            for i0 in range(0, count, QUERIES):
                queries = min(QUERIES, count - i0)
                _, tile_high = visible_keys(first + i0 + queries - 1, key_length, shift, options.causal, options.window)
                tile_low, _ = visible_keys(first + i0, key_length, shift, options.causal, options.window)
                if tile_high <= tile_key or tile_low >= tile_key + keys:
                    continue
                sight = first + i0, tile_key, keys, key_length, shift, options.causal
                # Beyond these no query of the tile sees a key.
                seen_padded = (min(keys, tile_high - tile_key) + PAD - 1) // PAD * PAD
                for g in range(group):
                    head = kv_head * group + g
                    block = (g * rows + i0) * width
                    multiply_into_tile(
                        scratch, tile_at, KEYS, queries_at + block, transposed_at, width, queries, sight
                    )  # fmt: skip
                    for i in range(queries):
                        query = first + i0 + i
                        row_low, row_high = visible_keys(query, key_length, shift, options.causal, options.window)
                        row_low = max(row_low - tile_key, 0)
                        row_high = min(row_high - tile_key, keys)
                        at = tile_at + i * KEYS
                        row = g * rows + i0 + i
                        columns = columns_seen(row_low, row_high)
                        if columns > 0:
                            if options.bias != NO_BIAS:
                                scaled_ages(ages, times[query_row + query], tile_times, 0, columns, tau[head])
                                add_time_bias(scratch, at, columns, options.bias, ages, rate[head])
                            mask_row(scratch, at, columns, row_low, row_high)
                            _softmax_row(
                                scratch, at, columns, largest_at + row, total_at + row, result_at + row * width, width
                            )
                            if options.dropping:
                                draw_factors(
                                    factors, halves, query_row + query, head, options.heads, tile_key, columns, key,
                                    options.threshold, options.scale_bits,
                                )  # fmt: skip
                                for j in range(columns):
                                    scratch[np.uintp(at + j)] *= factors[j]
                        for j in range(columns, seen_padded):
                            scratch[np.uintp(at + j)] = _ZERO
                    add_tile_times_keys(
                        scratch, result_at + block, tile_at, KEYS, values_at, width, queries, sight
                    )  # fmt: skip

        for g in range(group):
            head = kv_head * group + g
            for i in range(count):
                row = g * rows + i
                total = scratch[total_at + row]
                inverse = _ONE / total if total > _ZERO else _ZERO
                target = (query_row + first + i) * out.stride + head * dim
                store_row(out.flat, target, scratch, result_at + row * width, dim, inverse)
                normalizer = scratch[largest_at + row] + log(total) if total > _ZERO else _MINUS_INFINITY
                log_normalizer[query_row + first + i, head] = normalizer


@jit_within
def _softmax_row(s: Any, at: int, columns: int, largest_at: int, total_at: int, result_at: int, width: int) -> None:
    """One step of the online softmax: logits become weights relative to the largest logit so far; what was summed
    relative to the old largest one is rescaled."""
    before = s[largest_at]
    largest = before
    for j in range(columns):
        largest = maximum(largest, s[np.uintp(at + j)])
    total = _ZERO
    for j in range(columns):
        weight = exp_of_nonpositive(s[np.uintp(at + j)] - largest)
        s[np.uintp(at + j)] = weight
        total += weight
    if largest > before:
        factor = exp_of_nonpositive(before - largest)
        s[total_at] *= factor
        for d in range(width):
            s[np.uintp(result_at + d)] *= factor
        s[largest_at] = largest
    s[total_at] += total

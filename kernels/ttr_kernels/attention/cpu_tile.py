"""What the forward and backward kernels do to one tile of logits: fetch rows, decay with age, mask, drop.

A tile is `queries × keys` of one head, row-major in a flat float32 buffer whose rows are KEYS apart.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..common.arrays import Array
from ..common.compilation import jit, jit_within
from ..common.compiled_philox import kept_pairs
from ..common.storage import load, store
from ..common.tile_multiply import LANES, PAD, ROWS, maximum, multiply
from ..common.vector_math import log1p_of_nonnegative

NO_BIAS, LINEAR, LOG = 0, 1, 2
# Rows of a tile are worked on in multiples of so many columns, whole vectors of an unrolled loop: what is left over
# after those would be done one by one.
COLUMNS = 4 * LANES
# Products skip what a causal mask hides, in strips of so many queries or keys.
STRIP = 32
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_MINUS_INFINITY = np.float32(-np.inf)


class Rows(NamedTuple):
    """An array (rows, heads, dim) as kernels take it: element (r, h, d) is flat[r * stride + h * dim + d]."""

    flat: Array
    stride: int


class Options(NamedTuple):
    """Scalars of one call."""

    heads: int
    kv_heads: int
    dim: int
    scale: np.float32
    causal: bool
    window: int
    bias: int
    dropping: bool
    threshold: np.uint64
    scale_bits: np.uint64


@jit_within
def fetch(
    tile: Any, at: int, width: int, flat: Any, stride: int, first: int, count: int, head: int, dim: int, factor: Any
) -> None:
    """tile[i, :] = factor · rows[first + i, head, :] for i < count; zeros up to the padded rows and columns.

    The rows are given as their array and stride (see Rows): a loop that reads a tuple's field is no vector code.
    """
    for i in range(count):
        source = (first + i) * stride + head * dim
        target = at + i * width
        for d in range(dim):
            tile[np.uintp(target + d)] = load(flat, source + d) * factor
        for d in range(dim, width):
            tile[np.uintp(target + d)] = _ZERO
    for i in range(count * width, (count + 15) // 16 * 16 * width):
        tile[np.uintp(at + i)] = _ZERO


@jit_within
def transpose(target: Any, target_at: int, tile: Any, at: int, count: int, width: int, stride: int) -> None:
    """target[d, j] = tile[j, d], for a tile of `count` rows of `width`; target's rows are `stride` apart."""
    for d in range(width):
        for j in range(count):
            target[np.uintp(target_at + d * stride + j)] = tile[np.uintp(at + j * width + d)]


@jit_within
def store_row(target: Any, target_at: int, s: Any, at: int, dim: int, factor: Any) -> None:
    """target[target_at + d] = factor · s[at + d], rounded to the target's dtype, for d < dim."""
    for d in range(dim):
        store(target, target_at + d, s[np.uintp(at + d)] * factor)


@jit_within
def visible_keys(query: int, key_length: int, shift: int, causal: bool, window: int) -> Any:
    """The range [low, high) of keys that query i of a sequence sees; shift = S - T."""
    high = min(key_length, query + shift + 1) if causal else key_length
    low = max(0, query + shift - window + 1) if window > 0 else 0
    return low, max(high, low)


@jit_within
def keys_seen(sight: Any, end: int) -> Any:
    """How many of a tile's keys, padded, its queries before `end` can see under a causal mask.

    sight: (first query of the tile, first key, number of keys, keys of the sequence, shift, causal).
    """
    first, tile_key, keys, key_length, shift, causal = sight
    _, high = visible_keys(first + end - 1, key_length, shift, causal, 0)
    return (max(0, min(keys, high - tile_key)) + PAD - 1) // PAD * PAD


@jit_within
def _strip(sight: Any, queries: int) -> Any:
    """Queries of a strip: all of the tile's where the first sees as many keys as the last."""
    return STRIP if keys_seen(sight, 1) < keys_seen(sight, queries) else queries


@jit_within
def multiply_into_tile(
    s: Any, tile_at: int, stride: int, rows_at: int, transposed_at: int, width: int, queries: int, sight: Any
) -> None:
    """tile = rows · keysᵀ of the columns that a strip of queries can see; the others keep what was in them."""
    size = _strip(sight, queries)
    for strip in range(0, queries, size):
        end = min(strip + size, queries)
        rows = (end - strip + ROWS - 1) // ROWS * ROWS
        multiply(
            s, tile_at + strip * stride, stride, s, rows_at + strip * width, width, 1, s, transposed_at, stride,
            rows, keys_seen(sight, end), width, False,
        )  # fmt: skip


@jit_within
def add_tile_times_keys(
    s: Any, result_at: int, tile_at: int, stride: int, keys_at: int, width: int, queries: int, sight: Any
) -> None:
    """result (queries, width) += tile · keys."""
    size = _strip(sight, queries)
    for strip in range(0, queries, size):
        end = min(strip + size, queries)
        rows = (end - strip + ROWS - 1) // ROWS * ROWS
        multiply(
            s, result_at + strip * width, width, s, tile_at + strip * stride, stride, 1, s, keys_at, width,
            rows, width, keys_seen(sight, end), True,
        )  # fmt: skip


@jit_within
def add_transposed_tile_times_queries(
    s: Any, result_at: int, tile_at: int, stride: int, rows_at: int, width: int, queries: int, sight: Any
) -> None:
    """result (keys, width) += tileᵀ · rows, without the queries that come before a strip of keys."""
    first, tile_key, keys, _, shift, causal = sight
    keys_padded = (keys + PAD - 1) // PAD * PAD
    size = STRIP if causal and tile_key + keys_padded > shift + first else keys_padded
    for strip in range(0, keys_padded, size):
        skipped = max(0, tile_key + strip - shift - first) // ROWS * ROWS if causal else 0
        if skipped < queries:
            multiply(
                s, result_at + strip * width, width, s, tile_at + skipped * stride + strip, 1, stride,
                s, rows_at + skipped * width, width, min(size, keys_padded - strip), width, queries - skipped, True,
            )  # fmt: skip


@jit_within
def scaled_ages(ages: Any, time: float, key_times: Any, first_key: int, width: int, tau: Any) -> None:
    """ages[j] = (time − key_times[first_key + j]) / tau for j < width, the gap formed in float64; 0 for keys that lie
    in the future, which are not visible but must leave φ finite.

    A loop of its own: one that also held float64 would be cut into vectors as long as float64 has lanes.
    """
    inverse = _ONE / tau
    for j in range(width):
        ages[np.uintp(j)] = np.float32(time - key_times[np.uintp(first_key + j)]) * inverse
    for j in range(width):
        ages[np.uintp(j)] = maximum(ages[np.uintp(j)], _ZERO)


@jit_within
def add_time_bias(tile: Any, at: int, width: int, kind: int, ages: Any, rate: Any) -> None:
    """logit_j -= rate · φ(ages_j) for j < width."""
    if kind == LINEAR:
        for j in range(width):
            tile[np.uintp(at + j)] -= rate * ages[np.uintp(j)]
    else:
        for j in range(width):
            tile[np.uintp(at + j)] -= rate * log1p_of_nonnegative(ages[np.uintp(j)])


@jit_within
def columns_seen(low: int, high: int) -> Any:
    """How many of a tile's columns to work on for a row that sees [low, high) of them."""
    return 0 if low >= high else (high + COLUMNS - 1) // COLUMNS * COLUMNS


@jit_within
def take_times(tile_times: Any, key_times: Any, first: int, count: int) -> None:
    """tile_times[j] = key_times[first + j] for j < count, and the last of them beyond."""
    for j in range(tile_times.shape[0]):
        tile_times[j] = key_times[first + min(j, count - 1)]


@jit_within
def mask_row(tile: Any, at: int, width: int, low: int, high: int) -> None:
    """−infinity outside [low, high); columns are relative to the tile."""
    # Stores alone: one that depends on the column becomes a masked one, which is slow on some processors.
    for j in range(low):
        tile[np.uintp(at + j)] = _MINUS_INFINITY
    for j in range(high, width):
        tile[np.uintp(at + j)] = _MINUS_INFINITY


@jit
def draw_factors(
    factors: Any, halves: Any, query_row: int, head: int, heads: int, first_key: int, width: int, key: Any,
    threshold: Any, scale_bits: Any,
) -> None:  # fmt: skip
    """factors[j] = keep_j / (1 − rate) of the keys first_key + j, j < width; both multiples of 16.

    Call c of Philox decides on the keys 2c', 2c' + 1, 2c' + 8 and 2c' + 9 of a block of 16, c' = c mod 4, see
    reference._keep. factors is read as uint64, two keys each; halves (2, width / 4) uint64 is for the words.
    """
    k0, k1, low, high, first = key[0], key[1], key[2], key[3], key[4]
    counter = np.uint64(np.uint32(first + query_row * heads + head))
    call = np.uint64(first_key // 4)
    calls = np.uintp(width // 4)
    for c in range(calls):
        first, second = kept_pairs(call + np.uint64(c), counter, low, high, k0, k1, threshold, scale_bits)
        halves[np.uintp(0), c] = first
        halves[np.uintp(1), c] = second
    pairs = factors.view(np.uint64)
    for block in range(np.uintp(width // 16)):
        for c in range(np.uintp(4)):
            pairs[np.uintp(8) * block + c] = halves[np.uintp(0), np.uintp(4) * block + c]
            pairs[np.uintp(8) * block + np.uintp(4) + c] = halves[np.uintp(1), np.uintp(4) * block + c]

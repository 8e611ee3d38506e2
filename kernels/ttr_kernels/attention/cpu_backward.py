"""The backward kernel on CPU cores: for each block of keys, all queries that see it pass by; weights are recomputed."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..common.compilation import jit_exact, jit_within
from ..common.ranges import jit_ranges, jit_ranges_with_slot
from ..common.storage import load, store
from ..common.tile_multiply import PAD
from ..common.vector_math import exp_of_nonpositive, log1p_and_reciprocal
from .cpu_tile import (
    LINEAR,
    NO_BIAS,
    STRIP,
    add_tile_times_keys,
    add_transposed_tile_times_queries,
    columns_seen,
    draw_factors,
    fetch,
    keys_seen,
    mask_row,
    multiply_into_tile,
    scaled_ages,
    store_row,
    take_times,
    transpose,
    visible_keys,
)

BACKWARD_QUERIES = 64
BACKWARD_KEYS = 64
# Blocks of keys that stay in the cache while queries pass by: what is read of a query is read once for all of them.
MOST_BLOCKS = 4
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)


def backward_floats(width: int, blocks: int) -> int:
    """Floats of scratch that `backward_units` needs for so many blocks of keys at a time."""
    return (6 * blocks * BACKWARD_KEYS + 3 * BACKWARD_QUERIES) * width + 2 * BACKWARD_QUERIES * BACKWARD_KEYS


@jit_ranges
def row_dots(dout: Any, out: Any, heads: int, dim: int, dots: Any, begin: int, end: int) -> None:
    """dots[row, head] = dout · out: the sum over keys of P · dP."""
    a, a_stride, b, b_stride = dout.flat, dout.stride, out.flat, out.stride
    for row in range(begin, end):
        for head in range(heads):
            dots[row, head] = _dot(a, row * a_stride + head * dim, b, row * b_stride + head * dim, dim)


@jit_exact
def _dot(a: Any, a_at: int, b: Any, b_at: int, dim: int) -> Any:
    # Summed in the order of `multiply`: where one key has all the weight, dP − D is 0 to the bit.
    total = _ZERO
    for d in range(dim):
        total += load(a, a_at + d) * load(b, b_at + d)
    return total


@jit_ranges_with_slot
def backward_units(
    units: Any, splits: int, blocks: int, q: Any, k: Any, v: Any, dout: Any, log_normalizer: Any, dots: Any,
    query_offsets: Any, key_offsets: Any, times: Any, key_times: Any, rate: Any, tau: Any,
    options: Any, key: Any, dq: Any, partial_dq: Any, dk: Any, dv: Any, bias_sums: Any, scratch: Any,
    slot: int, begin: int, end: int,
) -> None:  # fmt: skip
    """Gradients of units [begin, end): each a sequence, a key/value head and every `splits`-th part of its keys, which
    has `blocks` blocks. Where a part is all the keys, queries' gradients are done with it and go to dq; otherwise they
    are added to partial_dq, which is empty if that does not happen."""
    halves = np.empty((2, BACKWARD_KEYS // 4), np.uint64)
    factors, ages = np.ones(BACKWARD_KEYS, np.float32), np.empty(BACKWARD_KEYS, np.float32)
    tile_times = np.empty(BACKWARD_KEYS, np.float64)
    _units(
        units, splits, blocks, q, k, v, dout, log_normalizer, dots, query_offsets, key_offsets, times, key_times, rate,
        tau, options, key, dq, partial_dq, dk, dv, bias_sums, scratch[slot], halves, factors, ages, tile_times,
        begin, end,
    )  # fmt: skip


@jit_within
def _units(
    units: Any, splits: int, blocks: int, q: Any, k: Any, v: Any, dout: Any, log_normalizer: Any, dots: Any,
    query_offsets: Any, key_offsets: Any, times: Any, key_times: Any, rate: Any, tau: Any,
    options: Any, key: Any, dq: Any, partial_dq: Any, dk: Any, dv: Any, bias_sums: Any, scratch: Any,
    halves: Any, factors: Any, ages: Any, tile_times: Any, begin: int, end: int,
) -> None:  # fmt: skip
    dim, group = options.dim, options.heads // options.kv_heads
    width = (dim + PAD - 1) // PAD * PAD
    rows_of_dq = log_normalizer.shape[0]
    tile_floats, block_floats = BACKWARD_QUERIES * BACKWARD_KEYS, BACKWARD_KEYS * width
    part_keys, part_floats = blocks * BACKWARD_KEYS, blocks * block_floats
    weights_at = 0
    grads_at = weights_at + tile_floats
    queries_at = grads_at + tile_floats
    dout_at = queries_at + BACKWARD_QUERIES * width
    dq_at = dout_at + BACKWARD_QUERIES * width
    keys_at = dq_at + BACKWARD_QUERIES * width
    keys_transposed_at = keys_at + part_floats
    values_at = keys_transposed_at + part_floats
    values_transposed_at = values_at + part_floats
    dk_at = values_transposed_at + part_floats
    dv_at = dk_at + part_floats

    for unit in range(begin, end):
        sequence, kv_head, split = units[unit, 0], units[unit, 1], units[unit, 2]
        query_row, key_row = query_offsets[sequence], key_offsets[sequence]
        length, key_length = query_offsets[sequence + 1] - query_row, key_offsets[sequence + 1] - key_row
        shift = key_length - length
        whole = partial_dq.size == 0
        if whole and key_length == 0:
            _zero_rows(dq.flat, dq.stride, query_row, length, kv_head, group * dim)
        for part_key in range(split * part_keys, key_length, splits * part_keys):
            part_end = min(part_key + part_keys, key_length)
            for tile_key in range(part_key, part_end, BACKWARD_KEYS):
                row, keys = key_row + tile_key, min(BACKWARD_KEYS, part_end - tile_key)
                keys_padded = (keys + PAD - 1) // PAD * PAD
                at = (tile_key - part_key) * width
                fetch(scratch, keys_at + at, width, k.flat, k.stride, row, keys, kv_head, dim, _ONE)
                fetch(scratch, values_at + at, width, v.flat, v.stride, row, keys, kv_head, dim, _ONE)
                transpose(scratch, keys_transposed_at + at, scratch, keys_at + at, keys_padded, width, BACKWARD_KEYS)
                transpose(
                    scratch, values_transposed_at + at, scratch, values_at + at, keys_padded, width, BACKWARD_KEYS
                )
            for i in range(2 * part_floats):
                scratch[np.uintp(dk_at + i)] = _ZERO
            # Queries that see any of these keys.
            first = max(0, part_key - shift) if options.causal else 0
            last = min(length, part_end - shift + options.window - 1) if options.window > 0 else length
            if whole:
                # The others see no key.
                _zero_rows(dq.flat, dq.stride, query_row, min(first, length), kv_head, group * dim)
                _zero_rows(dq.flat, dq.stride, query_row + last, length - last, kv_head, group * dim)
            for i0 in range(first, last, BACKWARD_QUERIES):
                queries = min(BACKWARD_QUERIES, last - i0)
                queries_padded = (queries + 7) // 8 * 8
                _, seen_end = visible_keys(i0 + queries - 1, key_length, shift, options.causal, options.window)
                seen_begin, _ = visible_keys(i0, key_length, shift, options.causal, options.window)
                for g in range(group):
                    head, row = kv_head * group + g, query_row + i0
                    fetch(scratch, queries_at, width, q.flat, q.stride, row, queries, head, dim, options.scale)
                    fetch(scratch, dout_at, width, dout.flat, dout.stride, row, queries, head, dim, _ONE)
                    for i in range(queries_padded * width):
                        scratch[np.uintp(dq_at + i)] = _ZERO
                    for tile_key in range(part_key, part_end, BACKWARD_KEYS):
                        keys = min(BACKWARD_KEYS, part_end - tile_key)
                        if tile_key >= seen_end or tile_key + keys <= seen_begin:
                            continue
                        keys_padded = (keys + PAD - 1) // PAD * PAD
                        at = (tile_key - part_key) * width
                        if options.bias != NO_BIAS:
                            take_times(tile_times, key_times, key_row + tile_key, keys)
                        sight = i0, tile_key, keys, key_length, shift, options.causal
                        multiply_into_tile(
                            scratch, weights_at, BACKWARD_KEYS, queries_at, keys_transposed_at + at, width, queries,
                            sight,
                        )  # fmt: skip
                        multiply_into_tile(
                            scratch, grads_at, BACKWARD_KEYS, dout_at, values_transposed_at + at, width, queries,
                            sight,
                        )  # fmt: skip
                        for i in range(queries):
                            if i % STRIP == 0:
                                seen = keys_seen(sight, min(i + STRIP, queries))
                            low, high = visible_keys(i0 + i, key_length, shift, options.causal, options.window)
                            for_rate, for_tau = _row(
                                scratch, weights_at + i * BACKWARD_KEYS, grads_at + i * BACKWARD_KEYS, seen,
                                keys_padded, max(low - tile_key, 0), min(high - tile_key, keys), tile_key, row + i,
                                head, log_normalizer[row + i, head], dots[row + i, head], times, tile_times, rate, tau,
                                options, key, halves, factors, ages,
                            )  # fmt: skip
                            bias_sums[unit, g, 0] -= for_rate
                            bias_sums[unit, g, 1] += for_tau
                        # Padded queries have zero rows of q and dout: what their tiles hold does not matter below.
                        add_transposed_tile_times_queries(
                            scratch, dv_at + at, weights_at, BACKWARD_KEYS, dout_at, width, queries, sight
                        )
                        add_transposed_tile_times_queries(
                            scratch, dk_at + at, grads_at, BACKWARD_KEYS, queries_at, width, queries, sight
                        )
                        add_tile_times_keys(
                            scratch, dq_at, grads_at, BACKWARD_KEYS, keys_at + at, width, queries, sight
                        )
                    for i in range(queries):
                        if whole:
                            target = (row + i) * dq.stride + head * dim
                            store_row(dq.flat, target, scratch, dq_at + i * width, dim, options.scale)
                        else:
                            target = ((split * rows_of_dq + row + i) * options.heads + head) * width
                            _add_row(partial_dq, target, scratch, dq_at + i * width, width)
            for j in range(part_end - part_key):
                row = key_row + part_key + j
                store_row(dk.flat, row * dk.stride + kv_head * dim, scratch, dk_at + j * width, dim, _ONE)
                store_row(dv.flat, row * dv.stride + kv_head * dim, scratch, dv_at + j * width, dim, _ONE)


@jit_within
def _zero_rows(target: Any, stride: int, first: int, count: int, kv_head: int, floats: int) -> None:
    for i in range(count):
        for d in range(floats):
            store(target, (first + i) * stride + kv_head * floats + d, _ZERO)


@jit_within
def _row(
    s: Any, weight_row: int, grad_row: int, seen: int, keys_padded: int, low: int, high: int, tile_key: int, row: int,
    head: int, normalizer: Any, dot: Any, times: Any, tile_times: Any, rate: Any, tau: Any, options: Any, key: Any,
    halves: Any, factors: Any, ages: Any,
) -> Any:  # fmt: skip
    """One row of a tile, which sees [low, high) of its keys: logits become weights, gradients of weights those of
    logits; the products filled in the first `seen`. Also what the row adds to the gradients of −rate and of tau."""
    for_rate, for_tau = _ZERO, _ZERO
    columns = columns_seen(low, high)
    if columns > 0:
        for j in range(seen, columns):
            s[np.uintp(grad_row + j)] = _ZERO
        mask_row(s, weight_row, columns, low, high)
        if options.dropping:
            draw_factors(
                factors, halves, row, head, options.heads, tile_key, columns, key, options.threshold,
                options.scale_bits,
            )  # fmt: skip
        if options.bias == NO_BIAS:
            _gradient_row(s, weight_row, grad_row, columns, normalizer, dot, factors)
        else:
            scaled_ages(ages, times[row], tile_times, 0, columns, tau[head])
            for_rate, for_tau = _gradient_row_with_bias(
                s, weight_row, grad_row, columns, normalizer, dot, factors, options.bias, ages, rate[head]
            )
            for_tau *= rate[head] / tau[head]
    for j in range(columns, keys_padded):
        s[np.uintp(weight_row + j)] = _ZERO
        s[np.uintp(grad_row + j)] = _ZERO
    return for_rate, for_tau


@jit_within
def _gradient_row(
    s: Any, weight_row: int, grad_row: int, columns: int, normalizer: Any, dot: Any, factors: Any
) -> None:
    """Logits become dropped-out weights, and the gradients of those become the gradients of the logits."""
    for j in range(columns):
        weight = exp_of_nonpositive(s[np.uintp(weight_row + j)] - normalizer)
        kept = factors[j]
        s[np.uintp(weight_row + j)] = weight * kept
        s[np.uintp(grad_row + j)] = weight * (s[np.uintp(grad_row + j)] * kept - dot)


@jit_within
def _gradient_row_with_bias(
    s: Any, weight_row: int, grad_row: int, columns: int, normalizer: Any, dot: Any, factors: Any,
    kind: int, ages: Any, rate: Any,
) -> Any:  # fmt: skip
    """`_gradient_row` under a time bias of the scaled ages u; also (Σ dS · φ(u), Σ dS · u · φ'(u))."""
    for_rate = _ZERO
    for_tau = _ZERO
    if kind == LINEAR:
        for j in range(columns):
            u = ages[np.uintp(j)]
            weight = exp_of_nonpositive(s[np.uintp(weight_row + j)] - rate * u - normalizer)
            kept = factors[np.uintp(j)]
            gradient = weight * (s[np.uintp(grad_row + j)] * kept - dot)
            s[np.uintp(weight_row + j)] = weight * kept
            s[np.uintp(grad_row + j)] = gradient
            for_rate += gradient * u
        for_tau = for_rate
    else:
        for j in range(columns):
            u = ages[np.uintp(j)]
            phi, reciprocal = log1p_and_reciprocal(u)
            weight = exp_of_nonpositive(s[np.uintp(weight_row + j)] - rate * phi - normalizer)
            kept = factors[np.uintp(j)]
            gradient = weight * (s[np.uintp(grad_row + j)] * kept - dot)
            s[np.uintp(weight_row + j)] = weight * kept
            s[np.uintp(grad_row + j)] = gradient
            for_rate += gradient * phi
            for_tau += gradient * (u * reciprocal)
    return for_rate, for_tau


@jit_within
def _add_row(target: Any, target_at: int, s: Any, at: int, width: int) -> None:
    for d in range(width):
        target[np.uintp(target_at + d)] += s[np.uintp(at + d)]


@jit_ranges
def add_query_gradients(
    partial_dq: Any, splits: int, rows: int, heads: int, dq: Any, dim: int, scale: Any, begin: int, end: int
) -> None:
    """dq = scale · Σ over splits of partial_dq (splits, rows, heads, width), in order; the first takes the sum."""
    width = (dim + PAD - 1) // PAD * PAD
    target, stride = dq.flat, dq.stride
    for row in range(begin, end):
        for split in range(1, splits):
            _add_row(partial_dq, row * heads * width, partial_dq, (split * rows + row) * heads * width, heads * width)
        for head in range(heads):
            store_row(target, row * stride + head * dim, partial_dq, (row * heads + head) * width, dim, scale)

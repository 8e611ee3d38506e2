"""The kernels of linear attention on CPU cores: a sequence and a key/value head, chunk by chunk.

Inside a chunk weights are a small square; what came before (and in the backward what comes after) is a matrix of
features × [values, 1] for each head, which decays as a whole. Every exponent is that of something not larger than zero,
since features of keys are kept relative to the largest exponent so far.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..attention.cpu_tile import fetch, store_row, take_times, transpose
from ..common.compilation import jit_within
from ..common.ranges import jit_ranges_with_slot
from ..common.storage import load, store
from ..common.tile_multiply import PAD, multiply, padded
from ..common.vector_math import exp_of_nonpositive
from .cpu_chunk import (
    CHUNK,
    Sizes,
    column_products,
    decay_between,
    decay_from,
    dot,
    exponents,
    fetch_columns,
    fetch_values,
    fill,
    inverse_of,
    largest_exponent,
    phi_of_keys,
    phi_of_queries,
    scale_all,
    scale_columns,
    scale_rows,
    through_features,
    times_elements,
    weighted_sum,
)

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_MINUS_INFINITY = np.float32(-np.inf)
# Vectors of a number for each position.
_VECTORS = 6


def scratch_floats(group: int, dim: int, features: int, chunks: int, pasts: int) -> int:
    """Floats of scratch of a unit: `pasts` is 1 for the forward, 3 for the backward; `chunks` of the longest."""
    width, columns, rows = padded(dim), padded(dim + 1), padded(features)
    square, by_position = CHUNK * CHUNK, CHUNK * (4 * width + 5 * columns + 5 * rows)
    return pasts * group * rows * columns + by_position + 4 * square + _VECTORS * CHUNK + chunks


@jit_ranges_with_slot
def forward_units(
    units: Any, q: Any, k: Any, v: Any, omega: Any, out: Any, normalizer: Any, offsets: Any, times: Any, rates: Any,
    state_sums: Any, state_shift: Any, state_times: Any, rings: Any, sizes: Sizes, scratch: Any,
    slot: int, begin: int, end: int,
) -> None:  # fmt: skip
    """Units [begin, end), each a sequence and a key/value head with all its heads.

    `times` is empty without a bias; `rings` is empty for sequences without a past, and else says whose state each
    sequence goes on, which takes the new positions in.
    """
    s = scratch[slot]
    dim, features, group = sizes.dim, sizes.features, sizes.heads // sizes.kv_heads
    width, columns = (dim + PAD - 1) // PAD * PAD, (dim + PAD) // PAD * PAD
    rows = (features + PAD - 1) // PAD * PAD
    timed, going_on = len(times) > 0, len(rings) > 0
    tile_times, shifts = np.zeros(CHUNK, np.float64), np.empty(group, np.float32)

    past_at = 0
    tile_at = past_at + group * rows * columns
    keys_at = tile_at + CHUNK * columns
    queries_at = keys_at + CHUNK * width
    values_at = queries_at + CHUNK * width
    sums_at = values_at + CHUNK * columns
    exponents_at = sums_at + CHUNK * columns
    phi_k_at = exponents_at + CHUNK * rows
    phi_q_at = phi_k_at + CHUNK * rows
    weights_at = phi_q_at + CHUNK * rows
    decay_at = weights_at + CHUNK * CHUNK
    gaps_at = decay_at + CHUNK * CHUNK
    vector_at = gaps_at + CHUNK * CHUNK
    since_at = vector_at + CHUNK
    until_at = since_at + CHUNK

    for unit in range(begin, end):
        sequence, kv_head = units[unit, 0], units[unit, 1]
        row, length = offsets[sequence], offsets[sequence + 1] - offsets[sequence]
        ring = rings[sequence] if going_on else 0
        before = state_times[ring] if going_on else 0.0
        fill(s, past_at, group * rows * columns, _ZERO)
        for g in range(group):
            shifts[g] = _MINUS_INFINITY
            if going_on:
                shifts[g] = state_shift[ring, kv_head * group + g]
                for m in range(features):
                    at = past_at + (g * rows + m) * columns
                    for d in range(dim + 1):
                        s[np.uintp(at + d)] = state_sums[ring, kv_head * group + g, m, d]

        for first in range(0, length, CHUNK):
            count = min(CHUNK, length - first)
            positions = (count + PAD - 1) // PAD * PAD
            if timed:
                take_times(tile_times, times, row + first, count)
            last = tile_times[count - 1]
            fetch_columns(s, keys_at, tile_at, width, k.flat, k.stride, row + first, count, kv_head, dim, sizes.root)
            exponents(s, exponents_at, omega, keys_at, width, features, vector_at, positions)
            largest = largest_exponent(s, exponents_at, features, count)
            fetch_values(s, values_at, columns, v.flat, v.stride, row + first, count, kv_head, dim)
            for g in range(group):
                head = kv_head * group + g
                rate, past = rates[head], past_at + g * rows * columns
                # Without a past there is nothing to decay, and no time that it began.
                origin = before if shifts[g] > _MINUS_INFINITY else tile_times[0]
                shift = max(shifts[g], largest)
                scale_all(s, past, rows * columns, exp_of_nonpositive(shifts[g] - shift))
                shifts[g] = shift
                phi_of_keys(s, phi_k_at, exponents_at, shift, features, count, positions)
                _fetch_queries(
                    s, phi_q_at, omega, queries_at, tile_at, width, q, row + first, count, head, sizes, vector_at
                )

                multiply(s, sums_at, columns, s, phi_q_at, 1, CHUNK, s, past, columns, positions, columns, rows, False)
                decay_from(s, since_at, vector_at, tile_times, origin, rate, positions)
                scale_rows(s, sums_at, columns, since_at, positions)
                multiply(
                    s, weights_at, CHUNK, s, phi_q_at, 1, CHUNK, s, phi_k_at, CHUNK, positions, positions, rows, False
                )
                decay_between(s, decay_at, gaps_at, tile_times, rate, positions, True)
                times_elements(s, weights_at, decay_at, positions, positions)
                multiply(
                    s, sums_at, columns, s, weights_at, CHUNK, 1, s, values_at, columns, positions, columns, positions,
                    True,
                )  # fmt: skip
                for i in range(count):
                    over = s[np.uintp(sums_at + i * columns + dim)]
                    target = (row + first + i) * out.stride + head * dim
                    store_row(out.flat, target, s, sums_at + i * columns, dim, inverse_of(over))
                    normalizer[row + first + i, head] = over

                decay_from(s, until_at, vector_at, tile_times, last, rate, positions)
                scale_columns(s, phi_k_at, phi_k_at, until_at, rows, positions)
                scale_all(s, past, rows * columns, exp_of_nonpositive(-rate * np.float32(last - origin)))
                multiply(s, past, columns, s, phi_k_at, CHUNK, 1, s, values_at, columns, rows, columns, positions, True)
            before = last

        if going_on:
            for g in range(group):
                state_shift[ring, kv_head * group + g] = shifts[g]
                for m in range(features):
                    at = past_at + (g * rows + m) * columns
                    for d in range(dim + 1):
                        state_sums[ring, kv_head * group + g, m, d] = s[np.uintp(at + d)]


@jit_ranges_with_slot
def backward_units(
    units: Any, q: Any, k: Any, v: Any, omega: Any, out: Any, normalizer: Any, offsets: Any, times: Any, rates: Any,
    dout: Any, dq: Any, dk: Any, dv: Any, rate_parts: Any, sizes: Sizes, scratch: Any,
    slot: int, begin: int, end: int,
) -> None:  # fmt: skip
    """Gradients of units [begin, end), as of `forward_units`: with the past for q̂ and the rate of decay, then from the
    end with the future for k̂ and v. `rate_parts` (sequences, heads) is written where there are times."""
    s = scratch[slot]
    dim, features, group = sizes.dim, sizes.features, sizes.heads // sizes.kv_heads
    width, columns = (dim + PAD - 1) // PAD * PAD, (dim + PAD) // PAD * PAD
    rows = (features + PAD - 1) // PAD * PAD
    timed = len(times) > 0
    tile_times = np.zeros(CHUNK, np.float64)

    # Of each head: Σ decay · φ(k) [v, 1]ᵀ of what came before; its derivative by −rate; what will come.
    past_at = 0
    aged_at = past_at + group * rows * columns
    future_at = aged_at + group * rows * columns
    tile_at = future_at + group * rows * columns
    keys_at = tile_at + CHUNK * columns
    queries_at = keys_at + CHUNK * width
    gradient_at = queries_at + CHUNK * width
    key_gradient_at = gradient_at + CHUNK * width
    values_at = key_gradient_at + CHUNK * width
    turned_at = values_at + CHUNK * columns  # [v, 1] or u with a column for each position
    given_at = turned_at + CHUNK * columns
    value_gradient_at = given_at + CHUNK * columns
    exponents_at = value_gradient_at + CHUNK * columns
    phi_k_at = exponents_at + CHUNK * rows
    phi_q_at = phi_k_at + CHUNK * rows
    dphi_at = phi_q_at + CHUNK * rows
    more_at = dphi_at + CHUNK * rows
    weights_at = more_at + CHUNK * rows
    inside_at = weights_at + CHUNK * CHUNK
    decay_at = inside_at + CHUNK * CHUNK
    gaps_at = decay_at + CHUNK * CHUNK
    vector_at = gaps_at + CHUNK * CHUNK
    since_at = vector_at + CHUNK
    ages_at = since_at + CHUNK
    until_at = ages_at + CHUNK
    left_at = until_at + CHUNK
    sums_at = left_at + CHUNK
    shifts_at = sums_at + CHUNK  # of each chunk: largest exponent before it

    for unit in range(begin, end):
        sequence, kv_head = units[unit, 0], units[unit, 1]
        row, length = offsets[sequence], offsets[sequence + 1] - offsets[sequence]
        fill(s, past_at, 3 * group * rows * columns, _ZERO)
        shift, before = _MINUS_INFINITY, times[row] if timed else 0.0
        for g in range(group):
            rate_parts[sequence, kv_head * group + g] = 0.0

        for first in range(0, length, CHUNK):
            count = min(CHUNK, length - first)
            positions = (count + PAD - 1) // PAD * PAD
            if timed:
                take_times(tile_times, times, row + first, count)
            last = tile_times[count - 1]
            span = np.float32(last - before)
            fetch_columns(s, keys_at, tile_at, width, k.flat, k.stride, row + first, count, kv_head, dim, sizes.root)
            exponents(s, exponents_at, omega, keys_at, width, features, vector_at, positions)
            s[np.uintp(shifts_at + first // CHUNK)] = shift
            new = max(shift, largest_exponent(s, exponents_at, features, count))
            rescale = exp_of_nonpositive(shift - new)
            shift = new
            fetch_values(s, values_at, columns, v.flat, v.stride, row + first, count, kv_head, dim)
            phi_of_keys(s, phi_k_at, exponents_at, shift, features, count, positions)
            for g in range(group):
                head = kv_head * group + g
                rate, past, aged = rates[head], past_at + g * rows * columns, aged_at + g * rows * columns
                scale_all(s, past, rows * columns, rescale)
                _fetch_queries(
                    s, phi_q_at, omega, queries_at, tile_at, width, q, row + first, count, head, sizes, vector_at
                )
                _fetch_given(s, given_at, columns, dout, out, normalizer, row + first, count, head, dim)
                transpose(s, turned_at, s, given_at, positions, columns, CHUNK)
                decay_between(s, decay_at, gaps_at, tile_times, rate, positions, False)
                decay_from(s, since_at, ages_at, tile_times, before, rate, positions)

                # dφ(q): what the past gives, then the chunk.
                multiply(
                    s, inside_at, CHUNK, s, values_at, columns, 1, s, turned_at, CHUNK, positions, positions, columns,
                    False,
                )  # fmt: skip
                times_elements(s, inside_at, decay_at, positions, positions)
                multiply(s, dphi_at, CHUNK, s, past, columns, 1, s, turned_at, CHUNK, rows, positions, columns, False)
                scale_columns(s, dphi_at, dphi_at, since_at, rows, positions)
                if timed:
                    scale_all(s, aged, rows * columns, rescale)
                    column_products(s, sums_at, dphi_at, phi_q_at, rows, positions)
                    drate = dot(s, sums_at, ages_at, positions)
                    multiply(
                        s, more_at, CHUNK, s, aged, columns, 1, s, turned_at, CHUNK, rows, positions, columns, False
                    )
                    column_products(s, sums_at, more_at, phi_q_at, rows, positions)
                    drate += dot(s, sums_at, since_at, positions)
                    multiply(
                        s, weights_at, CHUNK, s, phi_k_at, 1, CHUNK, s, phi_q_at, CHUNK, positions, positions, rows,
                        False,
                    )  # fmt: skip
                    times_elements(s, weights_at, gaps_at, positions, positions)
                    drate += weighted_sum(s, weights_at, inside_at, positions, positions)
                    rate_parts[sequence, head] -= drate
                multiply(
                    s, dphi_at, CHUNK, s, phi_k_at, CHUNK, 1, s, inside_at, CHUNK, rows, positions, positions, True
                )
                times_elements(s, dphi_at, phi_q_at, rows, positions)
                through_features(s, gradient_at, dphi_at, omega, queries_at, width, features, sums_at, positions, False)
                _store_columns(s, gradient_at, dq, row + first, count, head, dim, sizes.root)

                # What the chunk adds to the past.
                decay_from(s, until_at, left_at, tile_times, last, rate, positions)
                through = exp_of_nonpositive(-rate * span)
                scale_columns(s, more_at, phi_k_at, until_at, rows, positions)
                if timed:
                    for i in range(rows * columns):
                        known = s[np.uintp(aged + i)] + span * s[np.uintp(past + i)]
                        s[np.uintp(aged + i)] = through * known
                    scale_columns(s, dphi_at, more_at, left_at, rows, positions)
                    multiply(
                        s, aged, columns, s, dphi_at, CHUNK, 1, s, values_at, columns, rows, columns, positions, True
                    )
                scale_all(s, past, rows * columns, through)
                multiply(s, past, columns, s, more_at, CHUNK, 1, s, values_at, columns, rows, columns, positions, True)
            before = last

        for step in range((length + CHUNK - 1) // CHUNK):
            chunk = (length + CHUNK - 1) // CHUNK - 1 - step
            first = chunk * CHUNK
            count = min(CHUNK, length - first)
            positions = (count + PAD - 1) // PAD * PAD
            if timed:
                take_times(tile_times, times, row + first, count)
                before = times[row + max(first - 1, 0)]
            last = tile_times[count - 1]
            fetch_columns(s, keys_at, tile_at, width, k.flat, k.stride, row + first, count, kv_head, dim, sizes.root)
            exponents(s, exponents_at, omega, keys_at, width, features, vector_at, positions)
            shift = s[np.uintp(shifts_at + chunk)]
            new = max(shift, largest_exponent(s, exponents_at, features, count))
            rescale = exp_of_nonpositive(shift - new)
            phi_of_keys(s, phi_k_at, exponents_at, new, features, count, positions)
            fetch_values(s, values_at, columns, v.flat, v.stride, row + first, count, kv_head, dim)
            transpose(s, turned_at, s, values_at, positions, columns, CHUNK)
            fill(s, key_gradient_at, CHUNK * width, _ZERO)
            fill(s, value_gradient_at, CHUNK * columns, _ZERO)
            for g in range(group):
                head = kv_head * group + g
                rate, future = rates[head], future_at + g * rows * columns
                _fetch_queries(
                    s, phi_q_at, omega, queries_at, tile_at, width, q, row + first, count, head, sizes, vector_at
                )
                _fetch_given(s, given_at, columns, dout, out, normalizer, row + first, count, head, dim)
                decay_between(s, decay_at, gaps_at, tile_times, rate, positions, True)
                decay_from(s, until_at, left_at, tile_times, last, rate, positions)

                # dφ(k): what the future gives, then the chunk.
                multiply(
                    s, inside_at, CHUNK, s, given_at, columns, 1, s, turned_at, CHUNK, positions, positions, columns,
                    False,
                )  # fmt: skip
                times_elements(s, inside_at, decay_at, positions, positions)
                multiply(s, dphi_at, CHUNK, s, future, columns, 1, s, turned_at, CHUNK, rows, positions, columns, False)
                scale_columns(s, dphi_at, dphi_at, until_at, rows, positions)
                multiply(
                    s, dphi_at, CHUNK, s, phi_q_at, CHUNK, 1, s, inside_at, CHUNK, rows, positions, positions, True
                )
                times_elements(s, dphi_at, phi_k_at, rows, positions)
                through_features(s, key_gradient_at, dphi_at, omega, keys_at, width, features, sums_at, positions, True)

                scale_columns(s, more_at, phi_k_at, until_at, rows, positions)
                multiply(
                    s, value_gradient_at, columns, s, more_at, 1, CHUNK, s, future, columns, positions, columns, rows,
                    True,
                )  # fmt: skip
                multiply(
                    s, weights_at, CHUNK, s, phi_q_at, 1, CHUNK, s, phi_k_at, CHUNK, positions, positions, rows, False
                )
                times_elements(s, weights_at, decay_at, positions, positions)
                multiply(
                    s, value_gradient_at, columns, s, weights_at, 1, CHUNK, s, given_at, columns, positions, columns,
                    positions, True,
                )  # fmt: skip

                # What the chunk adds to the future, as the chunk before sees it.
                decay_from(s, since_at, ages_at, tile_times, before, rate, positions)
                scale_columns(s, more_at, phi_q_at, since_at, rows, positions)
                scale_all(s, future, rows * columns, exp_of_nonpositive(-rate * np.float32(last - before)))
                multiply(s, future, columns, s, more_at, CHUNK, 1, s, given_at, columns, rows, columns, positions, True)
                scale_all(s, future, rows * columns, rescale)
            _store_columns(s, key_gradient_at, dk, row + first, count, kv_head, dim, sizes.root)
            for j in range(count):
                target = (row + first + j) * dv.stride + kv_head * dim
                store_row(dv.flat, target, s, value_gradient_at + j * columns, dim, _ONE)


@jit_within
def _fetch_queries(
    s: Any, at: int, omega: Any, columns_at: int, tile_at: int, width: int, q: Any, first: int, count: int, head: int,
    sizes: Sizes, vector_at: int,
) -> None:  # fmt: skip
    """Columns q̂ of a chunk, and at `at` their φ."""
    fetch_columns(s, columns_at, tile_at, width, q.flat, q.stride, first, count, head, sizes.dim, sizes.root)
    positions = (count + PAD - 1) // PAD * PAD
    phi_of_queries(s, at, omega, columns_at, width, sizes.features, vector_at, positions)


@jit_within
def _fetch_given(
    s: Any, at: int, width: int, dout: Any, out: Any, normalizer: Any, first: int, count: int, head: int, dim: int
) -> None:
    """Rows u_i = [dout_i, −dout_i·out_i] / z_i, zeros up to the padded rows and columns."""
    fetch(s, at, width, dout.flat, dout.stride, first, count, head, dim, _ONE)
    for i in range(count):
        target, source = at + i * width, (first + i) * out.stride + head * dim
        total = _ZERO
        for d in range(dim):
            total += s[np.uintp(target + d)] * load(out.flat, source + d)
        s[np.uintp(target + dim)] = -total
        inverse = inverse_of(normalizer[first + i, head])
        for d in range(dim + 1):
            s[np.uintp(target + d)] *= inverse


@jit_within
def _store_columns(s: Any, at: int, rows: Any, first: int, count: int, head: int, dim: int, factor: Any) -> None:
    """rows[first + j, head, d] = factor · s[at + d·CHUNK + j]."""
    for j in range(count):
        target = (first + j) * rows.stride + head * dim
        for d in range(dim):
            store(rows.flat, target + d, factor * s[np.uintp(at + d * CHUNK + j)])

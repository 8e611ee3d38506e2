"""What the kernels of linear attention do to one chunk of positions: features, decay, and sums with the past.

Matrices lie in flat float32 buffers. Those with a row for each feature (or dimension) and a column for each position
have rows CHUNK apart, so that what is done to every position is vector code and no product needs a transposition.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..attention.cpu_tile import fetch, transpose
from ..common.compilation import jit_within
from ..common.tile_multiply import PAD, maximum, multiply
from ..common.vector_math import exp_of_nonpositive

# Positions of a chunk.
CHUNK = 64
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_HALF = np.float32(0.5)
_MINUS_INFINITY = np.float32(-np.inf)
# Below this a normalizer has underflowed: its weights are rounding, and its inverse might overflow.
SMALLEST = np.float32(1e-30)


class Sizes(NamedTuple):
    """Scalars of one call; `root` is that of the scale."""

    heads: int
    kv_heads: int
    dim: int
    features: int
    root: np.float32


@jit_within
def fetch_columns(
    s: Any, at: int, tile_at: int, width: int, flat: Any, stride: int, first: int, count: int, head: int, dim: int,
    factor: Any,
) -> None:  # fmt: skip
    """s[at + d·CHUNK + j] = factor · rows[first + j, head, d], by way of a tile (CHUNK, width)."""
    fetch(s, tile_at, width, flat, stride, first, count, head, dim, factor)
    transpose(s, at, s, tile_at, (count + PAD - 1) // PAD * PAD, width, CHUNK)


@jit_within
def fetch_values(
    s: Any, at: int, width: int, flat: Any, stride: int, first: int, count: int, head: int, dim: int
) -> None:
    """Rows [v, 1], zeros up to the padded rows and columns."""
    fetch(s, at, width, flat, stride, first, count, head, dim, _ONE)
    for i in range(count):
        s[np.uintp(at + i * width + dim)] = _ONE


@jit_within
def exponents(
    s: Any, at: int, omega: Any, columns_at: int, width: int, features: int, halves_at: int, positions: int
) -> None:
    """ω·x̂ − |x̂|²/2, a row for each feature, of the columns x̂."""
    rows = (features + PAD - 1) // PAD * PAD
    multiply(s, at, CHUNK, omega, 0, width, 1, s, columns_at, CHUNK, rows, positions, width, False)
    for j in range(positions):
        s[np.uintp(halves_at + j)] = _ZERO
    for d in range(width):
        for j in range(positions):
            x = s[np.uintp(columns_at + d * CHUNK + j)]
            s[np.uintp(halves_at + j)] += _HALF * x * x
    for m in range(features):
        for j in range(positions):
            s[np.uintp(at + m * CHUNK + j)] -= s[np.uintp(halves_at + j)]


@jit_within
def largest_exponent(s: Any, at: int, features: int, count: int) -> Any:
    """The largest of the first `count` columns."""
    largest = _MINUS_INFINITY
    for m in range(features):
        for j in range(count):
            largest = maximum(largest, s[np.uintp(at + m * CHUNK + j)])
    return largest


@jit_within
def phi_of_keys(s: Any, at: int, exponents_at: int, shift: Any, features: int, count: int, positions: int) -> None:
    """φ(k) relative to exp(shift); zeros for padded features and positions."""
    last = np.int32(count)
    for m in range(features):
        row, source = at + m * CHUNK, exponents_at + m * CHUNK
        for j in range(positions):
            phi = exp_of_nonpositive(s[np.uintp(source + j)] - shift)
            s[np.uintp(row + j)] = phi if np.int32(j) < last else _ZERO
    clear_rows(s, at, features, positions)


@jit_within
def phi_of_queries(
    s: Any, at: int, omega: Any, columns_at: int, width: int, features: int, largest_at: int, positions: int
) -> None:
    """φ(q) up to a factor of each position, which the normalizer takes out again (|q̂|²/2 too)."""
    rows = (features + PAD - 1) // PAD * PAD
    multiply(s, at, CHUNK, omega, 0, width, 1, s, columns_at, CHUNK, rows, positions, width, False)
    for j in range(positions):
        s[np.uintp(largest_at + j)] = _MINUS_INFINITY
    for m in range(features):
        for j in range(positions):
            s[np.uintp(largest_at + j)] = maximum(s[np.uintp(largest_at + j)], s[np.uintp(at + m * CHUNK + j)])
    for m in range(features):
        row = at + m * CHUNK
        for j in range(positions):
            s[np.uintp(row + j)] = exp_of_nonpositive(s[np.uintp(row + j)] - s[np.uintp(largest_at + j)])
    clear_rows(s, at, features, positions)


@jit_within
def clear_rows(s: Any, at: int, features: int, positions: int) -> None:
    """Zeros in the rows that pad the features."""
    for m in range(features, (features + PAD - 1) // PAD * PAD):
        for j in range(positions):
            s[np.uintp(at + m * CHUNK + j)] = _ZERO


@jit_within
def decay_from(s: Any, at: int, ages_at: int, times: Any, origin: float, rate: Any, count: int) -> None:
    """exp(−rate · age) of each position, and its age, the time between it and `origin`; count is padded."""
    for j in range(count):
        s[np.uintp(ages_at + j)] = np.float32(abs(times[np.uintp(j)] - origin))
    for j in range(count):
        s[np.uintp(at + j)] = exp_of_nonpositive(-rate * s[np.uintp(ages_at + j)])


@jit_within
def decay_between(s: Any, at: int, gaps_at: int, times: Any, rate: Any, positions: int, later_first: bool) -> None:
    """Row a, column b: exp(−rate · |t_a − t_b|) and that gap, 0 where the key would lie behind its query.

    The query is the row if `later_first`, else the column.
    """
    sign = _ONE if later_first else -_ONE
    for a in range(positions):
        row, gaps, time = at + a * CHUNK, gaps_at + a * CHUNK, times[np.uintp(a)]
        low, high = (0, a + 1) if later_first else (a, positions)
        first, end = np.int32(low), np.int32(high)
        for b in range(positions):
            s[np.uintp(gaps + b)] = np.float32(time - times[np.uintp(b)]) * sign
        for b in range(positions):
            gap = maximum(s[np.uintp(gaps + b)], _ZERO)
            seen = first <= np.int32(b) and np.int32(b) < end
            decayed = exp_of_nonpositive(-rate * gap)
            s[np.uintp(gaps + b)] = gap if seen else _ZERO
            s[np.uintp(row + b)] = decayed if seen else _ZERO


@jit_within
def times_elements(s: Any, at: int, factors_at: int, rows: int, positions: int) -> None:
    """s[at] *= s[factors_at], element by element, rows CHUNK apart."""
    for m in range(rows):
        for j in range(positions):
            s[np.uintp(at + m * CHUNK + j)] *= s[np.uintp(factors_at + m * CHUNK + j)]


@jit_within
def scale_columns(s: Any, at: int, source_at: int, factors_at: int, rows: int, positions: int) -> None:
    """s[at] = s[source_at] times the factor of each column."""
    for m in range(rows):
        row, source = at + m * CHUNK, source_at + m * CHUNK
        for j in range(positions):
            s[np.uintp(row + j)] = s[np.uintp(source + j)] * s[np.uintp(factors_at + j)]


@jit_within
def scale_rows(s: Any, at: int, width: int, factors_at: int, count: int) -> None:
    """Each row of `width` times its factor."""
    for i in range(count):
        factor = s[np.uintp(factors_at + i)]
        for d in range(width):
            s[np.uintp(at + i * width + d)] *= factor


@jit_within
def scale_all(s: Any, at: int, count: int, factor: Any) -> None:
    """`count` numbers times a factor."""
    for i in range(count):
        s[np.uintp(at + i)] *= factor


@jit_within
def fill(s: Any, at: int, count: int, value: Any) -> None:
    """`count` numbers of this value."""
    for i in range(count):
        s[np.uintp(at + i)] = value


@jit_within
def weighted_sum(s: Any, a_at: int, b_at: int, rows: int, positions: int) -> Any:
    """Σ a·b over all elements: each row in float32, rows in float64."""
    total = 0.0
    for m in range(rows):
        of_row = _ZERO
        for j in range(positions):
            of_row += s[np.uintp(a_at + m * CHUNK + j)] * s[np.uintp(b_at + m * CHUNK + j)]
        total += np.float64(of_row)
    return total


@jit_within
def column_products(s: Any, at: int, a_at: int, b_at: int, rows: int, positions: int) -> None:
    """s[at + j] = Σ_m a[m, j] · b[m, j]."""
    fill(s, at, positions, _ZERO)
    for m in range(rows):
        for j in range(positions):
            s[np.uintp(at + j)] += s[np.uintp(a_at + m * CHUNK + j)] * s[np.uintp(b_at + m * CHUNK + j)]


@jit_within
def dot(s: Any, a_at: int, b_at: int, count: int) -> Any:
    """Σ a·b of two vectors."""
    total = _ZERO
    for j in range(count):
        total += s[np.uintp(a_at + j)] * s[np.uintp(b_at + j)]
    return np.float64(total)


@jit_within
def through_features(
    s: Any, at: int, dexponents_at: int, omega: Any, columns_at: int, width: int, features: int, sums_at: int,
    positions: int, accumulate: bool,
) -> None:  # fmt: skip
    """Columns ωᵀ dx − x̂ Σ_m dx_m: the gradient of x̂ from that of its exponents ω·x̂ − |x̂|²/2."""
    rows = (features + PAD - 1) // PAD * PAD
    multiply(s, at, CHUNK, omega, 0, 1, width, s, dexponents_at, CHUNK, width, positions, rows, accumulate)
    fill(s, sums_at, positions, _ZERO)
    for m in range(features):
        for j in range(positions):
            s[np.uintp(sums_at + j)] += s[np.uintp(dexponents_at + m * CHUNK + j)]
    for d in range(width):
        row, x = at + d * CHUNK, columns_at + d * CHUNK
        for j in range(positions):
            s[np.uintp(row + j)] -= s[np.uintp(x + j)] * s[np.uintp(sums_at + j)]


@jit_within
def inverse_of(normalizer: Any) -> Any:
    """1 / normalizer, 0 where it has underflowed (NaN stays)."""
    return _ZERO if normalizer <= SMALLEST else _ONE / normalizer

"""Products by packed panels and a block of registers, for processors where that is ahead of NumPy's BLAS.

C = A·B in blocks (after Goto & van de Geijn 2008, *Anatomy of high-performance matrix multiplication*): a block of B
stays in the second-level cache and a panel of A in the first, packed so that the innermost loop reads them in order. An
element of C is summed over k in one order, whatever block it is in: results do not depend on the number of threads.

Operands and results may be 16-bit floats, which no BLAS takes: packing makes float32 of them, and a block of the result
is rounded while it is in the cache.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite.binding import get_host_cpu_name

from ..common import arrays
from ..common.arrays import Array, kernel_bits
from ..common.compilation import jit_within
from ..common.parallel import parallel_for
from ..common.ranges import jit_ranges_with_slot
from ..common.scratch import scratch_of_threads
from ..common.tile_multiply import LANES
from ..common.vectors import start_of
from .micro_kernel import (
    ADD,
    BFLOAT16,
    COLUMNS,
    FLOAT16,
    FLOAT32,
    ROWS,
    SET,
    block_product,
    copy_vector_of,
    read,
    read_of,
    round_row,
    transpose_rows_of,
    transpose_square_of,
    write,
)

# Of a block: its inner size, columns of B, and rows of A: a panel, which stays in the first-level cache while B's pass
# by; more where A is transposed and read a row of it at a time.
_INNER = 256
_WIDE = 16 * COLUMNS
_TALL, _TALL_TRANSPOSED = ROWS, 36 * ROWS
# Rows of a 16-bit result whose sums are kept in float32, where blocks of them are added up over k.
_ROUNDED = 1024
_ZERO = np.float32(0.0)
_KINDS = {arrays.FLOAT32: FLOAT32, arrays.BFLOAT16: BFLOAT16, arrays.FLOAT16: FLOAT16}


@functools.cache
def is_ahead() -> bool:
    """Whether this is faster than NumPy's BLAS: with AVX-512 on Intel's processors, where that reaches two thirds of
    what the arithmetic could do."""
    return LANES == 16 and not get_host_cpu_name().startswith("znver")


def is_possible() -> bool:
    """Whether this processor has vectors of at least 8 floats."""
    return LANES >= 8


def takes(a: Array, b: Array, out: Array, accumulate: bool) -> bool:
    """Whether this product is one for blocks: large enough to fill some, and its rows are written as they lie."""
    return (
        min(out.shape[0], a.shape[1]) >= LANES and out.shape[1] >= COLUMNS and out.strides[1] == out.itemsize
        and {a.dtype, b.dtype, out.dtype} <= _KINDS.keys() and not (accumulate and out.itemsize == 2)
    )  # fmt: skip


def multiply(a: Array, b: Array, out: Array, accumulate: bool, by_rows: bool, grain: int) -> None:
    """out = a b, or out += a b in float32, none of them empty, a and b of any strides: rows or columns of the result
    on all threads, at least `grain` units of ROWS or COLUMNS on each."""
    (m, k), n = a.shape, b.shape[1]
    tall = _TALL if a.strides[1] == a.itemsize else _TALL_TRANSPOSED
    floats_of_b, floats_of_a, floats = scratch_floats(m, n, k, tall)
    if out.itemsize == 2:
        floats += min(n, _WIDE) * (min(m, _ROUNDED) if k > _INNER else min(m, tall))
    scratch = scratch_of_threads(floats, "product")
    at_a, at_b, at_out = (start_of(kernel_bits(x)) for x in (a, b, out))
    parallel_for(
        _blocks, -(-m // ROWS) if by_rows else -(-n // COLUMNS), at_a, *a.strides, _KINDS[a.dtype],
        at_b, *b.strides, _KINDS[b.dtype], at_out, out.strides[0], _KINDS[out.dtype], m, n, k, tall,
        accumulate, by_rows, start_of(scratch), scratch.strides[0], floats_of_b, floats_of_a, grain=grain,
    )  # fmt: skip


def scratch_floats(m: int, n: int, k: int, tall: int) -> tuple[int, int, int]:
    """Of working memory: for the packed block of B, for that of A, and in all for a float32 result."""
    inner = min(k, _INNER)
    of_a = -(-min(m, tall) // ROWS) * LANES * inner
    of_b = -(-min(n, _WIDE) // COLUMNS) * COLUMNS * inner
    return of_b, of_a, of_b + of_a + ROWS * COLUMNS


@jit_within
def _size(kind: int) -> Any:
    return 4 if kind == FLOAT32 else 2


@jit_within
def multiply_addresses(
    a: int, a_down: int, a_across: int, a_kind: int, b: int, b_down: int, b_across: int, b_kind: int,
    c: int, c_down: int, c_kind: int, m: int, n: int, k: int, tall: int, way: int,
    scratch: int, floats_of_b: int, floats_of_a: int,
) -> None:  # fmt: skip
    """`way`: SET, or ADD to a float32 result. At most _ROUNDED rows, if it is 16-bit."""
    packed_b, packed_a = scratch, scratch + 4 * floats_of_b
    tile = packed_a + 4 * floats_of_a
    sums, sums_down = tile + 4 * ROWS * COLUMNS, 4 * min(n, _WIDE)
    for j0 in range(0, n, _WIDE):
        columns = min(_WIDE, n - j0)
        for k0 in range(0, k, _INNER):
            inner = min(_INNER, k - k0)
            _pack_b(packed_b, b + k0 * b_down + j0 * b_across, b_down, b_across, b_kind, columns, inner)
            how = ADD if k0 > 0 else way
            for i0 in range(0, m, tall):
                rows = min(tall, m - i0)
                _pack_a(packed_a, a + i0 * a_down + k0 * a_across, a_down, a_across, a_kind, rows, inner)
                result = c + i0 * c_down + _size(c_kind) * j0
                if c_kind == FLOAT32:
                    target, target_down = result, c_down
                else:
                    target, target_down = sums + (i0 * sums_down if k > _INNER else 0), sums_down
                _block(target, target_down, packed_a, packed_b, rows, columns, inner, how, tile)
                if c_kind != FLOAT32 and k0 + inner == k:
                    for row in range(rows):
                        round_row(c_kind, result + row * c_down, target + row * target_down, columns)


@jit_ranges_with_slot
def _blocks(
    a: int, a_down: int, a_across: int, a_kind: int, b: int, b_down: int, b_across: int, b_kind: int,
    c: int, c_down: int, c_kind: int, m: int, n: int, k: int, tall: int, accumulate: bool, by_rows: bool,
    scratch: int, scratch_bytes: int, floats_of_b: int, floats_of_a: int, slot: int, begin: int, end: int,
) -> None:  # fmt: skip
    """Units [begin, end) of rows or columns."""
    if by_rows:
        first = begin * ROWS
        a, c, m = a + first * a_down, c + first * c_down, min(end * ROWS, m) - first
    else:
        first = begin * COLUMNS
        b, c, n = b + first * b_across, c + _size(c_kind) * first, min(end * COLUMNS, n) - first
    way = ADD if accumulate else SET
    most = m if c_kind == FLOAT32 else _ROUNDED
    for i in range(0, m, most):
        multiply_addresses(
            a + i * a_down, a_down, a_across, a_kind, b, b_down, b_across, b_kind, c + i * c_down, c_down, c_kind,
            min(most, m - i), n, k, tall, way, scratch + slot * scratch_bytes, floats_of_b, floats_of_a,
        )  # fmt: skip


@jit_within
def _block(c: int, c_down: int, a: int, b: int, rows: int, columns: int, inner: int, way: int, tile: int) -> None:
    for panel in range((rows + ROWS - 1) // ROWS):
        i, of_a = panel * ROWS, a + 4 * panel * LANES * inner
        for j in range(0, columns, COLUMNS):
            here, of_b = c + i * c_down + 4 * j, b + 4 * j * inner
            if i + ROWS <= rows and j + COLUMNS <= columns:
                block_product(here, c_down, of_a, of_b, inner, way)
                continue
            block_product(tile, 4 * COLUMNS, of_a, of_b, inner, SET)
            for r in range(min(ROWS, rows - i)):
                for s in range(min(COLUMNS, columns - j)):
                    at = here + r * c_down + 4 * s
                    value = read(tile + 4 * (r * COLUMNS + s))
                    write(at, read(at) + value if way == ADD else value)


@jit_within
def _pack_b(target: int, b: int, down: int, across: int, kind: int, columns: int, inner: int) -> None:
    size = _size(kind)
    for j in range(0, columns, COLUMNS):
        to, start = target + 4 * j * inner, b + j * across
        done = 0
        if j + COLUMNS <= columns:
            if across == size:
                for k in range(inner):
                    copy_vector_of(kind, to + 4 * k * COLUMNS, start + k * down)
                    copy_vector_of(kind, to + 4 * (k * COLUMNS + LANES), start + k * down + size * LANES)
                done = inner
            elif down == size:
                done = inner // LANES * LANES
                for half in range(0, COLUMNS, LANES):
                    for k in range(0, done, LANES):
                        transpose_square_of(
                            kind, to + 4 * (k * COLUMNS + half), 4 * COLUMNS, start + half * across + size * k, across
                        )
        for k in range(done, inner):
            for s in range(COLUMNS):
                value = read_of(kind, start + s * across + k * down) if j + s < columns else _ZERO
                write(to + 4 * (k * COLUMNS + s), value)


@jit_within
def _pack_a(target: int, a: int, down: int, across: int, kind: int, rows: int, inner: int) -> None:
    # Panels of whole vectors first: of a transposed A all of them row by row, as it lies in memory.
    full, step, size = 0, 4 * LANES * inner, _size(kind)
    if down == size:
        full = max(0, (rows - LANES + ROWS) // ROWS)
        for k in range(inner):
            for panel in range(full):
                copy_vector_of(kind, target + panel * step + 4 * k * LANES, a + size * panel * ROWS + k * across)
    for panel in range(full, (rows + ROWS - 1) // ROWS):
        to, start, done = target + panel * step, a + panel * ROWS * down, 0
        if across == size and (panel + 1) * ROWS <= rows:
            done = inner // LANES * LANES
            for k in range(0, done, LANES):
                transpose_rows_of(kind, to + 4 * k * LANES, 4 * LANES, start + size * k, down)
        for k in range(done, inner):
            for r in range(ROWS):
                value = read_of(kind, start + r * down + k * across) if panel * ROWS + r < rows else _ZERO
                write(to + 4 * (k * LANES + r), value)

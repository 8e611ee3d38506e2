"""float32 products on Intel's matrix unit (AMX), which multiplies bfloat16: each factor as the sum of three.

x = h + m + l, of 8 bits each, is exact, and a b = Σ of six of nine products: what is left out is below 2⁻²⁵ |a b|, less
than a float32 rounds away (Henry, Tang & Heinecke 2019, *Leveraging the bfloat16 Artificial Intelligence Datatype For
Higher-Precision Computations*). Sums are float32, over 32 products at a time before they reach C, and so nearer to the
exact ones than those of a BLAS; results below 2⁻¹²⁶ are 0. An element of C is summed in one order, whatever block it is
in: results do not depend on the number of threads.

Blocks that hold a number without parts (infinite, NaN, above 3.39e38) are multiplied by `sgemm`.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from typing import Any

import numpy as np
from llvmlite.binding import get_host_cpu_features
from numba.core import config

from ..common.arrays import Array
from ..common.compilation import jit_within
from ..common.parallel import parallel_for
from ..common.ranges import jit_ranges_with_slot
from ..common.scratch import scratch_of_threads
from ..common.vectors import start_of
from . import sgemm
from .micro_kernel import (
    ADD,
    FLOAT32,
    SET,
    STREAM,
    add_vector,
    copy_vector,
    read,
    stream_vector,
    transpose_square,
    write,
)
from .split_kernel import (
    BLOCK,
    CONFIGURATION,
    PART_BYTES,
    STEP,
    STEP_BYTES,
    TILE,
    TILE_BYTES,
    begin_tiles,
    end_tiles,
    prefetch_row,
    split_across,
    split_along,
    tiles_product,
)

# Of a block: columns of B, rows of A (more where a column of it lies in one piece), and what is summed over (more where
# there are few columns): both stay in the second-level cache.
_WIDE, _NARROW = 512, 256
_TALL, _TALL_TRANSPOSED = 64, 256
_INNER, _INNER_NARROW = 256, 512
# A result of so many bytes would push what it is made of out of the cache, and is written past it.
_STREAMED = 1 << 21
_ZERO = np.float32(0.0)
_CONFIGURATION = np.frombuffer(CONFIGURATION, np.uint8)
# Working memory in bytes: a block of C, also transposed; one of A or B as floats, and its parts.
_C, _EDGE, _PARTS = 2 * 4 * BLOCK * BLOCK, 4 * TILE * STEP, 3 * PART_BYTES
# arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA): Linux, Documentation/arch/x86/xstate.rst
_ARCH_PRCTL, _REQUEST, _TILE_DATA = 158, 0x1023, 18


@functools.cache
def is_possible() -> bool:
    """Whether this processor has the matrix unit, kernels are compiled for it, and the system lets this process use
    it."""
    features = get_host_cpu_features()
    if platform.system() != "Linux" or not (features.get("amx-bf16") and features.get("avx512bw")):
        return False
    # NUMBA_CPU_NAME and NUMBA_CPU_FEATURES: LLVM ends the process at an instruction that its target does not have.
    if config.CPU_NAME is not None or not (config.CPU_FEATURES is None or "+amx-bf16" in config.CPU_FEATURES):
        return False
    granted: int = ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST, _TILE_DATA)
    return granted == 0


def takes(a: Array, b: Array, out: Array) -> bool:
    """Whether this product is large enough to fill tiles, and its rows are written as they lie."""
    return min(*out.shape, a.shape[1]) >= BLOCK and out.strides[1] == 4


def multiply(a: Array, b: Array, out: Array, accumulate: bool, by_rows: bool, grain: int) -> None:
    """out = a b, or out += a b, in float32, none of them empty, a and b of any strides: rows or columns of the result
    on all threads, at least `grain` blocks of them on each.

    Of two matrices that lie row by row along k the smaller is transposed when it is packed: b as the first operand of
    outᵀ = bᵀ aᵀ, or a.
    """
    units = -(-out.shape[0 if by_rows else 1] // BLOCK)
    turned = a.strides[0] == b.strides[1] == 4 and b.shape[1] < a.shape[0]
    if turned:
        a, b = b.T, a.T
    (m, k), n = a.shape, b.shape[1]
    most = _INNER_NARROW if n <= _NARROW else _INNER
    inner, tall, wide = min(k, most), min(m, _TALL if a.strides[1] == 4 else _TALL_TRANSPOSED), min(n, _WIDE)
    panel = -(-inner // STEP) * STEP_BYTES
    bytes_of_b, bytes_of_a = -(-wide // BLOCK) * panel, -(-tall // BLOCK) * panel
    floats_of_b, floats_of_a, floats = sgemm.scratch_floats(tall, max(wide, tall), inner, tall)
    scratch = scratch_of_threads((_C + _EDGE + _PARTS + bytes_of_b + bytes_of_a) // 4 + floats, "product")
    parallel_for(
        _blocks, units, start_of(a), *a.strides, start_of(b), *b.strides, start_of(out), out.strides[0], m, n, k,
        inner, tall, accumulate, turned, by_rows, _CONFIGURATION.ctypes.data, start_of(scratch), scratch.strides[0],
        bytes_of_b, bytes_of_a, floats_of_b, floats_of_a, grain=grain,
    )  # fmt: skip


@jit_within
def _way_of(c: int, c_down: int, m: int, n: int, accumulate: bool, turned: bool) -> Any:
    """How a result is written: SET, ADD or STREAM, which needs rows that begin at multiples of a vector."""
    if accumulate:
        return ADD
    streamed = not turned and (c | c_down) % (4 * TILE) == 0 and 4 * m * n >= _STREAMED
    return STREAM if streamed else SET


@jit_ranges_with_slot
def _blocks(
    a: int, a_down: int, a_across: int, b: int, b_down: int, b_across: int, c: int, c_down: int, m: int, n: int, k: int,
    most: int, tall: int, accumulate: bool, turned: bool, by_rows: bool, configuration: int, scratch: int,
    scratch_bytes: int, bytes_of_b: int, bytes_of_a: int, floats_of_b: int, floats_of_a: int,
    slot: int, begin: int, end: int,
) -> None:  # fmt: skip
    """Blocks [begin, end) of rows or columns of the result."""
    first = begin * BLOCK
    c += first * (c_down if by_rows else 4)
    # If turned, rows of the result are columns of the second operand.
    if by_rows != turned:
        a, m = a + first * a_down, min(end * BLOCK, m) - first
    else:
        b, n = b + first * b_across, min(end * BLOCK, n) - first
    way = _way_of(c, c_down, m, n, accumulate, turned)
    own = scratch + slot * scratch_bytes
    edge = own + _C
    packed_b = edge + _EDGE + _PARTS
    packed_a = packed_b + bytes_of_b
    others = packed_a + bytes_of_a
    begin_tiles(configuration)
    for j0 in range(0, n, _WIDE):
        columns = min(_WIDE, n - j0)
        for k0 in range(0, k, most):
            inner = min(most, k - k0)
            from_b = b + k0 * b_down + j0 * b_across
            odd_b = _pack(packed_b, from_b, b_across, b_down, columns, inner, True, edge)
            how = ADD if k0 > 0 else SET if way == STREAM and inner < k else way
            for i0 in range(0, m, tall):
                rows = min(tall, m - i0)
                from_a = a + i0 * a_down + k0 * a_across
                odd = odd_b | _pack(packed_a, from_a, a_down, a_across, rows, inner, False, edge)
                target = c + j0 * c_down + 4 * i0 if turned else c + i0 * c_down + 4 * j0
                if odd == 0:
                    _block(target, c_down, packed_a, packed_b, rows, columns, inner, how, turned, own)
                    continue
                left, left_down, left_across, tall_side = from_a, a_down, a_across, rows
                right, right_down, right_across, wide_side = from_b, b_down, b_across, columns
                if turned:
                    left, left_down, left_across, tall_side = from_b, b_across, b_down, columns
                    right, right_down, right_across, wide_side = from_a, a_across, a_down, rows
                sgemm.multiply_addresses(
                    left, left_down, left_across, FLOAT32, right, right_down, right_across, FLOAT32,
                    target, c_down, FLOAT32, tall_side, wide_side, inner, tall, ADD if how == ADD else SET,
                    others, floats_of_b, floats_of_a,
                )  # fmt: skip
    end_tiles()


@jit_within
def _block(
    c: int, c_down: int, a: int, b: int, rows: int, columns: int, inner: int, way: int, turned: bool, scratch: int
) -> None:
    steps = (inner + STEP - 1) // STEP
    panel, other = steps * STEP_BYTES, scratch + 4 * BLOCK * BLOCK
    for i in range(0, rows, BLOCK):
        for j in range(0, columns, BLOCK):
            of_a, of_b = a + i // BLOCK * panel, b + j // BLOCK * panel
            here = c + j * c_down + 4 * i if turned else c + i * c_down + 4 * j
            tall, wide = min(BLOCK, rows - i), min(BLOCK, columns - j)
            if turned:
                tall, wide = wide, tall
            if way != STREAM:
                for r in range(tall):
                    prefetch_row(here + r * c_down)
            if way == SET and not turned and tall == wide == BLOCK:
                tiles_product(here, c_down, of_a, of_b, steps)
                continue
            tiles_product(scratch, 4 * BLOCK, of_a, of_b, steps)
            result = scratch
            if turned:
                result = other
                for r in range(0, BLOCK, TILE):
                    for s in range(0, BLOCK, TILE):
                        transpose_square(
                            result + 4 * (s * BLOCK + r), 4 * BLOCK, scratch + 4 * (r * BLOCK + s), 4 * BLOCK
                        )
            for r in range(tall):
                at, value = here + r * c_down, result + 4 * BLOCK * r
                if wide < BLOCK:
                    for s in range(0, 4 * wide, 4):
                        write(at + s, read(at + s) + read(value + s) if way == ADD else read(value + s))
                    continue
                for half in range(0, 4 * BLOCK, 4 * TILE):
                    if way == ADD:
                        add_vector(at + half, value + half)
                    elif way == STREAM:
                        stream_vector(at + half, value + half)
                    else:
                        copy_vector(at + half, value + half)


@jit_within
def _pack(
    target: int, source: int, down: int, along: int, count: int, inner: int, paired: bool, edge: int
) -> int:  # fmt: skip
    """Parts of `count` rows of A, or (`paired`) columns of B, `down` bytes from each other, of `inner` elements along
    k, `along` bytes from each other. -> whether an element has none."""
    steps, tiles, odd = (inner + STEP - 1) // STEP, (count + BLOCK - 1) // BLOCK * (BLOCK // TILE), 0
    buffer = edge + _EDGE
    for number in range(steps * tiles):
        # In the order in which the source lies in memory.
        step, i = (number // tiles, number % tiles * TILE) if down == 4 else (number % steps, number // steps * TILE)
        to = target + (i // BLOCK * steps + step) * STEP_BYTES + i % BLOCK // TILE * TILE_BYTES
        start, k = source + i * down + step * STEP * along, step * STEP
        whole = i + TILE <= count and k + STEP <= inner
        if whole and down == 4:
            into = to if paired else buffer
            for p in range(TILE):
                first = start + 2 * p * along
                odd |= split_across(into + 64 * p, first, first + along)
            if not paired:
                _turn(to, buffer)
            continue
        from_, step_down = start, down
        if not (whole and along == 4):
            for r in range(TILE):
                for s in range(STEP):
                    inside = i + r < count and k + s < inner
                    write(edge + 4 * (r * STEP + s), read(start + r * down + s * along) if inside else _ZERO)
            from_, step_down = edge, 4 * STEP
        into = buffer if paired else to
        for r in range(TILE):
            odd |= split_along(into + 64 * r, from_ + r * step_down, from_ + r * step_down + 4 * TILE)
        if paired:
            _turn(to, buffer)
    return odd


@jit_within
def _turn(target: int, source: int) -> None:
    """The three parts of a tile as words, transposed."""
    for part in range(3):
        transpose_square(target + part * PART_BYTES, 64, source + part * PART_BYTES, 64)

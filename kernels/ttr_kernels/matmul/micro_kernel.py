"""What a blocked matrix product does innermost, in LLVM vectors: a block of C from packed panels, and packing itself.

A panel of A is ROWS rows side by side, element (row, k) at k·ROWS + row; a panel of B is COLUMNS columns, element
(k, column) at k·COLUMNS + column. Arrays are given as addresses, and their strides in bytes: packing reads them as they
lie, whichever way. All intrinsics are for compiled kernels.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..common.tile_multiply import LANES, accumulated

# 28 sums, two vectors of B and one factor in 32 registers (AVX-512), 12 sums in 16 (AVX2).
ROWS = 14 if LANES == 16 else 6
VECTORS = 2
COLUMNS = VECTORS * LANES
# How a block of the result is written: over what was there, added to it, or past the caches.
SET, ADD, STREAM = 0, 1, 2

_WORD, _INDEX, _FLOAT = ir.IntType(64), ir.IntType(32), ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)
_UNDEFINED = ir.Constant(_VECTOR, ir.Undefined)


def _indices(values: list[int]) -> Any:
    return ir.Constant(ir.VectorType(_INDEX, LANES), values)


def _vector(builder: Any, address: Any, offset: Any) -> Any:
    return builder.inttoptr(builder.add(address, offset), _VECTOR.as_pointer())


def _stream(builder: Any, stored: Any) -> None:
    stored.set_metadata("nontemporal", builder.module.add_metadata([_INDEX(1)]))


@intrinsic
def block_product(context: Any, c: Any, c_down: Any, a: Any, b: Any, inner: Any, write: Any) -> Any:
    """C (ROWS × COLUMNS) from a panel of A and one of B with `inner` > 0 columns and rows; `write`: SET, ADD or STREAM,
    which needs rows of C that begin at multiples of a vector."""
    signature = types.void(*[types.int64] * 6)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        c, c_down, a, b, inner, write = arguments
        factors_of_a = builder.inttoptr(a, _FLOAT.as_pointer())

        def factors(k: Any) -> Any:
            at_a, at_b = builder.mul(k, _WORD(ROWS)), builder.mul(k, _WORD(4 * COLUMNS))
            of_b = [
                builder.load(_vector(builder, b, builder.add(at_b, _WORD(4 * v * LANES))), align=4 * LANES)
                for v in range(VECTORS)
            ]

            def spread(r: int) -> Any:
                scalar = builder.load(builder.gep(factors_of_a, [builder.add(at_a, _WORD(r))]), align=4)
                single = builder.insert_element(_UNDEFINED, scalar, _INDEX(0))
                return [builder.shuffle_vector(single, _UNDEFINED, _indices([0] * LANES))] * VECTORS

            return spread, of_b

        sums = accumulated(builder, inner, 1, ROWS, VECTORS, factors)
        ways = [builder.append_basic_block(name) for name in ("set", "add", "stream")]
        end = builder.append_basic_block("written")
        choice = builder.switch(write, ways[SET])
        for number, way in enumerate(ways):
            if number != SET:
                choice.add_case(_WORD(number), way)
            builder.position_at_end(way)
            for r in range(ROWS):
                for v in range(VECTORS):
                    offset = builder.add(builder.mul(c_down, _WORD(r)), _WORD(4 * v * LANES))
                    pointer, value = _vector(builder, c, offset), sums[r][v]
                    if number == ADD:
                        value = builder.fadd(builder.load(pointer, align=4), value)
                    stored = builder.store(value, pointer, align=4 * LANES if number == STREAM else 4)
                    if number == STREAM:
                        _stream(builder, stored)
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return signature, generate


def _transposition(rows: int) -> Any:
    def typing(context: Any, target: Any, target_stride: Any, source: Any, source_stride: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            target, target_stride, source, source_stride = arguments
            values = [
                builder.load(_vector(builder, source, builder.mul(source_stride, _WORD(r))), align=4)
                if r < rows
                else _UNDEFINED
                for r in range(LANES)
            ]
            # Off-diagonal blocks of half the size change places, then within each block, and so on.
            size = LANES // 2
            while size:
                low = [i if not i & size else LANES + i - size for i in range(LANES)]
                high = [i + size if not i & size else LANES + i for i in range(LANES)]
                for r in range(LANES):
                    if not r & size:
                        upper, lower = values[r], values[r + size]
                        values[r] = builder.shuffle_vector(upper, lower, _indices(low))
                        values[r + size] = builder.shuffle_vector(upper, lower, _indices(high))
                size //= 2
            for column, value in enumerate(values):
                builder.store(value, _vector(builder, target, builder.mul(target_stride, _WORD(column))), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), generate

    return typing


# Rows of LANES floats become LANES rows. The second takes ROWS rows, and writes whole vectors all the same: columns are
# to be transposed in order, and what the last one writes beyond its end must be free.
transpose_square = intrinsic(_transposition(LANES))
transpose_rows = intrinsic(_transposition(ROWS))


def _copy(way: int) -> Any:
    def typing(context: Any, target: Any, source: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            to, start = (builder.inttoptr(argument, _VECTOR.as_pointer()) for argument in arguments)
            value = builder.load(start, align=4)
            if way == ADD:
                value = builder.fadd(builder.load(to, align=4), value)
            stored = builder.store(value, to, align=4 * LANES if way == STREAM else 4)
            if way == STREAM:
                _stream(builder, stored)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return typing


# LANES floats from one address to another; added to what is there; to a multiple of a vector, past the caches.
copy_vector, add_vector, stream_vector = (intrinsic(_copy(way)) for way in (SET, ADD, STREAM))


@intrinsic
def read(context: Any, address: Any) -> Any:
    """The float32 at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(builder.inttoptr(arguments[0], _FLOAT.as_pointer()), align=4)

    return types.float32(types.int64), generate


@intrinsic
def write(context: Any, address: Any, value: Any) -> Any:
    """Write a float32 to an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[1], builder.inttoptr(arguments[0], _FLOAT.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), generate

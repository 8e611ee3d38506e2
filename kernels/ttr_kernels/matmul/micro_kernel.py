"""What a blocked matrix product does innermost, in LLVM vectors: a block of C from packed panels, and packing itself.

A panel of A is ROWS rows side by side, element (row, k) at k·LANES + row; a panel of B is COLUMNS columns, element
(k, column) at k·COLUMNS + column, all float32. Arrays are given as addresses, and their strides in bytes: packing reads
them as they lie, whichever way, and makes float32 of 16-bit floats. All intrinsics are for compiled kernels.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..common.compilation import jit_within
from ..common.tile_multiply import LANES, accumulated
from ..common.vectors import LINE, fetch_later, load_vector

# 28 sums, two vectors of B and one factor in 32 registers (AVX-512), 12 sums in 16 (AVX2).
ROWS = 14 if LANES == 16 else 6
VECTORS = 2
COLUMNS = VECTORS * LANES
# How a block of the result is written: over what was there, added to it, or past the caches.
SET, ADD, STREAM = 0, 1, 2
# What an element is.
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2

_WORD, _INDEX, _SHORT, _FLOAT, _HALF = ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.FloatType(), ir.HalfType()
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
    """C (ROWS × COLUMNS) from a panel of A and one of B with `inner` > 0 columns and rows; `write`: SET or ADD."""
    signature = types.void(*[types.int64] * 6)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        c, c_down, a, b, inner, write = arguments
        factors_of_a = builder.inttoptr(a, _FLOAT.as_pointer())
        # C comes from far away, and is needed when the sums are done.
        for r in range(ROWS):
            for line in range(0, 4 * COLUMNS, LINE):
                offset = builder.add(builder.mul(c_down, _WORD(r)), _WORD(line))
                fetch_later(builder, _vector(builder, c, offset), to_write=True)

        def factors(k: Any) -> Any:
            at_a, at_b = builder.mul(k, _WORD(LANES)), builder.mul(k, _WORD(4 * COLUMNS))
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
        adding = builder.icmp_signed("==", write, _WORD(ADD))
        with builder.if_else(adding) as branches:
            for way, branch in zip((ADD, SET), branches, strict=True):
                with branch:
                    for r in range(ROWS):
                        for v in range(VECTORS):
                            offset = builder.add(builder.mul(c_down, _WORD(r)), _WORD(4 * v * LANES))
                            pointer, value = _vector(builder, c, offset), sums[r][v]
                            if way == ADD:
                                value = builder.fadd(builder.load(pointer, align=4), value)
                            builder.store(value, pointer, align=4)
        return context.get_dummy_value()

    return signature, generate


def _of(element: Any, lanes: int) -> Any:
    return ir.VectorType(element, lanes) if lanes > 1 else element


def _same(kind: Any, value: int) -> Any:
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def _loaded(builder: Any, address: Any, kind: int, lanes: int) -> Any:
    """So many elements as float32."""
    pointer = builder.inttoptr(address, ir.IntType(8).as_pointer())
    return load_vector(builder, pointer, (types.float32, types.uint16, types.int16)[kind], lanes)


def _rounded(builder: Any, value: Any, kind: int, lanes: int) -> Any:
    """float32 to the nearest 16-bit float, ties to even."""
    if kind == FLOAT16:
        return builder.fptrunc(value, _of(_HALF, lanes))
    words, shorts = _of(_INDEX, lanes), _of(_SHORT, lanes)
    bits = builder.bitcast(value, words)
    odd = builder.and_(builder.lshr(bits, _same(words, 16)), _same(words, 1))
    nearest = builder.lshr(builder.add(builder.add(bits, _same(words, 0x7FFF)), odd), _same(words, 16))
    is_number = builder.fcmp_ordered("ord", value, value)
    return builder.select(is_number, builder.trunc(nearest, shorts), _same(shorts, 0x7FC0))


def _transposition(rows: int, kind: int) -> Any:
    def typing(context: Any, target: Any, target_stride: Any, source: Any, source_stride: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            target, target_stride, source, source_stride = arguments
            values = [
                _loaded(builder, builder.add(source, builder.mul(source_stride, _WORD(r))), kind, LANES)
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

    return intrinsic(typing)


# LANES rows of LANES floats become LANES rows.
transpose_square, _square_of_bfloat16, _square_of_float16 = (_transposition(LANES, kind) for kind in range(3))
_rows_of_float32, _rows_of_bfloat16, _rows_of_float16 = (_transposition(ROWS, kind) for kind in range(3))


@jit_within
def transpose_square_of(kind: int, target: int, target_stride: int, source: int, source_stride: int) -> None:
    """`transpose_square` for elements of this kind, which become float32."""
    if kind == FLOAT32:
        transpose_square(target, target_stride, source, source_stride)
    elif kind == BFLOAT16:
        _square_of_bfloat16(target, target_stride, source, source_stride)
    else:
        _square_of_float16(target, target_stride, source, source_stride)


@jit_within
def transpose_rows_of(kind: int, target: int, target_stride: int, source: int, source_stride: int) -> None:
    """The same for ROWS rows: what is written to the other lanes is undefined."""
    if kind == FLOAT32:
        _rows_of_float32(target, target_stride, source, source_stride)
    elif kind == BFLOAT16:
        _rows_of_bfloat16(target, target_stride, source, source_stride)
    else:
        _rows_of_float16(target, target_stride, source, source_stride)


def _copy(way: int, kind: int = FLOAT32) -> Any:
    def typing(context: Any, target: Any, source: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            to, value = _vector(builder, arguments[0], _WORD(0)), _loaded(builder, arguments[1], kind, LANES)
            if way == ADD:
                value = builder.fadd(builder.load(to, align=4), value)
            stored = builder.store(value, to, align=4 * LANES if way == STREAM else 4)
            if way == STREAM:
                _stream(builder, stored)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return intrinsic(typing)


# LANES floats from one address to another; added to what is there; to a multiple of a vector, past the caches.
copy_vector, add_vector, stream_vector = (_copy(way) for way in (SET, ADD, STREAM))
_vector_of_bfloat16, _vector_of_float16 = (_copy(SET, kind) for kind in (BFLOAT16, FLOAT16))


@jit_within
def copy_vector_of(kind: int, target: int, source: int) -> None:
    """LANES elements of this kind, as float32."""
    if kind == FLOAT32:
        copy_vector(target, source)
    elif kind == BFLOAT16:
        _vector_of_bfloat16(target, source)
    else:
        _vector_of_float16(target, source)


def _rounding(kind: int, lanes: int) -> Any:
    def typing(context: Any, target: Any, source: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value = _rounded(builder, _loaded(builder, arguments[1], FLOAT32, lanes), kind, lanes)
            builder.store(value, builder.inttoptr(arguments[0], value.type.as_pointer()), align=2)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return intrinsic(typing)


_vector_to_bfloat16, _vector_to_float16 = (_rounding(kind, LANES) for kind in (BFLOAT16, FLOAT16))
_one_to_bfloat16, _one_to_float16 = (_rounding(kind, 1) for kind in (BFLOAT16, FLOAT16))


@jit_within
def round_row(kind: int, target: int, source: int, count: int) -> None:
    """So many float32, each to the nearest 16-bit float of this kind, ties to even."""
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        if kind == BFLOAT16:
            _vector_to_bfloat16(target + 2 * i, source + 4 * i)
        else:
            _vector_to_float16(target + 2 * i, source + 4 * i)
    for i in range(whole, count):
        if kind == BFLOAT16:
            _one_to_bfloat16(target + 2 * i, source + 4 * i)
        else:
            _one_to_float16(target + 2 * i, source + 4 * i)


def _reading(kind: int) -> Any:
    def typing(context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return _loaded(builder, arguments[0], kind, 1)

        return types.float32(types.int64), generate

    return intrinsic(typing)


# The float32 at an address.
read, _read_bfloat16, _read_float16 = (_reading(kind) for kind in range(3))


@jit_within
def read_of(kind: int, address: int) -> Any:
    """The element at an address, as float32."""
    if kind == FLOAT32:
        return read(address)
    return _read_bfloat16(address) if kind == BFLOAT16 else _read_float16(address)


@intrinsic
def write(context: Any, address: Any, value: Any) -> Any:
    """Write a float32 to an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[1], builder.inttoptr(arguments[0], _FLOAT.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), generate

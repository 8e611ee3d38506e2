"""What products of split float32 do innermost: three bfloat16 parts of a number, and a block of C on the matrix unit.

Intel's AMX multiplies *tiles*: C (16 × 16 float32) += A (16 × 32 bfloat16) · B (32 × 16), of which A's lie row by row,
and B's with two neighbours along k side by side: one word of 32 bits each, like A's. Arrays are given as addresses, and
their strides in bytes. All intrinsics are for compiled kernels.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..common.vectors import fetch_later

# Rows (or columns) of a tile, and of a block of C: two tiles each way, which with A's and B's are all there are.
TILE, BLOCK = 16, 32
# Of one step along k: so many elements, in three parts of two tiles.
STEP = 32
TILE_BYTES, PART_BYTES, STEP_BYTES = 1 << 10, 1 << 11, 3 << 11
# The processor's description of eight whole tiles: palette 1; bytes of a row from 16 on, rows from 48 on.
CONFIGURATION = bytes([1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[TILE] * 8, *[0] * 8])

_BYTE, _WORD, _LANE, _HALF = ir.IntType(8), ir.IntType(64), ir.IntType(32), ir.IntType(16)
_VECTOR, _LANES = ir.VectorType(ir.FloatType(), TILE), ir.VectorType(ir.IntType(32), TILE)
_HALVES = ir.VectorType(_HALF, 2 * TILE)
_ROUND, _UPPER = ir.Constant(_LANES, [0x8000] * TILE), ir.Constant(_LANES, [0xFFFF0000] * TILE)
# Of a number without its sign: from here on it is rounded to infinity, is that, or NaN.
_MAGNITUDE, _TOO_LARGE = ir.Constant(_LANES, [0x7FFFFFFF] * TILE), ir.Constant(_LANES, [0x7F7F8000] * TILE)
# (part of A, part of B), from small products to large; neighbours share a part, so that half of the loads are saved.
_PRODUCTS = ((0, 2), (0, 1), (1, 1), (1, 0), (2, 0), (0, 0))


def _instruction(builder: Any, name: str, *arguments: Any) -> None:
    name = f"llvm.x86.{name}"
    function = builder.module.globals.get(name)
    if function is None:
        kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
        function = ir.Function(builder.module, kind, name)
    builder.call(function, arguments)


def _pointer(builder: Any, address: Any, kind: Any = _BYTE) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


@intrinsic
def begin_tiles(context: Any, configuration: Any) -> Any:
    """Set this thread's tiles up as the 64 bytes at an address say."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _instruction(builder, "ldtilecfg", _pointer(builder, arguments[0]))
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def end_tiles(context: Any) -> Any:
    """Let go of them: a thread that has tiles costs the system 8 KB at every switch."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _instruction(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def prefetch_row(context: Any, address: Any) -> Any:
    """Have a row of a block of C, which will be written, brought to the cache."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        for line in range(0, 4 * BLOCK, 64):
            fetch_later(builder, _pointer(builder, builder.add(arguments[0], _WORD(line))), to_write=True)
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def tiles_product(context: Any, c: Any, c_down: Any, a: Any, b: Any, steps: Any) -> Any:
    """C (BLOCK × BLOCK) = A B from packed panels of `steps` > 0 steps."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        c, c_down, a, b, steps = arguments
        before, loop, end = builder.block, *(builder.append_basic_block(name) for name in ("loop", "end"))
        for tile in range(4):
            _instruction(builder, "tilezero", _BYTE(tile))
        builder.branch(loop)

        builder.position_at_end(loop)
        step = builder.phi(_WORD)
        step.add_incoming(_WORD(0), before)
        offset = builder.mul(step, _WORD(STEP_BYTES))
        held = [-1, -1]
        for product in _PRODUCTS:
            for side, (panel, first) in enumerate(((a, 4), (b, 6))):
                if held[side] == product[side]:
                    continue
                held[side] = product[side]
                for t in range(2):
                    at = builder.add(panel, _WORD(product[side] * PART_BYTES + t * TILE_BYTES))
                    at = _pointer(builder, builder.add(at, offset))
                    _instruction(builder, "tileloadd64", _BYTE(first + t), at, _WORD(64))
            for tile in range(4):
                _instruction(builder, "tdpbf16ps", _BYTE(tile), _BYTE(4 + tile // 2), _BYTE(6 + tile % 2))
        following = builder.add(step, _WORD(1))
        step.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, steps), loop, end)

        builder.position_at_end(end)
        for tile in range(4):
            at = builder.add(c, builder.add(builder.mul(c_down, _WORD(tile // 2 * TILE)), _WORD(tile % 2 * 4 * TILE)))
            _instruction(builder, "tilestored64", _BYTE(tile), _pointer(builder, at), c_down)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


def _parts(builder: Any, x: Any) -> tuple[list[Any], Any]:
    """x as a sum of three numbers of 8 bits each, as words whose upper half is the bfloat16; and which x have none."""
    magnitude = builder.and_(builder.bitcast(x, _LANES), _MAGNITUDE)
    without = builder.icmp_unsigned(">=", magnitude, _TOO_LARGE)
    parts = []
    for part in range(3):
        # Rounded to nearest, ties away from zero: what is left is exact and has 8 bits less.
        word = builder.and_(builder.add(builder.bitcast(x, _LANES), _ROUND), _UPPER)
        parts.append(word)
        if part < 2:
            x = builder.fsub(x, builder.bitcast(word, _VECTOR))
    return parts, without


def _split(pack: Any) -> Any:
    # target, first and second address of 16 floats -> whether one of them has no parts
    def typing(context: Any, target: Any, first: Any, second: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            target, *sources = arguments
            split = [_parts(builder, builder.load(_pointer(builder, s, _VECTOR), align=4)) for s in sources]
            for part, (first, second) in enumerate(zip(*(parts for parts, _ in split), strict=True)):
                to = builder.add(target, _WORD(part * PART_BYTES))
                word = pack(builder, first, second)
                builder.store(word, _pointer(builder, to, word.type), align=64)
            without = builder.bitcast(builder.or_(split[0][1], split[1][1]), _HALF)
            return builder.zext(without, _WORD)

        return types.int64(*[types.int64] * 3), generate

    return intrinsic(typing)


def _in_order(builder: Any, first: Any, second: Any) -> Any:
    upper = ir.Constant(ir.VectorType(_LANE, 2 * TILE), list(range(1, 4 * TILE, 2)))
    return builder.shuffle_vector(builder.bitcast(first, _HALVES), builder.bitcast(second, _HALVES), upper)


def _side_by_side(builder: Any, first: Any, second: Any) -> Any:
    return builder.or_(builder.lshr(first, ir.Constant(_LANES, [16] * TILE)), second)


# A row of a tile, its three parts PART_BYTES from each other, from 32 floats that follow each other along k ...
split_along = _split(_in_order)
# ... or from two times 16 that are neighbours along k.
split_across = _split(_side_by_side)

"""LLVM vectors for intrinsics: loads from 16- and 32-bit floats, sums of lanes, and fetching what is needed later."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .compilation import jit, jit_within
from .storage import element_pointer
from .tile_multiply import LANES

_INDEX = ir.IntType(32)
# Bytes that are fetched together.
LINE = 64


def load_vector(builder: Any, pointer: Any, kind: Any, lanes: int = LANES) -> Any:
    """So many elements as float32, a scalar if it is one: float32 themselves, bfloat16 (uint16) or float16 (int16), see
    storage.load."""

    def of(element: Any) -> Any:
        return ir.VectorType(element, lanes) if lanes > 1 else element

    if kind == types.float32:
        return builder.load(builder.bitcast(pointer, of(ir.FloatType()).as_pointer()), align=4)
    if kind == types.uint16:
        bits = builder.load(builder.bitcast(pointer, of(ir.IntType(16)).as_pointer()), align=2)
        sixteen = ir.Constant(of(_INDEX), [16] * lanes if lanes > 1 else 16)
        return builder.bitcast(builder.shl(builder.zext(bits, of(_INDEX)), sixteen), of(ir.FloatType()))
    halves = builder.load(builder.bitcast(pointer, of(ir.HalfType()).as_pointer()), align=2)
    return builder.fpext(halves, of(ir.FloatType()))


def spread(builder: Any, scalar: Any) -> Any:
    """A float32 in every lane."""
    undefined = ir.Constant(ir.VectorType(ir.FloatType(), LANES), ir.Undefined)
    return chosen(builder, builder.insert_element(undefined, scalar, _INDEX(0)), undefined, [0] * LANES)


def chosen(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """A vector of these lanes of a and, counted on, b."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INDEX, len(lanes)), lanes))


def lane_sums(builder: Any, vectors: list[Any]) -> Any:
    """A vector whose lane i is the sum of the lanes of vectors[i]; their number is a power of two, at most LANES.

    Each is summed by laying its halves onto each other, again and again: one order, however many stand side by side.
    """
    width = LANES
    while width > len(vectors):
        width //= 2
        low, high = list(range(width)), list(range(width, 2 * width))
        vectors = [builder.fadd(chosen(builder, v, v, low), chosen(builder, v, v, high)) for v in vectors]
    half = width // 2
    while len(vectors) > 1:
        # Halves of `half` lanes: the lower ones of two vectors by turns, and the upper ones.
        low = [lane + part * width for begin in range(0, width, 2 * half) for part in (0, 1)
               for lane in range(begin, begin + half)]  # fmt: skip
        high = [lane + half for lane in low]
        pairs = zip(vectors[: len(vectors) // 2], vectors[len(vectors) // 2 :], strict=True)
        vectors = [builder.fadd(chosen(builder, a, b, low), chosen(builder, a, b, high)) for a, b in pairs]
        half //= 2
    return vectors[0]


def fetch_later(builder: Any, pointer: Any, *, to_write: bool = False) -> None:
    """Begin to bring the cache line at this address closer; nothing waits for it, and a wrong address does no harm."""
    byte = ir.IntType(8).as_pointer()
    function = builder.module.declare_intrinsic(
        "llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, _INDEX, _INDEX, _INDEX])
    )
    builder.call(function, [builder.bitcast(pointer, byte), _INDEX(int(to_write)), _INDEX(3), _INDEX(1)])


@jit
def start_of(array: Any) -> Any:
    """The address of an array's first element, to be asked for outside of kernels: takes a sixth of the time of
    `array.ctypes.data`."""
    return array.ctypes.data


@intrinsic
def address_of(context: Any, array: Any, index: Any) -> Any:
    """The address of an element of a flat array, which may lie beyond its end."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = element_pointer(context, builder, signature.args[0], *arguments)
        return builder.ptrtoint(pointer, ir.IntType(64))

    return types.intp(array, types.intp), generate


def _fetching(to_write: bool) -> Any:
    def typing(context: Any, array: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = element_pointer(context, builder, signature.args[0], *arguments)
            fetch_later(builder, pointer, to_write=to_write)
            return context.get_dummy_value()

        return types.void(array, types.intp), generate

    return typing


# `fetch_later` for an element of a flat array, which may lie beyond its end; to be read, or written.
fetch, fetch_to_write = intrinsic(_fetching(False)), intrinsic(_fetching(True))


@jit_within
def fetch_row(array: Any, at: int, width: int) -> None:
    """Fetch the `width` elements from `at` on of a flat array."""
    for j in range(0, width, LINE // array.itemsize):
        fetch(array, at + j)

"""Load and store of 32- and 16-bit floats inside compiled kernels, which compute in float32.

A kernel is written once: `load(x, i)` and `store(y, i, value)` convert by the array's dtype. bfloat16 arrives as uint16
and float16 as int16 (see arrays.kernel_view). Stores round to nearest, ties to even. Indices are taken as unsigned:
numba's treatment of negative ones keeps loops from becoming vector code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload


@intrinsic
def bits_to_float32(context: Any, bits: Any) -> Any:
    """The float32 with these 32 bits (uint32 or int32)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    # Integer arithmetic widens to 64 bits in numba; the signature narrows it again.
    return types.float32(types.int32), generate


@intrinsic
def float32_to_bits(context: Any, value: Any) -> Any:
    """The 32 bits of a float32, as int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def _half_to_float32(context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), generate


@intrinsic
def _float32_to_half(context: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), generate


def element_pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """Inside an intrinsic: the address of an element of a flat array of type `kind`."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def load(array: Any, index: int) -> Any:
    """Element `index` of a flat kernel array, as float32 (compiled code only)."""
    raise TypeError("load is for compiled kernels; in Python use array[index]")


def store(array: Any, index: int, value: Any) -> None:
    """Round `value` to the array's dtype and write it (compiled code only)."""
    raise TypeError("store is for compiled kernels; in Python use array[index] = value")


@overload(load)
def _load(array: Any, index: Any) -> Any:
    def load_bfloat16(array: Any, index: Any) -> Any:
        return bits_to_float32(np.uint32(array[np.uintp(index)]) << np.uint32(16))

    def load_float16(array: Any, index: Any) -> Any:
        return _half_to_float32(array[np.uintp(index)])

    def load_plain(array: Any, index: Any) -> Any:
        return array[np.uintp(index)]

    return {types.uint16: load_bfloat16, types.int16: load_float16}.get(array.dtype, load_plain)


@overload(store)
def _store(array: Any, index: Any, value: Any) -> Any:
    def store_bfloat16(array: Any, index: Any, value: Any) -> None:
        bits = np.uint32(float32_to_bits(np.float32(value)))
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        array[np.uintp(index)] = np.uint16(rounded) if value == value else np.uint16(0x7FC0)

    def store_float16(array: Any, index: Any, value: Any) -> None:
        array[np.uintp(index)] = _float32_to_half(np.float32(value))

    def store_plain(array: Any, index: Any, value: Any) -> None:
        array[np.uintp(index)] = value

    return {types.uint16: store_bfloat16, types.int16: store_float16}.get(array.dtype, store_plain)

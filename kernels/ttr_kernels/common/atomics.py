"""Atomic operations on int64 arrays, and what a thread does while it waits, inside compiled kernels."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from llvmlite.binding import get_process_triple
from numba import types
from numba.extending import intrinsic

from .compilation import jit_within
from .storage import element_pointer

_WORD = ir.IntType(64)
# Looks between two offers of the core to other threads.
LOOKS = 64
# Lets others run where there are more threads than cores.
give_way = types.ExternalFunction("sched_yield", types.int32())


@intrinsic
def look(context: Any, array: Any, index: Any) -> Any:
    """The element; what was written before it was is seen, too."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(element_pointer(context, builder, signature.args[0], *arguments), "acquire", 8)

    return types.int64(array, types.intp), generate


@intrinsic
def publish(context: Any, array: Any, index: Any, value: Any) -> Any:
    """Write the element; who sees it sees all that was written before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = element_pointer(context, builder, signature.args[0], *arguments[:2])
        builder.store_atomic(arguments[2], pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.int64), generate


@intrinsic
def add_one(context: Any, array: Any, index: Any) -> Any:
    """Count the element up. -> what it was before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = element_pointer(context, builder, signature.args[0], *arguments)
        return builder.atomic_rmw("add", pointer, _WORD(1), "acq_rel")

    return types.int64(array, types.intp), generate


@intrinsic
def replace(context: Any, array: Any, index: Any, old: Any, new: Any) -> Any:
    """Write `new` if the element is `old`. -> whether it was."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = element_pointer(context, builder, signature.args[0], *arguments[:2])
        return builder.extract_value(builder.cmpxchg(pointer, *arguments[2:], "acq_rel", "acquire"), 1)

    return types.boolean(array, types.intp, types.int64, types.int64), generate


@intrinsic
def pause(context: Any) -> Any:
    """Some tens of cycles in which this thread leaves the core's units to others."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if get_process_triple().startswith("x86_64"):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(builder.module.declare_intrinsic("llvm.x86.sse2.pause", [], kind), [])
        return context.get_dummy_value()

    return types.void(), generate


@jit_within
def wait_for(array: Any, index: int, least: int) -> None:
    """Until the element is at least so large."""
    looks = 0
    while look(array, index) < least:
        looks += 1
        pause()
        if looks % LOOKS == 0:
            give_way()

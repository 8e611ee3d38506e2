"""A compiled kernel's ranges on several threads, handed out and awaited without Python.

Python would take its lock in every thread twice for each call of a kernel, and a thread that sleeps takes some 50 µs to
wake. Here a thread that has nothing to do looks at a *board* for a while, takes a range of what is announced there, and
only then sleeps. Who announces works, too, and waits for ranges that were taken, never for a thread: one that is late
costs speed alone.

An announcement has a number. TICKET holds it and, in its lower half, the next range; a thread takes a range by counting
TICKET up from what it has seen, so that it cannot take one of an announcement whose arguments it does not know.
"""

from __future__ import annotations

import types as python_types
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, targetconfig
from numba.core.compiler import compile_internal
from numba.core.typing import signature as signature_of
from numba.extending import intrinsic

from .arrays import Array
from .atomics import LOOKS, add_one, give_way, look, pause, publish, replace, wait_for
from .compilation import jit, jit_within

# Words of the board, 64 bytes apart where one is written while others are read.
_TICKET, _DONE, _FAILED, _ENTRY, _PLACE, _COUNT, _PARTS, _THREADS = 0, 8, 9, 16, 17, 18, 19, 20
_BOARD = 24
_RANGE = 0xFFFFFFFF
_BYTES, _WORD = ir.IntType(8).as_pointer(), ir.IntType(64)
_ENTRY_POINT = ir.FunctionType(ir.IntType(32), [_BYTES, _WORD, _WORD, _WORD])


def new_board() -> Array:
    """A board on which nothing is announced."""
    raw = np.zeros(_BOARD + 8, np.int64)
    skip = -raw.ctypes.data % 64 // 8
    return raw[skip : skip + _BOARD]


def jit_ranges(function: Callable[..., Any]) -> Any:
    """Compile a kernel `function(*arguments, begin, end)`, whose last two are a range, for `parallel_for`.

    What is compiled is `launch(board, threads, count, parts, *arguments)`: [0, count) in so many ranges, on the calling
    thread and those that serve the board, so many in all. -> 0, or the number of a failure.
    """
    return _launcher(function, with_slot=False)


def jit_ranges_with_slot(function: Callable[..., Any]) -> Any:
    """`jit_ranges` for a kernel `function(*arguments, slot, begin, end)`: slots of threads that run at the same time
    differ; that of the calling one is 0."""
    return _launcher(function, with_slot=True)


def _launcher(function: Callable[..., Any], with_slot: bool) -> Any:
    # numba keeps what it compiled by the function's place: each launcher stands in the place of its kernel.
    code = _launch.__code__.replace(
        co_filename=function.__code__.co_filename,
        co_firstlineno=function.__code__.co_firstlineno,
        co_name=function.__name__,
    )
    known = {"_entry": _entry_of(function, with_slot), "_place": _place, "_run": _run, "__name__": function.__module__}
    launch = python_types.FunctionType(code, known, function.__name__)
    launch.__qualname__, launch.__module__, launch.__doc__ = (
        function.__qualname__, function.__module__, function.__doc__,
    )  # fmt: skip
    launcher = jit(launch)
    # This also tells a launcher from a function of Python.
    launcher.kernel = function
    return launcher


def _launch(board: Any, threads: int, count: int, parts: int, *arguments: Any) -> Any:
    return _run(board, threads, count, parts, _entry(arguments), _place(arguments))  # type: ignore[name-defined]  # noqa: F821


def _entry_of(function: Callable[..., Any], with_slot: bool) -> Any:
    """An intrinsic for the address of a function (place, slot, begin, end) that calls the kernel."""

    def typing(context: Any, arguments: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            (arguments,) = signature.args
            numbers = (types.intp,) * (3 if with_slot else 2)
            inner = signature_of(types.none, *arguments.types, *numbers)
            # With the options of this launcher, and into its library: optimised once, together.
            flags = targetconfig.ConfigStack().top().copy()
            flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
            library = context.active_code_library
            compiled = compile_internal(
                context.typing_context, context, library, function, inner.args, inner.return_type, flags, {}
            )
            entry = ir.Function(builder.module, _ENTRY_POINT, builder.module.get_unique_name("entry"))
            entry.linkage = "internal"
            place, *rest = entry.args
            within = ir.IRBuilder(entry.append_basic_block())
            kept = within.load(within.bitcast(place, context.get_value_type(arguments).as_pointer()))
            given = [*cgutils.unpack_tuple(within, kept), *(rest if with_slot else rest[1:])]
            status, _ = context.call_internal_no_propagate(within, compiled.fndesc, inner, given)
            within.ret(status.code)
            return builder.ptrtoint(entry, _WORD)

        return types.int64(arguments), generate

    return intrinsic(typing)


@intrinsic
def _place(context: Any, arguments: Any) -> Any:
    """The address at which the arguments lie until the calling function returns."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.ptrtoint(cgutils.alloca_once_value(builder, values[0]), _WORD)

    return types.int64(arguments), generate


@intrinsic
def _call(context: Any, entry: Any, place: Any, slot: Any, begin: Any, end: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        entry, place, *rest = values
        function = builder.inttoptr(entry, _ENTRY_POINT.as_pointer())
        return builder.call(function, [builder.inttoptr(place, _BYTES), *rest])

    return types.int32(*(types.int64,) * 5), generate


@jit_within
def _run(board: Any, threads: int, count: int, parts: int, entry: int, place: int) -> Any:
    """The kernel's ranges on this and all threads that serve the board."""
    if parts <= 1:
        return _call(entry, place, 0, 0, count)
    _take_ranges(board, _announce(board, entry, place, count, parts, threads), 0)
    wait_for(board, _DONE, parts)
    return look(board, _FAILED)


@jit_within
def _announce(board: Any, entry: int, place: int, count: int, parts: int, threads: int) -> Any:
    """-> the announcement's number."""
    # All ranges of the one before have been done: nobody goes by these until TICKET tells of them.
    publish(board, _ENTRY, entry)
    publish(board, _PLACE, place)
    publish(board, _COUNT, count)
    publish(board, _PARTS, parts)
    publish(board, _THREADS, threads)
    publish(board, _DONE, 0)
    publish(board, _FAILED, 0)
    ticket = ((look(board, _TICKET) >> 32) + 1) << 32
    publish(board, _TICKET, ticket)
    return ticket >> 32


@jit_within
def _take_ranges(board: Any, number: int, slot: int) -> None:
    """Ranges of this announcement, until there are none."""
    while True:
        ticket = look(board, _TICKET)
        entry, place, count, parts = look(board, _ENTRY), look(board, _PLACE), look(board, _COUNT), look(board, _PARTS)
        index = ticket & _RANGE
        if ticket >> 32 != number or index >= parts or slot >= look(board, _THREADS):
            return
        if not replace(board, _TICKET, ticket, ticket + 1):
            continue
        status = _call(entry, place, slot, count * index // parts, count * (index + 1) // parts)
        if status != 0:
            publish(board, _FAILED, status)
        add_one(board, _DONE)


@jit
def serve(board: Any, slot: int, seen: int, patience: int) -> Any:
    """Take ranges of all announcements after number `seen`, until there has been none for so many looks, or one is not
    for compiled code. -> the number of the last, and which of both it was: True for none."""
    looks = 0
    while looks < patience:
        number = look(board, _TICKET) >> 32
        if number != seen:
            seen = number
            if look(board, _ENTRY) == 0:
                return seen, False
            _take_ranges(board, number, slot)
            if slot < look(board, _THREADS):
                looks = 0
        looks += 1
        pause()
        if looks % LOOKS == 0:
            give_way()
    return seen, True


@jit
def announce_other(board: Any) -> None:
    """Announce something that is not for compiled code: threads that look at the board return from `serve`."""
    _announce(board, 0, 0, 0, 0, 0)


@jit
def announced(board: Any) -> Any:
    """The number of the last announcement."""
    return look(board, _TICKET) >> 32

"""Where the time of operations goes: every public operation called meanwhile is timed, nested ones apart.

    with profiled() as profiler:
        ...
    for call in profiler.calls: print(call.name, call.own_seconds)

Operations that are not profiled pay for one comparison.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@dataclasses.dataclass
class Call:
    """One call of a public operation.

    Attributes:
        name: of the function.
        begin, end: seconds of time.perf_counter.
        depth: how many profiled calls it is inside of.
        bytes: of the arrays that it was given and that it returned, each memory counted once.
        shapes: of the arrays among its arguments.
        nested_seconds: of the profiled calls inside it.
    """

    name: str
    begin: float
    end: float
    depth: int
    bytes: int
    shapes: tuple[tuple[int, ...], ...]
    arguments: tuple[Any, ...] = dataclasses.field(repr=False)
    result: Any = dataclasses.field(repr=False)
    nested_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """From begin to end."""
        return self.end - self.begin

    @property
    def own_seconds(self) -> float:
        """Without the profiled calls inside it."""
        return self.seconds - self.nested_seconds


class Profiler:
    """Collects the calls of one thread.

    Args:
        describe: called with each call as it ends, before its arguments are let go; what it returns is kept in
            `described` beside the call.
        synchronize: waits for the device, so that a call's time is that of its work (on a GPU).
    """

    def __init__(
        self, describe: Callable[[Call], Any] | None = None, synchronize: Callable[[], None] | None = None
    ) -> None:
        self.calls: list[Call] = []
        self.described: list[Any] = []
        self._describe, self._synchronize = describe, synchronize
        self._thread = threading.get_ident()
        self._open: list[float] = []  # of each open call: seconds of the calls inside it

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the function; its time is noted if this is the profiler's thread."""
        if threading.get_ident() != self._thread:
            return function(*args, **kwargs)
        self._open.append(0.0)
        begin = time.perf_counter()
        try:
            result = function(*args, **kwargs)
            if self._synchronize is not None:
                self._synchronize()
        finally:
            end = time.perf_counter()
            nested = self._open.pop()
            if self._open:
                self._open[-1] += end - begin
        given = (*args, *kwargs.values())
        arrays = list(_arrays((given, result)))
        shapes = tuple(array.shape for array in _arrays(given))
        size = sum({_address(array): array.nbytes for array in arrays}.values())
        call = Call(function.__name__, begin, end, len(self._open), size, shapes, given, result, nested)
        self.described.append(None if self._describe is None else self._describe(call))
        # Activations must not live on in the profile.
        call.arguments, call.result = (), None
        self.calls.append(call)
        return result


active: Profiler | None = None


@contextmanager
def profiled(
    describe: Callable[[Call], Any] | None = None, synchronize: Callable[[], None] | None = None
) -> Iterator[Profiler]:
    """Profile this thread's operations while it lasts."""
    global active
    before, active = active, Profiler(describe, synchronize)
    try:
        yield active
    finally:
        active = before


def _arrays(value: Any) -> Iterator[Any]:
    """The arrays in a value: itself, or those in a tuple, list or dataclass, to any depth."""
    if isinstance(value, type):
        return  # a dtype, as NumPy's scalar types are given for one
    if hasattr(value, "nbytes") and hasattr(value, "shape"):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _arrays(part)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _arrays(getattr(value, field.name))


def _address(array: Any) -> Any:
    interface = getattr(array, "__array_interface__", None) or getattr(array, "__cuda_array_interface__", None)
    return interface["data"][0] if interface else id(array)

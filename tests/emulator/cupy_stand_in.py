"""A stand-in for CuPy, so that all of the package's GPU path runs where there is no GPU.

Its arrays live in NumPy memory and its kernels run on the emulator, but it behaves as CuPy does where that matters:
NumPy's functions do not take its arrays, its functions do not take NumPy arrays, nothing is converted silently, and
what would make the host wait for the GPU is counted. It has no function that CuPy lacks (see test_cupy_stand_in.py).

Capture into a graph: between `begin_capture` and `end_capture` nothing is computed. What is asked for is kept, arrays
by their addresses and all else by value, and `Graph.launch` does it. Allocations that no allocator serves, copies from
or to the host and waits are refused; so is the launch of a graph some of whose memory is gone.

    with cupy_stand_in.installed(EmulatorExecutor("plain")) as cupy:
        y = rms_norm(cupy.asarray(x), cupy.asarray(weight))
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import captured_work
import numpy as np
from captured_work import (
    MemoryPointer,
    UnownedMemory,
    alloc,
    allocated,
    computed,
    do,
    is_capturing,
    pool_malloc,
    refuse,
    using_allocator,
)
from emulator import EmulatorExecutor

from ttr_kernels.common.cuda import launch
from ttr_kernels.common.cuda.gemm import Gemm

# Functions of NumPy that CuPy has under the same name and with the same meaning.
FUNCTIONS = [
    "abs",
    "add",
    "all",
    "any",
    "arange",
    "argmax",
    "argsort",
    "ascontiguousarray",
    "bincount",
    "broadcast_arrays",
    "broadcast_to",
    "clip",
    "concatenate",
    "copyto",
    "cos",
    "cumsum",
    "diff",
    "divide",
    "empty",
    "empty_like",
    "exp",
    "expm1",
    "flatnonzero",
    "floor",
    "fmax",
    "fmin",
    "full",
    "full_like",
    "greater",
    "greater_equal",
    "isfinite",
    "isnan",
    "log",
    "log1p",
    "log2",
    "logaddexp",
    "logical_not",
    "max",
    "maximum",
    "mean",
    "min",
    "minimum",
    "mod",
    "multiply",
    "negative",
    "nonzero",
    "ones",
    "ones_like",
    "power",
    "prod",
    "repeat",
    "rint",
    "searchsorted",
    "sign",
    "sin",
    "split",
    "sqrt",
    "square",
    "stack",
    "subtract",
    "sum",
    "take",
    "take_along_axis",
    "tanh",
    "unique",
    "where",
    "zeros",
    "zeros_like",
]
# What is passed on to NumPy's method: views and results are wrapped again.
METHODS = [
    "all",
    "any",
    "argmax",
    "argmin",
    "argsort",
    "astype",
    "clip",
    "copy",
    "cumsum",
    "dot",
    "fill",
    "max",
    "mean",
    "min",
    "nonzero",
    "prod",
    "ravel",
    "repeat",
    "reshape",
    "sort",
    "squeeze",
    "sum",
    "swapaxes",
    "take",
    "transpose",
    "view",
]
# Sizes of these results depend on values: CuPy waits for them.
_WAITING = {"flatnonzero", "nonzero", "unique", "bincount"}
_IN_PLACE = {"copyto", "fill", "sort"}
_PASSED_ON = ("dtype", "itemsize", "nbytes", "ndim", "shape", "size", "strides")
_DEVICE = SimpleNamespace(id=0)


class Event:
    """A place in a stream's work."""

    def __init__(self, stream: Stream) -> None:
        refuse("an event is recorded")
        self._stream, self._at = stream, stream.finished + len(stream.work)

    @property
    def done(self) -> bool:
        return self._stream.finished >= self._at

    def reach(self) -> None:
        """Let the stream do what comes before."""
        while not self.done:
            self._stream.work.pop(0)()
            self._stream.finished += 1

    def synchronize(self) -> None:
        _wait()
        self.reach()


class Stream:
    """Copies in order, as late as they may be: when something waits for an event behind them. What does not wait finds
    memory as it was, and what overwrites the source of a copy too early spoils it. Kernels are done at once."""

    def __init__(self, non_blocking: bool = False) -> None:
        self.ptr = id(self)
        self.work: list[Callable[[], None]] = []
        self.finished = 0

    def __enter__(self) -> Stream:
        _streams.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _streams.pop()

    def begin_capture(self) -> None:
        if self is _streams[0]:
            raise RuntimeError("cudaErrorStreamCaptureUnsupported (stand-in): the default stream cannot be captured")
        captured_work.begin_capture()

    def end_capture(self) -> captured_work.Graph:
        return captured_work.end_capture()

    def record(self) -> Event:
        return Event(self)

    def wait_event(self, event: Event) -> None:
        refuse("an event is waited for")
        event.reach()

    def synchronize(self) -> None:
        self.record().synchronize()


_streams = [Stream()]
waits = 0  # how often the host would have waited for the GPU


def _wait() -> None:
    global waits
    refuse("the host waits for the GPU")
    waits += 1


class ndarray:
    """An array on the stand-in's GPU."""

    __array_ufunc__ = None  # NumPy's functions and operators leave it alone
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, host: Any, dtype: Any = None, memptr: MemoryPointer | None = None) -> None:
        """Around a NumPy array, or as CuPy makes one: of a shape and dtype, at a pointer."""
        self.host = host if memptr is None else memptr.array(host, np.dtype(dtype))

    def __getattr__(self, name: str) -> Any:
        if name in _PASSED_ON:
            return getattr(self.host, name)
        if name in METHODS:
            if name == "nonzero":
                _wait()
            method = getattr(np.ndarray, name)
            if name in _IN_PLACE:
                return lambda *args, **kwargs: do(method, self.host, *_unwrap(args), **_unwrap(kwargs))
            return lambda *args, **kwargs: _wrap(computed(method, self.host, *_unwrap(args), **_unwrap(kwargs)))
        raise AttributeError(f"cupy.ndarray (stand-in) has no attribute {name!r}")

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    @property
    def T(self) -> ndarray:
        return ndarray(self.host.T)

    @property
    def flags(self) -> SimpleNamespace:
        flags = self.host.flags
        return SimpleNamespace(c_contiguous=flags.c_contiguous, f_contiguous=flags.f_contiguous, owndata=flags.owndata)

    @property
    def data(self) -> SimpleNamespace:
        return SimpleNamespace(ptr=self.host.ctypes.data)

    @property
    def device(self) -> SimpleNamespace:
        return _DEVICE

    @property
    def base(self) -> ndarray | None:
        return None if self.host.base is None else ndarray(self.host.base)

    def get(self, out: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, Any]:
        _wait()
        if out is None:
            return self.host.copy()
        if not isinstance(out, np.ndarray) or out.shape != self.shape or out.dtype != self.dtype:
            raise TypeError("get: expected a NumPy array of this shape and dtype")
        if not out.flags.c_contiguous:
            raise ValueError("get: expected a C-contiguous array")
        out[...] = self.host
        return out

    def set(self, values: np.ndarray[Any, Any], stream: Stream | None = None) -> None:
        if not isinstance(values, np.ndarray) or values.shape != self.shape or values.dtype != self.dtype:
            raise TypeError("set: expected a NumPy array of this shape and dtype")
        refuse("memory of the host is copied")
        if stream is not None and stream is not _streams[0]:
            stream.work.append(lambda: np.copyto(self.host, values))
            return
        self.host[...] = values

    def item(self) -> Any:
        _wait()
        return self.host.item()

    def tobytes(self) -> bytes:
        _wait()
        return self.host.tobytes()

    def __len__(self) -> int:
        return len(self.host)

    def __iter__(self) -> Iterator[ndarray]:
        return (self[i] for i in range(len(self)))

    def __bool__(self) -> bool:
        _wait()
        return bool(self.host)

    def __int__(self) -> int:
        _wait()
        return int(self.host)

    def __float__(self) -> float:
        _wait()
        return float(self.host)

    def __getitem__(self, index: Any) -> ndarray:
        return _wrap(computed(operator.getitem, self.host, self._index(index)))

    def __setitem__(self, index: Any, value: Any) -> None:
        # CuPy takes a NumPy array on the right only from `[...]` on, through `set`; it is not relied on.
        do(operator.setitem, self.host, self._index(index), _unwrap(value))

    def _index(self, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        for part in parts:
            if isinstance(part, ndarray) and part.dtype == bool:
                _wait()
        # One element is a view, too: CuPy has no scalars.
        return _unwrap(parts if any(part is Ellipsis for part in parts) else (*parts, ...))

    def __repr__(self) -> str:
        return f"cupy stand-in {self.host!r}"


ndarray.__module__ = "cupy"


def _binary(name: str, reflected: bool = False) -> Callable[..., Any]:
    function = getattr(operator, name)

    def method(self: ndarray, other: Any) -> Any:
        sides = (_unwrap(other), self.host) if reflected else (self.host, _unwrap(other))
        return _wrap(computed(function, *sides))

    return method


def _unary(name: str) -> Callable[..., Any]:
    function = getattr(operator, name)
    return lambda self: _wrap(computed(function, self.host))


def _in_place(name: str) -> Callable[..., Any]:
    def method(self: ndarray, other: Any) -> ndarray:
        do(getattr(operator, name), self.host, _unwrap(other))
        return self

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor"):
    _plain = _name.rstrip("_")
    setattr(ndarray, f"__{_plain}__", _binary(_name))
    setattr(ndarray, f"__r{_plain}__", _binary(_name, reflected=True))
    setattr(ndarray, f"__i{_plain}__", _in_place(f"i{_plain}"))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(ndarray, f"__{_name}__", _binary(_name))
for _name in ("neg", "invert", "abs"):
    setattr(ndarray, f"__{_name}__", _unary(_name))


def _wrap(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return ndarray(value)
    if isinstance(value, np.generic):
        # CuPy has no scalars: reductions give arrays of shape ().
        return ndarray(np.asarray(value))
    if isinstance(value, (tuple, list)):
        return type(value)(_wrap(part) for part in value)
    return value


def _unwrap(value: Any) -> Any:
    if isinstance(value, ndarray):
        return value.host
    if isinstance(value, np.ndarray) and value.ndim:
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    if isinstance(value, dict):
        return {name: _unwrap(part) for name, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_unwrap(part) for part in value)
    return value


def _function(name: str) -> Callable[..., Any]:
    numpy_function = getattr(np, name)

    def function(*args: Any, **kwargs: Any) -> Any:
        if name in _WAITING:
            _wait()
        if name in ("concatenate", "stack"):  # CuPy's kernel reads the arrays' addresses from a copy of a list
            refuse("memory of the host is copied")
        if name in _IN_PLACE:
            return do(numpy_function, *_unwrap(args), **_unwrap(kwargs))
        if name in ("empty", "empty_like"):
            result = allocated(numpy_function(*_unwrap(args), **_unwrap(kwargs)))
            if result.dtype.kind not in "iub" and not is_capturing():
                result.fill(np.nan)  # what nobody writes shows
            return ndarray(result)
        return _wrap(computed(numpy_function, *_unwrap(args), **_unwrap(kwargs)))

    return function


def _asarray(value: Any, dtype: Any = None) -> ndarray:
    if isinstance(value, ndarray):
        return value if dtype in (None, value.dtype) else value.astype(dtype)
    refuse("memory of the host is copied")
    given = np.array(value, dtype)
    made = allocated(given)
    made[...] = given
    return ndarray(made)


def _asnumpy(value: Any) -> np.ndarray[Any, Any]:
    return value.get() if isinstance(value, ndarray) else np.asarray(value)


def _module() -> ModuleType:
    module = ModuleType("cupy")
    for name in FUNCTIONS:
        setattr(module, name, _function(name))
    module.ndarray, module.asarray, module.array, module.asnumpy = ndarray, _asarray, _asarray, _asnumpy  # type: ignore[attr-defined]
    module.float32, module.float64, module.int32, module.int64 = np.float32, np.float64, np.int32, np.int64  # type: ignore[attr-defined]
    module.cuda = SimpleNamespace(  # type: ignore[attr-defined]
        alloc=alloc, MemoryPointer=MemoryPointer, UnownedMemory=UnownedMemory,
        get_current_stream=lambda: _streams[-1], Stream=Stream, alloc_pinned_memory=bytearray,
        using_allocator=using_allocator,
        runtime=SimpleNamespace(
            getDevice=lambda: 0, getDeviceCount=lambda: 1, memGetInfo=lambda: (64 << 30, 80 << 30),
            runtimeGetVersion=lambda: 13000, driverGetVersion=lambda: 13000,
            getDeviceProperties=lambda _: {"name": b"stand-in"},
        ),
        Device=lambda *_: SimpleNamespace(id=0, compute_capability="90", attributes={"MultiProcessorCount": 2}),
    )  # fmt: skip
    pool = SimpleNamespace(used_bytes=lambda: 0, total_bytes=lambda: 0, malloc=pool_malloc)
    module.get_default_memory_pool = lambda: pool  # type: ignore[attr-defined]
    module.__version__ = "0 (stand-in)"
    return module


class _Executor:
    """Runs kernels on the arrays' memory."""

    def __init__(self, emulator: EmulatorExecutor, cupy: ModuleType) -> None:
        self.emulator, self.array_module, self.multiprocessors = emulator, cupy, emulator.multiprocessors

    def function(self, kernel: launch.Kernel) -> Callable[..., None]:
        run = self.emulator.function(kernel)

        def launched(
            grid: Sequence[int], block: Sequence[int], arguments: Sequence[Any], shared_bytes: int = 0
        ) -> None:
            if any(isinstance(argument, np.ndarray) for argument in arguments):
                raise TypeError(f"{kernel}: got a NumPy array, which is not in the GPU's memory")
            hosts = [a.host if isinstance(a, ndarray) else a for a in arguments]
            do(lambda *arguments: run(grid, block, arguments, shared_bytes), *hosts)

        return launched

    def multiply(self, gemm: Gemm) -> None:
        hosts: Any = gemm.a.host, gemm.b.host, gemm.c.host  # type: ignore[attr-defined]
        plain = gemm._replace(a=None, b=None, c=None)  # type: ignore[arg-type]
        do(lambda a, b, c: self.emulator.multiply(plain._replace(a=a, b=b, c=c)), *hosts)


@contextmanager
def installed(emulator: EmulatorExecutor) -> Iterator[Any]:
    """While it lasts, `cupy` is the stand-in, and its kernels run on `emulator`."""
    cupy = _module()
    executor = _Executor(emulator, cupy)
    # mock.patch.dict would also forget whatever is imported for the first time meanwhile.
    before = sys.modules.get("cupy")
    sys.modules["cupy"] = cupy
    try:
        with (
            mock.patch.object(launch, "_cupy_executor", return_value=executor),
            mock.patch.object(launch, "_scratch", launch._Scratch()),
        ):
            yield cupy
    finally:
        if before is None:
            del sys.modules["cupy"]
        else:
            sys.modules["cupy"] = before

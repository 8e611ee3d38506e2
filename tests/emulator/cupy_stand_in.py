"""A stand-in for CuPy, so that all of the package's GPU path runs where there is no GPU.

Its arrays live in NumPy memory and its kernels run on the emulator, but it behaves as CuPy does where that matters:
NumPy's functions do not take its arrays, its functions do not take NumPy arrays, nothing is converted silently, and
what would make the host wait for the GPU is counted. It has no function that CuPy lacks (see test_cupy_stand_in.py).

    with cupy_stand_in.installed(EmulatorExecutor("plain")) as cupy:
        y = rms_norm(cupy.asarray(x), cupy.asarray(weight))
"""

from __future__ import annotations

import ctypes
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
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
_PASSED_ON = ("dtype", "itemsize", "nbytes", "ndim", "shape", "size", "strides")
_DEVICE = SimpleNamespace(id=0)


class UnownedMemory:
    """Memory that belongs to `owner`, which it keeps alive."""

    def __init__(self, ptr: int, size: int, owner: Any, device_id: int = -1) -> None:
        self.ptr, self.size, self.owner = ptr, size, owner


class MemoryPointer:
    """A place in memory, which it keeps alive."""

    def __init__(self, mem: UnownedMemory, offset: int) -> None:
        self.mem, self.ptr = mem, mem.ptr + offset

    def array(self, shape: Any, dtype: Any) -> np.ndarray[Any, Any]:
        size = dtype.itemsize * int(np.prod(shape))
        assert self.ptr + size <= self.mem.ptr + self.mem.size, "beyond the memory"
        buffer = (ctypes.c_char * size).from_address(self.ptr)
        buffer.memory = self.mem  # type: ignore[attr-defined]
        return np.ndarray(shape, dtype, buffer)


def _alloc(size: int) -> MemoryPointer:
    block = np.empty(size, np.uint8)
    return MemoryPointer(UnownedMemory(block.ctypes.data, size, block), 0)


class Event:
    """A place in a stream's work."""

    def __init__(self, stream: Stream) -> None:
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

    def record(self) -> Event:
        return Event(self)

    def wait_event(self, event: Event) -> None:
        event.reach()

    def synchronize(self) -> None:
        self.record().synchronize()


_current = Stream()
waits = 0  # how often the host would have waited for the GPU


def _wait() -> None:
    global waits
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
            return lambda *args, **kwargs: _wrap(getattr(self.host, name)(*_unwrap(args), **_unwrap(kwargs)))
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
        if stream is not None:
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
        return _wrap(self.host[self._index(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        # CuPy takes a NumPy array on the right only from `[...]` on, through `set`; it is not relied on.
        self.host[self._index(index)] = _unwrap(value)

    def _index(self, index: Any) -> Any:
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, ndarray) and part.dtype == bool:
                _wait()
        return _unwrap(index)

    def __repr__(self) -> str:
        return f"cupy stand-in {self.host!r}"


ndarray.__module__ = "cupy"


def _binary(name: str, reflected: bool = False) -> Callable[..., Any]:
    function = getattr(operator, name)

    def method(self: ndarray, other: Any) -> Any:
        sides = (_unwrap(other), self.host) if reflected else (self.host, _unwrap(other))
        return _wrap(function(*sides))

    return method


def _unary(name: str) -> Callable[..., Any]:
    function = getattr(operator, name)
    return lambda self: _wrap(function(self.host))


def _in_place(name: str) -> Callable[..., Any]:
    def method(self: ndarray, other: Any) -> ndarray:
        getattr(operator, name)(self.host, _unwrap(other))
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
        result = numpy_function(*_unwrap(args), **_unwrap(kwargs))
        if name in ("empty", "empty_like") and result.dtype.kind not in "iub":
            result.fill(np.nan)  # what nobody writes shows
        return _wrap(result)

    return function


def _asarray(value: Any, dtype: Any = None) -> ndarray:
    if isinstance(value, ndarray):
        return ndarray(value.host.astype(dtype or value.dtype, copy=False))
    return ndarray(np.array(value, dtype))


def _asnumpy(value: Any) -> np.ndarray[Any, Any]:
    return value.get() if isinstance(value, ndarray) else np.asarray(value)


def _module() -> ModuleType:
    module = ModuleType("cupy")
    for name in FUNCTIONS:
        setattr(module, name, _function(name))
    module.ndarray, module.asarray, module.array, module.asnumpy = ndarray, _asarray, _asarray, _asnumpy  # type: ignore[attr-defined]
    module.float32, module.float64, module.int32, module.int64 = np.float32, np.float64, np.int32, np.int64  # type: ignore[attr-defined]
    module.cuda = SimpleNamespace(  # type: ignore[attr-defined]
        alloc=_alloc, MemoryPointer=MemoryPointer, UnownedMemory=UnownedMemory,
        get_current_stream=lambda: _current, Stream=Stream, alloc_pinned_memory=bytearray,
        runtime=SimpleNamespace(
            getDevice=lambda: 0, getDeviceCount=lambda: 1, memGetInfo=lambda: (64 << 30, 80 << 30),
            runtimeGetVersion=lambda: 13000, driverGetVersion=lambda: 13000,
            getDeviceProperties=lambda _: {"name": b"stand-in"},
        ),
        Device=lambda *_: SimpleNamespace(id=0, compute_capability="90", attributes={"MultiProcessorCount": 2}),
    )  # fmt: skip
    module.get_default_memory_pool = lambda: SimpleNamespace(used_bytes=lambda: 0, total_bytes=lambda: 0)  # type: ignore[attr-defined]
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
            run(grid, block, [a.host if isinstance(a, ndarray) else a for a in arguments], shared_bytes)

        return launched

    def multiply(self, gemm: Gemm) -> None:
        self.emulator.multiply(gemm._replace(a=gemm.a.host, b=gemm.b.host, c=gemm.c.host))  # type: ignore[attr-defined]


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

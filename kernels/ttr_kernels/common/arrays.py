"""Array checks, the choice of implementation, and the flat views that compiled kernels work on.

NumPy arrays are computed on the CPU, CuPy arrays on their GPU. An array's kind is told by its type's module:
nothing here imports CuPy, which is loaded already if there is an array of its own.
"""

from __future__ import annotations

import functools
import importlib
import math
import sys
from collections.abc import Callable, Collection
from types import ModuleType
from typing import Any, ParamSpec, TypeAlias, TypeVar

import ml_dtypes
import numpy as np
import numpy.typing as npt

from . import arena, profiling

Array: TypeAlias = npt.NDArray[Any]
DType: TypeAlias = np.dtype[Any]

BFLOAT16: DType = np.dtype(ml_dtypes.bfloat16)
FLOAT16: DType = np.dtype(np.float16)
FLOAT32: DType = np.dtype(np.float32)
FLOAT64: DType = np.dtype(np.float64)
INT32: DType = np.dtype(np.int32)
INT64: DType = np.dtype(np.int64)

FLOATS = (FLOAT32, BFLOAT16, FLOAT16, FLOAT64)
INTEGERS = (INT32, INT64)

# Bytes from which on all threads fill an array with zeros.
_LARGE = 1 << 20

# The version that NumPy arrays run; a test that executes GPU kernels on the host says "gpu" (see cuda/launch.py).
numpy_version = "cpu"


def check(**arguments: tuple[Any, str] | tuple[Any, str, Collection[DType]]) -> dict[str, int]:
    """Check kinds, shapes and dtypes of named arrays, and return the sizes of the named dimensions.

    Each argument is `name=(array, "B T C")` or `name=(array, "B T C", dtypes)`. A dimension is a name (equal names must
    have equal sizes, over all arguments), a number, or a leading `...` that matches any dimensions. The default dtypes
    are the floating-point ones. Arrays that are None are passed over.

    Raises:
        TypeError: an argument is no array, is of another kind than the first, or its dtype is not allowed.
        ValueError: a shape does not fit, or an array is on another GPU than the first; the message names the argument,
            what was got and what was expected.
    """
    sizes: dict[str, int] = {}
    first_name, first = "", None
    for name, given in arguments.items():
        array, pattern = given[0], given[1]
        if array is None:
            continue
        if first is None:
            if not is_array(array):
                expected = "numpy.ndarray (convert with numpy.asarray) or cupy.ndarray"
                raise TypeError(f"{name}: got {_kind_name(array)}, expected {expected}")
            first_name, first = name, array
        else:
            _check_same_kind(name, array, first_name, first)
        dtypes = given[2] if len(given) == 3 else FLOATS
        if array.dtype not in dtypes:
            raise TypeError(f"{name}: got dtype {array.dtype}, expected {' or '.join(str(d) for d in dtypes)}")
        named = _named_sizes(pattern, array.shape)
        fits = named is not None
        for dim, size in named or ():
            fits = fits and sizes.setdefault(dim, size) == size
        if not fits:
            known = ", ".join(f"{dim}={sizes[dim]}" for dim in pattern.split() if dim in sizes)
            raise ValueError(
                f"{name}: got shape {array.shape}, expected ({', '.join(pattern.split())})"
                + (f" with {known}" if known else "")
            )
    return sizes


@functools.lru_cache(maxsize=4096)
def _named_sizes(pattern: str, shape: tuple[int, ...]) -> tuple[tuple[str, int], ...] | None:
    """The named dimensions of a pattern with their sizes in a shape; None if it has other dimensions."""
    dims = pattern.split()
    if dims[:1] == ["..."]:
        dims = dims[1:]
        shape = shape[max(len(shape) - len(dims), 0) :]
    pairs = list(zip(dims, shape, strict=False))
    if len(dims) != len(shape) or any(dim.isdigit() and int(dim) != size for dim, size in pairs):
        return None
    return tuple(pair for pair in pairs if not pair[0].isdigit())


def check_out(name: str, out: Array | None, shape: tuple[int, ...], dtype: DType, like: Array | None = None) -> Array:
    """`out` if it has the shape and dtype that the result needs, a new array if it is None; ValueError otherwise.

    The result is of the kind of `like` (NumPy's, if that is None too) and on its device.
    """
    if out is None:
        return empty(shape, dtype, like)
    if like is not None:
        _check_same_kind(name, out, "the input", like)
    elif not isinstance(out, np.ndarray):
        raise TypeError(f"{name}: got {_kind_name(out)}, expected numpy.ndarray")
    if out.shape != shape or out.dtype != dtype:
        raise ValueError(f"{name}: got shape {out.shape} of {out.dtype}, expected {shape} of {dtype}")
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError(f"{name}: got a read-only array, expected one that can be written")
    return out


def check_same_dtype(**arrays: Array | None) -> DType:
    """The one dtype of the arrays (None is passed over), which are also of one kind; TypeError naming the first that
    differs."""
    first_name, first = "", None
    for name, array in arrays.items():
        if array is None:
            continue
        if first is None:
            first_name, first = name, array
            continue
        _check_same_kind(name, array, first_name, first)
        if array.dtype != first.dtype:
            raise TypeError(f"{name}: got dtype {array.dtype}, expected {first.dtype} like {first_name}")
    assert first is not None
    return first.dtype


def check_parameter(name: str, parameter: Array, dtype: DType) -> None:
    """Parameters may be float32 whatever the dtype of the activations, or have that dtype."""
    if parameter.dtype not in (dtype, FLOAT32) or (dtype == FLOAT64 and parameter.dtype != FLOAT64):
        raise TypeError(f"{name}: got dtype {parameter.dtype}, expected {_parameter_dtypes(dtype)}")


def check_parameter_gradient(
    name: str, gradient: Array | None, shape: tuple[int, ...], dtype: DType, like: Array | None = None
) -> Array:
    """The gradient to accumulate into, zeros if None: float32, or float64 where the activations are float64."""
    wanted = FLOAT64 if dtype == FLOAT64 else FLOAT32
    if gradient is None:
        return zeros(shape, wanted, like)
    return check_out(name, gradient, shape, wanted, like)


def is_array(value: Any) -> bool:
    """Whether `value` is an array of NumPy's or CuPy's."""
    return isinstance(value, np.ndarray) or _is_cupy(value)


def on_gpu(array: Array) -> bool:
    """Whether operations on this array run as GPU kernels: on a GPU, or (in tests) on the emulator of one.

    As in `implementation`, NumPy arrays of float64 never do.
    """
    return numpy_version == "gpu" and array.dtype != FLOAT64 if isinstance(array, np.ndarray) else True


def array_module(like: Array | None) -> ModuleType:
    """NumPy or CuPy, whichever the array belongs to (NumPy for None)."""
    return np if like is None or isinstance(like, np.ndarray) else sys.modules["cupy"]


def empty(shape: int | tuple[int, ...], dtype: Any, like: Array | None = None) -> Array:
    """A new array with undefined content, of the kind of `like` (NumPy's for None): out of the arena in a step that has
    one (see `arena`)."""
    source, xp = arena.current(), array_module(like)
    made: Array = xp.empty(shape, dtype) if source is None or source.xp is not xp else source.empty(shape, dtype)
    return made


def zeros(shape: int | tuple[int, ...], dtype: Any, like: Array | None = None) -> Array:
    """`empty`, filled with zeros."""
    made = empty(shape, dtype, like)
    if made.nbytes >= _LARGE and isinstance(made, np.ndarray):
        from .conversion import set_to_zero

        set_to_zero(made)
    else:
        made.fill(0)
    return made


def contiguous(array: Array, dtype: Any = None) -> Array:
    """The array itself if it is C-contiguous and of the dtype (its own for None), else a copy that is."""
    wanted = array.dtype if dtype is None else np.dtype(dtype)
    if array.dtype == wanted and array.flags.c_contiguous:
        return array
    copy = empty(array.shape, wanted, array)
    copy[...] = array
    return copy


def implementation(array: Array, package: str) -> ModuleType:
    """The module of `package` that computes on arrays like this one: the whole dispatch.

    NumPy arrays of float64 go to `reference` (the oracle doubles as the exact, slow path), of other dtypes to `cpu`;
    CuPy arrays go to `gpu`.

    Raises:
        TypeError: a CuPy array of float64.
        NotImplementedError: the operation has no GPU version; the message names it.
    """
    if isinstance(array, np.ndarray):
        version = "reference" if array.dtype == FLOAT64 else numpy_version
        if version != "gpu":
            return _module(package, version)
    elif array.dtype == FLOAT64:
        raise TypeError(
            "got a cupy.ndarray of float64, expected float32, bfloat16 or float16 (float64 runs the reference, on "
            "NumPy arrays: convert with cupy.asnumpy)"
        )
    try:
        return _module(package, "gpu")
    except ModuleNotFoundError as error:
        if error.name != f"{package}.gpu":
            raise
        operation = package.rpartition(".")[2]
        raise NotImplementedError(
            f"{operation}: has no GPU version yet; convert its arrays with cupy.asnumpy to compute it on the CPU"
        ) from None


@functools.cache
def _module(package: str, version: str) -> ModuleType:
    # Asking for a module that is loaded already takes longer than it should, once for every operation.
    return importlib.import_module(f"{package}.{version}")


_P = ParamSpec("_P")
_R = TypeVar("_R")
# Types of arguments that are passed on as they are; others are looked at once and then added.
_as_they_are: set[type] = {np.ndarray, type(None), bool, int, float, str}


def takes_cuda_arrays(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a public function take any CUDA array that speaks DLPack or `__cuda_array_interface__` (of PyTorch, numba,
    JAX, ...): it arrives as a CuPy array of the same memory. Results that are not given are CuPy arrays."""

    @functools.wraps(function)
    def converting(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        converted = {name: view_of_cuda_array(value) for name, value in kwargs.items()}
        return function(*map(view_of_cuda_array, args), **converted)

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if profiling.active is not None:
            result: _R = profiling.active.run(converting, args, kwargs)
            return result
        # A type at a time, in C: every operation comes by here.
        if _as_they_are.issuperset(map(type, args)) and _as_they_are.issuperset(map(type, kwargs.values())):
            return function(*args, **kwargs)
        return converting(*args, **kwargs)

    return call


def view_of_cuda_array(value: Any) -> Any:
    """A CuPy array of the same memory for a CUDA array of another library; anything else as it is."""
    kind = type(value)
    if kind in _as_they_are:
        return value
    speaks_dlpack, has_interface = hasattr(kind, "__dlpack_device__"), hasattr(kind, "__cuda_array_interface__")
    if is_array(value) or not (speaks_dlpack or has_interface):
        _as_they_are.add(kind)
        return value
    if speaks_dlpack and int(value.__dlpack_device__()[0]) != _DLPACK_CUDA:
        return value
    cupy = importlib.import_module("cupy")
    if kind.__module__.split(".")[0] == "torch" and str(value.dtype) == "torch.bfloat16":
        # CuPy's bfloat16 is ml_dtypes', for which DLPack is not told of by all versions.
        return cupy.from_dlpack(value.view(sys.modules["torch"].int16)).view(BFLOAT16)
    return cupy.from_dlpack(value) if speaks_dlpack else cupy.asarray(value)


def flat_rows(array: Array, inner: int = 1) -> tuple[Array, int, int]:
    """View `array` as rows whose last `inner` dimensions are contiguous: (flat 1-D view, rows, stride between rows).

    Element j of row i is `flat[i * stride + j]`, so a slice such as the query part of a fused QKV matrix needs no copy.
    Raises ValueError if such a view does not exist; see `contiguous_rows` for inputs, which may be copied, and
    `result_rows` for results.
    """
    if array.size == 0 or array.flags.c_contiguous:
        split, shape = array.ndim - inner, array.shape
        flat = array.reshape(-1) if isinstance(array, np.ndarray) else array
        return kernel_bits(flat), math.prod(shape[:split]), math.prod(shape[split:])
    rows, stride, row = _evenly_spaced(array.shape, array.strides, array.itemsize, inner)
    if not isinstance(array, np.ndarray):
        # Kernels on a GPU need no more than the address of the first element.
        return array, rows, stride
    flat = np.lib.stride_tricks.as_strided(array, ((rows - 1) * stride + row,), (array.itemsize,))
    return kernel_bits(flat), rows, stride


@functools.lru_cache(maxsize=1024)
def _evenly_spaced(
    shape: tuple[int, ...], strides: tuple[int, ...], item: int, inner: int
) -> tuple[int, int, int]:  # fmt: skip
    """Number of rows of `inner` dimensions, elements between them, and of one; ValueError where there are no such."""
    split = len(shape) - inner
    expected = item
    for size, stride in zip(reversed(shape[split:]), reversed(strides[split:]), strict=True):
        if size != 1 and stride != expected:
            raise ValueError("the last dimensions are not contiguous")
        expected *= size
    row = expected
    rows, stride = 1, row
    for size, step in zip(reversed(shape[:split]), reversed(strides[:split]), strict=True):
        if size == 1:
            continue
        if rows == 1:
            stride = step
        elif step != stride * rows:
            raise ValueError("the leading dimensions do not form evenly spaced rows")
        rows *= size
    if stride < row or stride % item:
        raise ValueError("rows overlap or run backwards")
    return rows, stride // item, row // item


def contiguous_rows(array: Array, inner: int = 1) -> tuple[Array, int, int]:
    """`flat_rows` of an input; an input that has no such view is copied first."""
    try:
        return flat_rows(array, inner)
    except ValueError:
        return flat_rows(contiguous(array), inner)


def result_rows(name: str, array: Array, inner: int = 1) -> tuple[Array, int, int]:
    """`flat_rows` of a result, which cannot be copied: ValueError naming it if it has no such view."""
    try:
        return flat_rows(array, inner)
    except ValueError as error:
        raise ValueError(
            f"{name}: got shape {array.shape} with strides {array.strides}, expected contiguous, evenly spaced rows "
            f"({error})"
        ) from None


def kernel_view(array: Array) -> Array:
    """A C-contiguous array (copied only if it is not) in the dtype that compiled kernels know."""
    return kernel_bits(contiguous(array))


_BITS = {BFLOAT16: np.dtype(np.uint16), FLOAT16: np.dtype(np.int16)}


def kernel_bits(array: Array) -> Array:
    if not isinstance(array, np.ndarray):
        return array
    # numba knows neither 16-bit float on the CPU: bfloat16 travels as uint16 and float16 as int16, told apart by
    # signedness, and storage.load/store convert.
    bits = _BITS.get(array.dtype)
    return array if bits is None else array.view(bits)


def _parameter_dtypes(dtype: DType) -> str:
    return str(dtype) if dtype in (FLOAT32, FLOAT64) else f"float32 or {dtype}"


_DLPACK_CUDA = 2


def _is_cupy(value: Any) -> bool:
    kind = type(value)
    return kind.__name__ == "ndarray" and kind.__module__.split(".")[0] == "cupy"


def _check_same_kind(name: str, array: Any, first_name: str, first: Any) -> None:
    if type(array) is np.ndarray and type(first) is np.ndarray:
        return
    if isinstance(first, np.ndarray):
        if not isinstance(array, np.ndarray):
            remedy = " (convert with cupy.asnumpy)" if _is_cupy(array) else " (convert with numpy.asarray)"
            raise TypeError(f"{name}: got {_kind_name(array)}, expected numpy.ndarray like {first_name}{remedy}")
    elif not _is_cupy(array):
        raise TypeError(
            f"{name}: got {_kind_name(array)}, expected cupy.ndarray like {first_name} (convert with cupy.asarray)"
        )
    elif array.device != first.device:
        raise ValueError(f"{name}: got an array on {array.device}, expected one on {first.device} like {first_name}")


def _kind_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")

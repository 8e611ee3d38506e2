"""bfloat16 products through oneDNN, where its library is installed and the processor multiplies bfloat16.

Called through the C API of oneDNN 3 with ctypes: a *primitive* is a product compiled for one shape and layout, and
kept. It is called with one thread per block of the result, as BLAS is (see common.parallel); its own OpenMP threads
never start.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections import OrderedDict
from importlib.metadata import PackageNotFoundError, files
from typing import Any

from llvmlite.binding import get_host_cpu_name

from ..common.arrays import FLOAT32, Array
from ..common.scratch import thread_scratch

_DISTRIBUTION = "onednn-cpu-gomp"
_INSTALL = "pip install 'ttr-gpu[bfloat16]'"
# Of the C API: dnnl_types.h and dnnl_common_types.h of oneDNN 3.
_CPU, _IN_ORDER, _BF16, _F32, _UNDEFINED = 1, 1, 2, 3, 0
_SOURCE, _WEIGHTS, _RESULT, _SCRATCH = 1, 33, 17, 80
_GIVEN = 1  # who calls gives a primitive its working memory
_SCRATCH_LAYOUT = 136
# Bits of dnnl_avx512_core_bf16 and dnnl_avx512_core_amx, which newer instruction sets include.
_AVX512_BF16, _AMX = 0xE7, 0xFEF
# Primitives kept by each thread; oneDNN keeps what it compiled for others.
_KEPT = 256

_Pointer = ctypes.c_void_p


class _Argument(ctypes.Structure):
    _fields_ = (("index", ctypes.c_int), ("memory", _Pointer))


class _Library:
    """The functions that are used, as methods that raise where oneDNN reports an error."""

    def __init__(self, path: str) -> None:
        self._functions = ctypes.CDLL(path)
        # In every process that has loaded oneDNN for gomp.
        self._openmp = ctypes.CDLL("libgomp.so.1")
        self._openmp.omp_get_max_threads.restype = ctypes.c_int
        self._functions.dnnl_primitive_desc_query_md.restype = _Pointer
        self._functions.dnnl_memory_desc_get_size.restype = ctypes.c_size_t
        self.engine = self.make("engine_create", ctypes.c_int(_CPU), ctypes.c_size_t(0))

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._functions, f"dnnl_{name}")(*arguments)
        if status != 0:
            raise RuntimeError(f"oneDNN: dnnl_{name} returned status {status}")

    def make(self, name: str, *arguments: Any) -> _Pointer:
        made = _Pointer()
        self.call(name, ctypes.byref(made), *arguments)
        return made

    def scratch_layout(self, description: _Pointer) -> _Pointer:
        """Of the working memory; it belongs to the description."""
        return _Pointer(self._functions.dnnl_primitive_desc_query_md(description, _SCRATCH_LAYOUT, 0))

    def size(self, layout: _Pointer) -> int:
        size: int = self._functions.dnnl_memory_desc_get_size(layout)
        return size

    def instruction_sets(self) -> int:
        sets: int = self._functions.dnnl_get_effective_cpu_isa()
        return sets

    def with_one_thread(self, make: Any, *arguments: Any) -> Any:
        """A primitive splits its work among the threads that OpenMP would start when it was made."""
        before = self._openmp.omp_get_max_threads()
        self._openmp.omp_set_num_threads(1)
        try:
            return make(*arguments)
        finally:
            self._openmp.omp_set_num_threads(before)


@functools.cache
def _loaded() -> _Library | str:
    """The library, or why there is none."""
    if os.environ.get("TTR_BFLOAT16_GEMM", "auto") == "float32":
        return "TTR_BFLOAT16_GEMM=float32"
    try:
        found = [path.locate() for path in files(_DISTRIBUTION) or [] if path.name == "libdnnl.so.3"]
    except PackageNotFoundError:
        return f"oneDNN is not installed: {_INSTALL}"
    if not found:
        return f"no libdnnl.so.3 in {_DISTRIBUTION}"
    try:
        library = _Library(str(found[0]))
    except (OSError, RuntimeError) as error:
        return f"oneDNN cannot be loaded: {error}"
    if library.instruction_sets() & _AVX512_BF16 != _AVX512_BF16:
        return "this processor has no bfloat16 instructions (AVX512-BF16 or AMX)"
    if library.instruction_sets() & _AMX != _AMX and not get_host_cpu_name().startswith("znver"):
        # Measured on Emerald Rapids: a quarter of float32's instructions in a second, each of two products a lane.
        return "this processor multiplies float32 faster than bfloat16 (AVX512-BF16 without AMX)"
    return library


def why_not_bfloat16() -> str | None:
    """None if oneDNN multiplies bfloat16 here, else the reason why not, in a few words."""
    library = _loaded()
    return library if isinstance(library, str) else None


class _Product:
    """out = a b or out += a b for operands of one shape and layout, on any thread."""

    def __init__(self, library: _Library, a: Array, b: Array, out: Array, accumulate: bool) -> None:
        self._library = library
        attributes = library.make("primitive_attr_create")
        library.call("primitive_attr_set_scratchpad_mode", attributes, ctypes.c_int(_GIVEN))
        if accumulate:
            operations = library.make("post_ops_create")
            library.call(
                "post_ops_append_sum", operations, ctypes.c_float(1.0), ctypes.c_int32(0), ctypes.c_int(_UNDEFINED)
            )
            library.call("primitive_attr_set_post_ops", attributes, operations)
            library.call("post_ops_destroy", operations)
        layouts = [_layout(library, array) for array in (a, b, out)]
        description = library.make(
            "matmul_primitive_desc_create", library.engine, layouts[0], layouts[1], None, layouts[2], attributes
        )
        self._primitive = library.make("primitive_create", description)
        scratch = library.scratch_layout(description)
        self.scratch_bytes = library.size(scratch)
        self._stream = library.make("stream_create", library.engine, ctypes.c_uint(_IN_ORDER))
        self._memories = [library.make("memory_create", layout, library.engine, None) for layout in (*layouts, scratch)]
        for layout in layouts:
            library.call("memory_desc_destroy", layout)
        library.call("primitive_desc_destroy", description)
        library.call("primitive_attr_destroy", attributes)
        self._arguments = (_Argument * 4)(*map(_Argument, (_SOURCE, _WEIGHTS, _RESULT, _SCRATCH), self._memories))

    def run(self, *arrays: Array) -> None:
        # Aligned, and this thread's.
        scratch = thread_scratch(-(-self.scratch_bytes // 4), "matmul onednn")
        for memory, array in zip(self._memories, (*arrays, scratch), strict=True):
            self._library.call("memory_set_data_handle", memory, _Pointer(array.ctypes.data))
        self._library.call("primitive_execute", self._primitive, self._stream, ctypes.c_int(4), self._arguments)

    def __del__(self) -> None:
        self._library.call("primitive_destroy", self._primitive)
        self._library.call("stream_destroy", self._stream)
        for memory in self._memories:
            self._library.call("memory_destroy", memory)


class _Products(threading.local):
    """Of each thread: a product holds the addresses of the arrays that it is at work on."""

    def __init__(self) -> None:
        self.kept: OrderedDict[Any, _Product] = OrderedDict()


_products = _Products()


def takes(*arrays: Array) -> bool:
    """Whether each has evenly spaced rows or columns that are contiguous, as oneDNN reads matrices without a copy."""
    return why_not_bfloat16() is None and all(map(_is_plain, arrays))


def multiply(a: Array, b: Array, out: Array, accumulate: bool) -> None:
    """out = a b, or out += a b, on this thread. a, b are bfloat16, out is bfloat16 or float32; none is empty."""
    library = _loaded()
    assert isinstance(library, _Library)
    key = (a.shape, b.shape, a.strides, b.strides, out.strides, out.dtype, accumulate)
    product = _products.kept.get(key)
    if product is None:
        product = library.with_one_thread(_Product, library, a, b, out, accumulate)
        _products.kept[key] = product
        if len(_products.kept) > _KEPT:
            _products.kept.popitem(last=False)
    else:
        _products.kept.move_to_end(key)
    product.run(a, b, out)


def _is_plain(array: Array) -> bool:
    (rows, columns), (down, across), item = array.shape, array.strides, array.itemsize
    return (across == item and down >= item * columns) or (down == item and across >= item * rows)


def _layout(library: _Library, array: Array) -> _Pointer:
    pair = ctypes.c_int64 * 2
    strides = pair(*(stride // array.itemsize for stride in array.strides))
    kind = ctypes.c_int(_F32 if array.dtype == FLOAT32 else _BF16)
    return library.make("memory_desc_create_with_strides", ctypes.c_int(2), pair(*array.shape), kind, strides)

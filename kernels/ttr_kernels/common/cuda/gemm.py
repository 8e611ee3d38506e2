"""Matrix products on a GPU through cuBLAS, in float32, bfloat16, float16 and (on request) TF32.

cuBLAS is called by nvmath-python's bindings: CuPy's own wrappers refuse to run while a stream is captured into a graph,
and cannot multiply stacks of bfloat16. Each thread has a handle for each device, with a workspace of its own, so that
nothing is allocated in a captured region.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ..arena import outside
from ..arrays import BFLOAT16, FLOAT16, FLOAT32, Array, contiguous
from .launch import address, executor_of

WORKSPACE_BYTES = 32 << 20  # what NVIDIA recommends for Hopper (cuBLAS documentation, "cublasSetWorkspace")
# cudaDataType of an element type.
_DATA_TYPES = {FLOAT32: 0, FLOAT16: 2, BFLOAT16: 14}

_tf32 = False


@contextmanager
def tf32(enabled: bool = True) -> Iterator[None]:
    """While it lasts, float32 products may round their operands to TensorFloat-32 (10 bits of mantissa instead of 23),
    several times faster on tensor cores. Off by default: a CPU and a GPU then train the same losses."""
    global _tf32
    before, _tf32 = _tf32, enabled
    try:
        yield
    finally:
        _tf32 = before


class Gemm(NamedTuple):
    """C = op(A) op(B) [+ C] in cuBLAS's terms: matrices by columns, op(A) (m, k), op(B) (k, n), C (m, n); column j of a
    matrix begins at element j · ld."""

    transpose_a: bool
    transpose_b: bool
    m: int
    n: int
    k: int
    a: Array
    lda: int
    b: Array
    ldb: int
    c: Array
    ldc: int
    accumulate: bool
    tf32: bool


def product(a: Array, b: Array, out: Array, accumulate: bool) -> None:
    """out (M, N) = a (M, K) b (K, N), or += ; a and b of one dtype, out of the same or float32."""
    (rows, inner), columns = a.shape, b.shape[1]
    if out.size == 0:
        return
    if inner == 0:
        if not accumulate:
            out.fill(0)
        return
    if not _is_by_rows(out):
        # Neither a transposed result nor one with gaps is worth a path of its own.
        result = contiguous(out)
        product(a, b, result, accumulate)
        out[...] = result
        return
    a, transposed_a, lda = _operand(a)
    b, transposed_b, ldb = _operand(b)
    # By columns, memory holds outᵀ = bᵀ aᵀ.
    executor_of(out).multiply(
        Gemm(transposed_b, transposed_a, columns, rows, inner, b, ldb, a, lda, out, _leading(out), accumulate, _tf32)
    )


def _is_by_rows(matrix: Array) -> bool:
    item, (rows, columns) = matrix.itemsize, matrix.shape
    across = columns == 1 or matrix.strides[1] == item
    down = rows == 1 or (matrix.strides[0] >= columns * item and matrix.strides[0] % item == 0)
    return across and down


def _leading(matrix: Array) -> int:
    """Elements from row to row of a matrix that lies by rows."""
    rows, columns = matrix.shape
    return max(columns, 1) if rows == 1 else matrix.strides[0] // matrix.itemsize


def _operand(matrix: Array) -> tuple[Array, bool, int]:
    """(the matrix, whether it lies by columns, elements from row to row or column to column), copied if need be."""
    if _is_by_rows(matrix):
        return matrix, False, _leading(matrix)
    if _is_by_rows(matrix.T):
        return matrix, True, _leading(matrix.T)
    copy = contiguous(matrix)
    return copy, False, _leading(copy)


class Cublas(threading.local):
    """cuBLAS for the current device and stream of each thread."""

    def __init__(self, cupy: ModuleType) -> None:
        self._cupy, self._cublas = cupy, importlib.import_module("nvmath.bindings.cublas")
        self._handles: dict[int, _Handle] = {}
        # Factors are read from the host when the product is started.
        self._factors = np.array([0.0, 1.0], np.float32)

    def multiply(self, gemm: Gemm) -> None:
        """Start the product on the current stream."""
        cublas, device = self._cublas, self._cupy.cuda.runtime.getDevice()
        handle = self._handles.get(device)
        if handle is None:
            handle = self._handles[device] = _Handle(self._cupy, cublas)
        handle.use_stream(self._cupy.cuda.get_current_stream().ptr)
        zero = self._factors.ctypes.data
        kind = cublas.ComputeType.COMPUTE_32F_FAST_TF32 if gemm.tf32 else cublas.ComputeType.COMPUTE_32F
        cublas.gemm_ex(
            handle.value, int(gemm.transpose_a), int(gemm.transpose_b), gemm.m, gemm.n, gemm.k, zero + 4,
            address(gemm.a), _DATA_TYPES[gemm.a.dtype], gemm.lda, address(gemm.b), _DATA_TYPES[gemm.b.dtype], gemm.ldb,
            zero + 4 * gemm.accumulate, address(gemm.c), _DATA_TYPES[gemm.c.dtype], gemm.ldc, kind, -1,
        )  # fmt: skip


class _Handle:
    """A cuBLAS handle, its workspace and the stream it was last told."""

    def __init__(self, cupy: ModuleType, cublas: Any) -> None:
        self._cublas = cublas
        self.value = cublas.create()
        # 16-bit results are rounded once, from a sum in float32, however cuBLAS splits it.
        cublas.set_math_mode(self.value, cublas.Math.DISALLOW_REDUCED_PRECISION_REDUCTION)
        with outside():
            self._workspace = cupy.empty(WORKSPACE_BYTES, np.uint8)
        self._stream: int | None = None

    def use_stream(self, stream: int) -> None:
        if stream == self._stream:
            return
        # A new stream resets the workspace to one that cuBLAS allocates.
        self._cublas.set_stream(self.value, stream)
        self._cublas.set_workspace(self.value, self._workspace.data.ptr, WORKSPACE_BYTES)
        self._stream = stream

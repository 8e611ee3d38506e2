"""Product of small matrices that lie in the cache, for use inside compiled kernels:  C (M×N) = or += A (M×K) · B (K×N).

The inner loop is written in LLVM vectors: a block of ROWS × 2 vectors of C stays in registers while rows of B stream
past it. A BLAS cannot be called from inside a kernel without its library's name, and would pack its operands anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .compilation import jit_within
from .storage import element_pointer

_features = llvmlite.binding.get_host_cpu_features()
# Lanes of a vector, and rows of C held in registers: 16 accumulators of 32 registers (AVX-512, NEON), 8 of 16 (AVX2).
LANES = 16 if _features.get("avx512f") else 8 if _features.get("avx2") else 4
ROWS = 4 if LANES == 8 else 8
# Every dimension of a tile buffer is padded to a multiple of this, so that no product has a ragged edge.
PAD = 16


def padded(size: int) -> int:
    """`size` rounded up to a multiple of PAD."""
    return -(-size // PAD) * PAD


def _llvm_function(module: Any, name: str, kind: Any, arguments: int) -> Any:
    return module.globals.get(name) or ir.Function(module, ir.FunctionType(kind, [kind] * arguments), name)


def accumulated(
    builder: Any, inner: Any, step: int, rows: int, columns: int,
    factors: Callable[[Any], tuple[Callable[[int], list[Any]], list[Any]]],
) -> list[list[Any]]:  # fmt: skip
    """The vectors Σ_k a[r, c](k) · b[c](k) for k = 0, step, … below `inner`, each in a register, rows × columns.

    `factors(k)` emits what is loaded at k: a function of r that gives a[r, :], called row by row, and b.
    """
    word, vector = ir.IntType(64), ir.VectorType(ir.FloatType(), LANES)
    zero = ir.Constant(vector, [0.0] * LANES)
    fma = _llvm_function(builder.module, f"llvm.fma.v{LANES}f32", vector, 3)
    before = builder.block
    loop, end = builder.append_basic_block("inner"), builder.append_basic_block("done")
    builder.cbranch(builder.icmp_signed(">", inner, word(0)), loop, end)
    builder.position_at_end(loop)
    k = builder.phi(word)
    k.add_incoming(word(0), before)
    sums = [[builder.phi(vector) for _ in range(columns)] for _ in range(rows)]
    row, b = factors(k)
    updated = []
    for r in range(rows):
        a = row(r)
        updated.append([builder.call(fma, [a[c], b[c], sums[r][c]]) for c in range(columns)])
    following = builder.add(k, word(step))
    k.add_incoming(following, loop)
    for r in range(rows):
        for c in range(columns):
            sums[r][c].add_incoming(zero, before)
            sums[r][c].add_incoming(updated[r][c], loop)
    builder.cbranch(builder.icmp_signed("<", following, inner), loop, end)

    builder.position_at_end(end)
    totals = [[builder.phi(vector) for _ in range(columns)] for _ in range(rows)]
    for r in range(rows):
        for c in range(columns):
            totals[r][c].add_incoming(zero, before)
            totals[r][c].add_incoming(updated[r][c], loop)
    return totals


def _block_product(vectors: int) -> Any:
    # One block of ROWS × (vectors · LANES) elements of C.
    def typing(
        context: Any, c: Any, ldc: Any, a: Any, a_row: Any, a_column: Any, b: Any, ldb: Any, inner: Any,
        accumulate: Any, c_at: Any, a_at: Any, b_at: Any,
    ) -> Any:  # fmt: skip
        index = types.intp
        signature = types.void(c, index, a, index, index, b, index, index, types.boolean, index, index, index)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            (c_array, ldc, a_array, a_row, a_column, b_array, ldb, inner, accumulate, c_at, a_at, b_at) = arguments
            types_of = signature.args
            word = ir.IntType(64)
            vector = ir.VectorType(ir.FloatType(), LANES)
            zero = ir.Constant(vector, [0.0] * LANES)

            def vector_at(pointer: Any, offset: Any) -> Any:
                return builder.bitcast(builder.gep(pointer, [offset]), vector.as_pointer())

            c_start = element_pointer(context, builder, types_of[0], c_array, c_at)
            a_start = element_pointer(context, builder, types_of[2], a_array, a_at)
            b_start = element_pointer(context, builder, types_of[5], b_array, b_at)
            row_offsets = [builder.mul(a_row, word(r)) for r in range(ROWS)]

            def factors(k: Any) -> Any:
                columns = builder.mul(k, a_column)
                b_row = builder.mul(k, ldb)
                b_values = [
                    builder.load(vector_at(b_start, builder.add(b_row, word(v * LANES))), align=4)
                    for v in range(vectors)
                ]

                def spread(r: int) -> Any:
                    scalar = builder.load(builder.gep(a_start, [builder.add(columns, row_offsets[r])]), align=4)
                    single = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.IntType(32)(0))
                    shuffle = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
                    return [builder.shuffle_vector(single, ir.Constant(vector, ir.Undefined), shuffle)] * vectors

                return spread, b_values

            totals = accumulated(builder, inner, 1, ROWS, vectors, factors)
            for r, row in enumerate(totals):
                for v, total in enumerate(row):
                    pointer = vector_at(c_start, builder.add(builder.mul(ldc, word(r)), word(v * LANES)))
                    start = builder.select(accumulate, builder.load(pointer, align=4), zero)
                    builder.store(builder.fadd(start, total), pointer, align=4)
            return context.get_dummy_value()

        return signature, generate

    return typing


_two_vectors = intrinsic(_block_product(2))
_one_vector = intrinsic(_block_product(1))


@jit_within
def multiply(
    c: Any, c_at: int, ldc: int, a: Any, a_at: int, a_row: int, a_column: int, b: Any, b_at: int, ldb: int,
    m: int, n: int, k: int, accumulate: bool,
) -> None:  # fmt: skip
    """C = A·B, or C += A·B, on flat float32 buffers.

    C[i, j] is c[c_at + i·ldc + j], A[i, l] is a[a_at + i·a_row + l·a_column] (so A may be a transposed view), and
    B[l, j] is b[b_at + l·ldb + j]. m must be a multiple of ROWS and n of LANES (PAD is a multiple of both).
    """
    for j in range(0, n - 2 * LANES + 1, 2 * LANES):
        for i in range(0, m, ROWS):
            _two_vectors(
                c, ldc, a, a_row, a_column, b, ldb, k, accumulate, c_at + i * ldc + j, a_at + i * a_row, b_at + j
            )
    for j in range(n // (2 * LANES) * (2 * LANES), n, LANES):
        for i in range(0, m, ROWS):
            _one_vector(
                c, ldc, a, a_row, a_column, b, ldb, k, accumulate, c_at + i * ldc + j, a_at + i * a_row, b_at + j
            )


@intrinsic
def maximum(context: Any, a: Any, b: Any) -> Any:
    """The larger of two float32, in a form whose reduction over a loop becomes vector code (NaN counts as missing)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = _llvm_function(builder.module, "llvm.maxnum.f32", ir.FloatType(), 2)
        return builder.call(function, arguments, fastmath=("nnan", "nsz"))

    return types.float32(types.float32, types.float32), generate

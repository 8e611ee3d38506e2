"""Products of few rows with a matrix as it lies in memory, inside compiled kernels:  y (B×N) = x (B×K) · W (N×K)ᵀ.

For a handful of rows a product is bound by reading W once. Rows of W are taken several at a time, each against several
rows of x, with one vector of partial sums per pair. The sum of a pair has the same order whatever the other rows are: a
row's result does not depend, to the bit, on how many stand beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .compilation import jit
from .storage import element_pointer, load
from .tile_multiply import LANES, accumulated

# Rows of W beside each other for one row of x, and a block of rows of W and of x that together fit the registers.
_ALONE = 8
_BLOCK, _BATCH = (2 if LANES == 8 else 4), 4


def _dots(rows: int, batch: int) -> Any:
    # out[m, r] = Σ_k W[r, k] x[m, k] over whole vectors, for `rows` rows of W and `batch` rows of x.
    def typing(
        context: Any, out: Any, out_at: Any, out_row: Any, w: Any, w_at: Any, w_row: Any, x: Any, x_at: Any,
        x_row: Any, inner: Any,
    ) -> Any:  # fmt: skip
        index = types.intp
        signature = types.void(out, index, index, w, index, index, x, index, index, index)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            (out_array, out_at, out_row, w_array, w_at, w_row, x_array, x_at, x_row, inner) = arguments
            word, kind = ir.IntType(64), signature.args[3].dtype
            out_start = element_pointer(context, builder, signature.args[0], out_array, out_at)
            w_start = element_pointer(context, builder, signature.args[3], w_array, w_at)
            x_start = element_pointer(context, builder, signature.args[6], x_array, x_at)
            w_rows = [builder.gep(w_start, [builder.mul(w_row, word(r))]) for r in range(rows)]
            x_rows = [builder.gep(x_start, [builder.mul(x_row, word(m))]) for m in range(batch)]

            def factors(k: Any) -> Any:
                x_values = [_load_vector(builder, builder.gep(row, [k]), types.float32) for row in x_rows]
                return lambda r: [_load_vector(builder, builder.gep(w_rows[r], [k]), kind)] * batch, x_values

            totals = accumulated(builder, inner, LANES, rows, batch, factors)
            for r, row in enumerate(totals):
                for m, total in enumerate(row):
                    target = builder.gep(out_start, [builder.add(builder.mul(out_row, word(m)), word(r))])
                    builder.store(_sum_lanes(builder, total), target, align=4)
            return context.get_dummy_value()

        return signature, generate

    return typing


def _load_vector(builder: Any, pointer: Any, kind: Any) -> Any:
    """LANES elements as float32: float32 themselves, bfloat16 (uint16) or float16 (int16), see storage.load."""
    vector = ir.VectorType(ir.FloatType(), LANES)
    if kind == types.float32:
        return builder.load(builder.bitcast(pointer, vector.as_pointer()), align=4)
    if kind == types.uint16:
        bits = builder.load(builder.bitcast(pointer, ir.VectorType(ir.IntType(16), LANES).as_pointer()), align=2)
        wide = ir.VectorType(ir.IntType(32), LANES)
        return builder.bitcast(builder.shl(builder.zext(bits, wide), ir.Constant(wide, [16] * LANES)), vector)
    halves = builder.load(builder.bitcast(pointer, ir.VectorType(ir.HalfType(), LANES).as_pointer()), align=2)
    return builder.fpext(halves, vector)


def _sum_lanes(builder: Any, vector: Any) -> Any:
    """The sum of a vector's lanes, halves onto each other: in an order of its own, not the compiler's."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        undefined = ir.Constant(vector.type, ir.Undefined)
        parts = [
            builder.shuffle_vector(
                vector, undefined, ir.Constant(ir.VectorType(ir.IntType(32), lanes), list(range(at, at + lanes)))
            )
            for at in (0, lanes)
        ]
        vector = builder.fadd(*parts)
    return builder.extract_element(vector, ir.IntType(32)(0))


_alone = intrinsic(_dots(_ALONE, 1))
_single = intrinsic(_dots(1, 1))
_block = intrinsic(_dots(_BLOCK, _BATCH))
_column = intrinsic(_dots(1, _BATCH))


@jit
def dot_products(
    out: Any, out_at: int, out_row: int, w: Any, w_at: int, rows: int, inner: int, x: Any, x_at: int, x_row: int,
    batch: int,
) -> None:  # fmt: skip
    """out[out_at + b·out_row + n] = Σ_k w[w_at + n·inner + k] · x[x_at + b·x_row + k] for n < rows, b < batch.

    Flat arrays; out and x float32, w float32, bfloat16 (as uint16) or float16 (as int16); sums in float32.
    """
    whole = inner // LANES * LANES
    blocks = batch // _BATCH * _BATCH
    for b in range(0, blocks, _BATCH):
        o, i = out_at + b * out_row, x_at + b * x_row
        for n in range(0, rows // _BLOCK * _BLOCK, _BLOCK):
            _block(out, o + n, out_row, w, w_at + n * inner, inner, x, i, x_row, whole)
        for n in range(rows // _BLOCK * _BLOCK, rows):
            _column(out, o + n, out_row, w, w_at + n * inner, inner, x, i, x_row, whole)
    for b in range(blocks, batch):
        o, i = out_at + b * out_row, x_at + b * x_row
        for n in range(0, rows // _ALONE * _ALONE, _ALONE):
            _alone(out, o + n, out_row, w, w_at + n * inner, inner, x, i, x_row, whole)
        for n in range(rows // _ALONE * _ALONE, rows):
            _single(out, o + n, out_row, w, w_at + n * inner, inner, x, i, x_row, whole)
    if whole == inner:
        return
    for b in range(batch):
        for n in range(rows):
            rest = np.float32(0.0)
            for k in range(whole, inner):
                rest += load(w, w_at + n * inner + k) * x[np.uintp(x_at + b * x_row + k)]
            out[np.uintp(out_at + b * out_row + n)] += rest

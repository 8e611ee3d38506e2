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

from .compilation import jit_within
from .storage import element_pointer, load
from .tile_multiply import LANES, accumulated
from .vectors import chosen, fetch_later, lane_sums, load_vector

# Rows of W beside each other for one row of x, and a block of rows of W and of x that together fit the registers.
_ALONE = 8
_BLOCK, _BATCH = (2 if LANES == 8 else 4), 4
# Weights that the first rows of x fetch ahead of themselves: the others then find them in the cache.
_AHEAD = 1 << 12


def _dots(rows: int, batch: int, *, fetching: bool = False) -> Any:
    # out[m, r] = Σ_k W[r, k] x[m, k] over whole vectors, for `rows` rows of W and `batch` rows of x. `fetching`: the
    # weights `ahead` elements on are fetched meanwhile.
    def typing(
        context: Any, out: Any, out_at: Any, out_row: Any, w: Any, w_at: Any, w_row: Any, x: Any, x_at: Any,
        x_row: Any, inner: Any, ahead: Any,
    ) -> Any:  # fmt: skip
        index = types.intp
        signature = types.void(out, index, index, w, index, index, x, index, index, index, index)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            (out_array, out_at, out_row, w_array, w_at, w_row, x_array, x_at, x_row, inner, ahead) = arguments
            word, kind = ir.IntType(64), signature.args[3].dtype
            out_start = element_pointer(context, builder, signature.args[0], out_array, out_at)
            w_start = element_pointer(context, builder, signature.args[3], w_array, w_at)
            x_start = element_pointer(context, builder, signature.args[6], x_array, x_at)
            w_rows = [builder.gep(w_start, [builder.mul(w_row, word(r))]) for r in range(rows)]
            x_rows = [builder.gep(x_start, [builder.mul(x_row, word(m))]) for m in range(batch)]

            def factors(k: Any) -> Any:
                x_values = [load_vector(builder, builder.gep(row, [k]), types.float32) for row in x_rows]
                if fetching:
                    for row in w_rows:
                        fetch_later(builder, builder.gep(row, [builder.add(k, ahead)]))
                return lambda r: [load_vector(builder, builder.gep(w_rows[r], [k]), kind)] * batch, x_values

            totals = accumulated(builder, inner, LANES, rows, batch, factors)
            ordered = [totals[r][m] for m in range(batch) for r in range(rows)]
            together = max(rows, min(LANES, len(ordered)))
            for first in range(0, len(ordered), together):
                sums = lane_sums(builder, ordered[first : first + together])
                for m in range(first // rows, (first + together) // rows):
                    target = builder.gep(out_start, [builder.mul(out_row, word(m))])
                    part = chosen(builder, sums, sums, list(range(m * rows - first, (m + 1) * rows - first)))
                    builder.store(part, builder.bitcast(target, part.type.as_pointer()), align=4)
            return context.get_dummy_value()

        return signature, generate

    return typing


_alone = intrinsic(_dots(_ALONE, 1))
_single = intrinsic(_dots(1, 1))
_block = intrinsic(_dots(_BLOCK, _BATCH))
_fetching_block = intrinsic(_dots(_BLOCK, _BATCH, fetching=True))
_column = intrinsic(_dots(1, _BATCH))


@jit_within
def dot_products(
    out: Any, out_at: int, out_row: int, w: Any, w_at: int, rows: int, inner: int, x: Any, x_at: int, x_row: int,
    batch: int,
) -> None:  # fmt: skip
    """out[out_at + b·out_row + n] = Σ_k w[w_at + n·inner + k] · x[x_at + b·x_row + k] for n < rows, b < batch.

    Flat arrays; out and x float32, w float32, bfloat16 (as uint16) or float16 (as int16); sums in float32.
    """
    whole = inner // LANES * LANES
    blocks = batch // _BATCH * _BATCH
    if blocks > 0:
        ahead = _BLOCK * inner * max(1, _AHEAD // max(1, _BLOCK * inner))
        for n in range(0, rows // _BLOCK * _BLOCK, _BLOCK):
            at = w_at + n * inner
            _fetching_block(out, out_at + n, out_row, w, at, inner, x, x_at, x_row, whole, ahead)
            for b in range(_BATCH, blocks, _BATCH):
                _block(out, out_at + b * out_row + n, out_row, w, at, inner, x, x_at + b * x_row, x_row, whole, 0)
        for n in range(rows // _BLOCK * _BLOCK, rows):
            for b in range(0, blocks, _BATCH):
                o, i = out_at + b * out_row + n, x_at + b * x_row
                _column(out, o, out_row, w, w_at + n * inner, inner, x, i, x_row, whole, 0)
    for b in range(blocks, batch):
        o, i = out_at + b * out_row, x_at + b * x_row
        for n in range(0, rows // _ALONE * _ALONE, _ALONE):
            _alone(out, o + n, out_row, w, w_at + n * inner, inner, x, i, x_row, whole, 0)
        for n in range(rows // _ALONE * _ALONE, rows):
            _single(out, o + n, out_row, w, w_at + n * inner, inner, x, i, x_row, whole, 0)
    if whole == inner:
        return
    for b in range(batch):
        for n in range(rows):
            rest = np.float32(0.0)
            for k in range(whole, inner):
                rest += load(w, w_at + n * inner + k) * x[np.uintp(x_at + b * x_row + k)]
            out[np.uintp(out_at + b * out_row + n)] += rest

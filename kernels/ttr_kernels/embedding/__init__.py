"""Embedding: rows of a table, gathered by index; the gradient is a deterministic scatter-add."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..common.arrays import (
    FLOAT32,
    INTEGERS,
    Array,
    check,
    check_out,
    check_parameter_gradient,
    implementation,
    on_gpu,
    takes_cuda_arrays,
)


@dataclass(frozen=True)
class EmbeddingSaved:
    """What the forward keeps for the backward."""

    indices: Array  # (...) int32 or int64
    table_shape: tuple[int, int]


@takes_cuda_arrays
def embedding_forward(
    indices: Array, table: Array, *, dtype: Any = None, out: Array | None = None
) -> tuple[Array, EmbeddingSaved]:
    """y[i] = table[indices[i]].

    Args:
        indices: any shape, int32 or int64, in [0, V).
        table: (V, C) float32, bfloat16 or float16 (float64 runs the reference).
        dtype: of y; default that of the table. A float32 table may be read into 16-bit activations.
        out: (..., C) of that dtype.

    Raises:
        TypeError, ValueError: an array of the wrong kind, shape or dtype; the message names the argument.
        IndexError: an index outside the table; the message names its position and value. On a GPU, where to look would
            be to wait for it, such a row is NaN instead, and has no gradient.
    """
    sizes = check(indices=(indices, "...", INTEGERS), table=(table, "V C"))
    dtype = np.dtype(table.dtype if dtype is None else dtype)
    if dtype != table.dtype and table.dtype != FLOAT32:
        raise TypeError(f"dtype: got {dtype}, expected {table.dtype} like table")
    if indices.size and not on_gpu(table) and not (indices.min() >= 0 and indices.max() < sizes["V"]):
        flat = indices.reshape(-1)
        at = int(np.flatnonzero((flat < 0) | (flat >= sizes["V"]))[0])
        raise IndexError(f"indices: got {flat[at]} at position {at}, expected 0 .. {sizes['V'] - 1} (rows of table)")
    out = check_out("out", out, (*indices.shape, sizes["C"]), dtype, table)
    implementation(table, __package__).forward(indices, table, out)
    return out, EmbeddingSaved(indices, (sizes["V"], sizes["C"]))


def embedding(indices: Array, table: Array, *, dtype: Any = None, out: Array | None = None) -> Array:
    """`embedding_forward` with nothing saved."""
    return embedding_forward(indices, table, dtype=dtype, out=out)[0]


@takes_cuda_arrays
def embedding_backward(dy: Array, saved: EmbeddingSaved, *, dtable: Array | None = None) -> Array:
    """dtable[indices[i]] += dy[i], in the order of i, so the result has the same bits on any number of threads.

    On a GPU the rows of an index are added up in parts, in an order that depends on the indices alone.

    Args:
        dy: (..., C).
        saved: from the forward.
        dtable: (V, C) float32 (float64 for the reference), is *accumulated* into; zeros if not given.
    """
    check(dy=(dy, "... C"))
    expected = (*saved.indices.shape, saved.table_shape[1])
    if dy.shape != expected:
        raise ValueError(f"dy: got shape {dy.shape}, expected {expected} like y")
    dtable = check_parameter_gradient("dtable", dtable, saved.table_shape, dy.dtype, dy)
    implementation(dy, __package__).backward(dy, saved, dtable)
    return dtable

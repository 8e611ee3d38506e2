"""Embedding on a GPU. The scatter-add sorts the indices first, so that nothing collides and sums have a fixed order."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..common.arrays import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    INT32,
    INT64,
    Array,
    DType,
    contiguous,
    contiguous_rows,
    result_rows,
)
from ..common.cuda.launch import CXX_TYPES, Kernel, scratch, vector_elements

if TYPE_CHECKING:
    from . import EmbeddingSaved

_FOLDER = Path(__file__).parent
_UINT32 = np.dtype(np.uint32)
# As in scatter_add.cu: places per chunk; and what a thread moves: 16 bytes of the table.
_CHUNK, _COLUMNS = 32, 4
_SORT_BLOCK = 1024


def forward(indices: Array, table: Array, out: Array) -> None:
    flat, _, stride = contiguous_rows(table)
    y, rows, y_stride = result_rows("out", out)
    vocabulary, width = table.shape
    vector = vector_elements(out.itemsize, (width, stride, y_stride), (flat, y))
    lanes = _power_of_two(-(-width // vector), 256)
    _gather_kernel(table.dtype, out.dtype, indices.dtype, vector).launch(
        out, (-(-rows // (256 // lanes)),), (256,),
        (_flat(indices), rows, flat, stride, vocabulary, y, y_stride, width, lanes),
    )  # fmt: skip


def backward(dy: Array, saved: EmbeddingSaved, dtable: Array) -> None:
    g, rows, stride = contiguous_rows(dy)
    table, _, table_stride = result_rows("dtable", dtable)
    vocabulary, width = dtable.shape
    if not dy.size or not vocabulary:
        return
    keys, places = _sorted(_flat(saved.indices), vocabulary)
    aligned = vector_elements(dy.itemsize, (width, stride), (g,)), vector_elements(4, (width, table_stride), (table,))
    vector = _COLUMNS if min(aligned) > 1 else 1
    vectors = -(-width // vector)
    lanes, chunks = _power_of_two(vectors, 128), -(-rows // _CHUNK)
    partials = scratch(dy, (chunks, 2, width), FLOAT32, "partial sums")
    _add_kernel("add_chunks", dy.dtype, vector).launch(
        dy, (-(-chunks // (128 // lanes)), -(-vectors // lanes)), (128,),
        (keys, places, rows, vocabulary, g, stride, table, table_stride, partials, width, lanes),
    )  # fmt: skip
    if chunks > 1:
        _add_kernel("add_cut_runs", FLOAT32, vector).launch(
            dy, (chunks - 1, -(-vectors // 32)), (256,),
            (keys, rows, vocabulary, partials, table, table_stride, width),
        )  # fmt: skip


def _sorted(indices: Array, vocabulary: int) -> tuple[Array, Array]:
    """The indices in ascending order, of which those outside the table have become `vocabulary`, and where each stood:
    equal ones in the order of their places."""
    size = len(indices)
    blocks = -(-size // _SORT_BLOCK)
    counts = scratch(indices, (256 * blocks,), INT32, "sort counts")
    # The first pass reads the indices, in their order.
    keys: Array | int = 0
    places: Array | int = 0
    count, add_up, move = (_sort_kernel(name, indices.dtype) for name in ("sort_count", "sort_sum", "sort_move"))
    for shift in range(0, vocabulary.bit_length(), 8):
        buffers = "keys and places of odd passes" if shift % 16 else "keys and places of even passes"
        to = scratch(indices, (2, size), _UINT32, buffers)
        count.launch(indices, (blocks,), (_SORT_BLOCK,), (indices, keys, size, vocabulary, shift, counts))
        add_up.launch(indices, (1,), (_SORT_BLOCK,), (counts, len(counts)))
        move.launch(
            indices, (blocks,), (_SORT_BLOCK,),
            (indices, keys, places, size, vocabulary, shift, counts, to[0], to[1]),
        )  # fmt: skip
        keys, places = to[0], to[1]
    assert not isinstance(keys, int)
    assert not isinstance(places, int)
    return keys, places


def _flat(indices: Array) -> Array:
    return contiguous(indices).reshape(-1)


def _power_of_two(at_least: int, at_most: int) -> int:
    return min(1 << max(at_least - 1, 0).bit_length(), at_most)


@functools.cache
def _gather_kernel(dtype: DType, result: DType, index: DType, vector: int) -> Kernel:
    defines = {"TTR_T": CXX_TYPES[dtype], "TTR_RESULT": CXX_TYPES[result]}
    sizes = {"TTR_INDEX_BYTES": index.itemsize, "TTR_VECTOR": vector}
    return Kernel(_FOLDER / "embedding.cu", "embedding_gather", {**defines, **sizes})


@functools.cache
def _sort_kernel(name: str, index: DType) -> Kernel:
    return Kernel(_FOLDER / "sort.cu", name, {"TTR_INDEX_BYTES": index.itemsize})


@functools.cache
def _add_kernel(name: str, dtype: DType, vector: int) -> Kernel:
    return Kernel(_FOLDER / "scatter_add.cu", name, {"TTR_T": CXX_TYPES[dtype], "TTR_VECTOR": vector})


INSTANTIATIONS = [
    *(
        _gather_kernel(table, result, INT32, 16 // result.itemsize)
        for table, result in (
            (FLOAT32, FLOAT32),
            (FLOAT32, BFLOAT16),
            (FLOAT32, FLOAT16),
            (BFLOAT16, BFLOAT16),
            (FLOAT16, FLOAT16),
        )
    ),
    *(_sort_kernel(name, index) for index in (INT32, INT64) for name in ("sort_count", "sort_sum", "sort_move")),
    *(_add_kernel("add_chunks", dtype, _COLUMNS) for dtype in (FLOAT32, BFLOAT16, FLOAT16)),
    _add_kernel("add_cut_runs", FLOAT32, _COLUMNS),
]

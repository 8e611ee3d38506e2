"""How rows are shared out among threads, for kernels that hold a row in registers (rows.cuh)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..arrays import BFLOAT16, FLOAT16, FLOAT32, Array, DType, contiguous
from .launch import CXX_TYPES, Kernel, multiprocessors, vector_elements

# Elements of a row that one thread holds; more only where 1024 threads do not suffice.
_ELEMENTS = 16
_BLOCK_OF_WARPS = 128


class RowLayout(NamedTuple):
    """vector elements move at once, threads share a row, items vectors are each thread's."""

    vector: int
    threads: int
    items: int

    @property
    def block(self) -> tuple[int]:
        return (_BLOCK_OF_WARPS if self.threads == 32 else self.threads,)

    @property
    def block_rows(self) -> int:
        return self.block[0] // self.threads

    def grid(self, rows: int) -> tuple[int]:
        """A block for every few rows."""
        return (-(-rows // self.block_rows),)

    def resident_grid(self, rows: int, like: Array) -> tuple[int]:
        """As many blocks as the device holds at once, for a kernel whose blocks go on to further rows."""
        return (min(self.grid(rows)[0], multiprocessors(like) * max(1, 1024 // self.block[0])),)

    def defines(self, dtype: DType) -> dict[str, int | str]:
        return {
            "TTR_T": CXX_TYPES[dtype],
            "TTR_VECTOR": self.vector,
            "TTR_THREADS": self.threads,
            "TTR_ITEMS": self.items,
        }


@functools.cache
def layout_of(width: int, vector: int) -> RowLayout:
    """The layout of rows of this width, moved by vectors of this many elements."""
    threads = 32
    while threads < 1024 and threads * max(_ELEMENTS, vector) < width:
        threads *= 2
    items = 1
    while threads * items * vector < width:
        items *= 2
    return RowLayout(vector, threads, items)


def row_layout(dtype: DType, width: int, strides: Sequence[int], arrays: Sequence[Array]) -> RowLayout:
    """The layout for arrays whose rows of `width` elements begin every `strides` elements."""
    return layout_of(width, vector_elements(dtype.itemsize, (width, *strides), arrays))


@functools.cache
def row_kernel(source: Path, name: str, dtype: DType, layout: RowLayout) -> Kernel:
    """A kernel of a .cu file that includes rows.cuh."""
    return Kernel(source, name, layout.defines(dtype))


def usual_kernels(source: Path, *names: str) -> list[Kernel]:
    """What users of the presets meet of such a file: aligned rows of 256 and 768, in every dtype."""
    return [
        row_kernel(source, name, dtype, layout_of(width, 16 // dtype.itemsize))
        for dtype in (FLOAT32, BFLOAT16, FLOAT16)
        for width in (256, 768)
        for name in names
    ]


def as_float32(vector: Array) -> Array:
    """A contiguous float32 vector of parameters: itself if it is one."""
    return contiguous(vector, FLOAT32)

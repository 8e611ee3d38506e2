"""Dropout and residual addition in one pass (Srivastava et al. 2014):  y = residual + keep · x / (1 − rate).

Element e of x (in C order) is kept iff word e mod 4 of Philox at position e div 4, under (seed, offset), is at least
rate · 2³². The mask is drawn again in the backward and never stored. Where x is but some rows of a larger array, from
`first_row` on, e counts from that array's begin: parts computed apart have the mask of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..common.arrays import Array, check, check_out, check_same_dtype, implementation, takes_cuda_arrays
from ..common.philox import check_first_row, check_offset_at, check_rate
from .reference import kept_elements


@dataclass(frozen=True)
class DropoutAddSaved:
    """What the forward keeps for the backward: what the mask follows from."""

    rate: float
    seed: int
    offset: int
    first_row: int = 0
    offset_at: Array | None = None


@takes_cuda_arrays
def dropout_add_forward(
    x: Array,
    residual: Array | None = None,
    *,
    rate: float,
    seed: int = 0,
    offset: int = 0,
    first_row: int = 0,
    offset_at: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, DropoutAddSaved]:
    """y = residual + keep · x / (1 − rate), or without a residual plain inverted dropout.

    Args:
        x: any shape, float32, bfloat16 or float16 (float64 runs the reference). Copied if not contiguous.
        residual: like x.
        rate: probability of dropping an element, 0 <= rate < 1; 0 draws no random numbers.
        seed, offset: 64-bit; no two masks of a run may share both.
        first_row: number of x's first row (its last axis is one) in the array that the mask is drawn for, from 0.
        offset_at: on a GPU, an array of one uint64 there that is added to offset, so that a captured CUDA graph can be
            replayed with other masks.
        out: like x; may be x or residual.

    Raises:
        TypeError, ValueError: an array of the wrong kind, shape or dtype, a rate outside [0, 1), or a row before 0.
    """
    check(x=(x, "... C"), residual=(residual, "... C"))
    dtype = check_same_dtype(x=x, residual=residual)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual: got shape {residual.shape}, expected {x.shape} like x")
    check_rate("rate", rate)
    check_first_row(first_row)
    check_offset_at(offset_at, x)
    out = check_out("out", out, x.shape, dtype, x)
    saved = DropoutAddSaved(rate, seed, offset, first_row, offset_at)
    _apply(x, residual, saved, out)
    return out, saved


@takes_cuda_arrays
def dropout_add_backward(dy: Array, saved: DropoutAddSaved, *, dx: Array | None = None) -> Array:
    """The gradient of x, keep · dy / (1 − rate); that of residual is dy itself. dx is *written*; it may be dy."""
    check(dy=(dy, "... C"))
    dx = check_out("dx", dx, dy.shape, dy.dtype, dy)
    _apply(dy, None, saved, dx)
    return dx


def _apply(x: Array, residual: Array | None, mask: DropoutAddSaved, out: Array) -> None:
    arguments = x, residual, mask.rate, mask.seed, mask.offset, mask.first_row * x.shape[-1], out
    further = () if mask.offset_at is None else (mask.offset_at,)
    implementation(x, __package__).apply(*arguments, *further)


def dropout_mask(shape: tuple[int, ...], *, rate: float, seed: int = 0, offset: int = 0, first_row: int = 0) -> Array:
    """The mask itself, True where an element is kept; the definition of the module's text in NumPy."""
    check_rate("rate", rate)
    check_first_row(first_row)
    return kept_elements(first_row * shape[-1], int(np.prod(shape)), rate, seed, offset).reshape(shape)

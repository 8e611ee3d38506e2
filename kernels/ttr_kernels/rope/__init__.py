"""Rotary position embedding (Su et al. 2021, *RoFormer*, eq. 34): pairs of features turn by position · frequency.

    (a, b) -> (a cos θ − b sin θ, a sin θ + b cos θ)        θ_j = position · base^(−2j / dim)

The product of a rotated query and a rotated key depends on their positions only through the difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..common.arrays import (
    FLOAT32,
    FLOAT64,
    Array,
    array_module,
    check,
    check_out,
    check_same_dtype,
    implementation,
    is_array,
    takes_cuda_arrays,
)


@dataclass(frozen=True)
class RopeTable:
    """Cosines and sines of the angles of each row, (rows, dim / 2) each, float32 or float64."""

    cos: Array
    sin: Array


@dataclass(frozen=True)
class RopeSaved:
    """What the forward keeps for the backward: nothing of x, since a rotation is linear."""

    table: RopeTable
    interleaved: bool


@takes_cuda_arrays
def rope_cos_sin(positions: Any, dim: int, *, base: float = 10000.0, dtype: Any = np.float32) -> RopeTable:
    """cos and sin of position · base^(−2j / dim), j = 0 .. dim/2 − 1; angles are formed and reduced in float64.

    Args:
        positions: (rows,) integers or floats; the table is made where they are.
        dim: features that rotate, even.
        base: ratio of the longest to the shortest wavelength.
        dtype: of the table, float32 or float64.
    """
    positions = positions if is_array(positions) else np.asarray(positions)
    xp = array_module(positions)
    if positions.ndim != 1:
        raise ValueError(f"positions: got shape {positions.shape}, expected (rows,)")
    if dim < 2 or dim % 2:
        raise ValueError(f"dim: got {dim}, expected an even number of at least 2")
    if not base > 0:
        raise ValueError(f"base: got {base}, expected a positive number")
    angles = positions.astype(np.float64)[:, None] * base ** (-2.0 * xp.arange(dim // 2) / dim)
    return RopeTable(xp.cos(angles).astype(dtype), xp.sin(angles).astype(dtype))


@takes_cuda_arrays
def rope_forward(
    x: Array, table: RopeTable, *, interleaved: bool = False, out: Array | None = None
) -> tuple[Array, RopeSaved]:
    """Rotate the first features of every head by the angles of its row; features beyond the table's are copied.

    Args:
        x: (rows, H, D), or (B, T, H, D) with a table of B·T rows, or of T rows that all B share.
            Any view with evenly spaced rows, such as the query part of a fused QKV array.
        table: from `rope_cos_sin`.
        interleaved: pairs are (2j, 2j + 1) as in RoFormer; otherwise (j, j + dim/2) as in GPT-NeoX and Llama.
        out: like x; x itself rotates in place.

    Raises:
        TypeError, ValueError: an array of the wrong kind, shape or dtype; the message names the argument.
    """
    _check(x, "x", table)
    out = check_out("out", out, x.shape, x.dtype, x)
    implementation(x, __package__).rotate(x, table.cos, table.sin, interleaved, False, out)
    return out, RopeSaved(table, interleaved)


@takes_cuda_arrays
def rope_backward(dy: Array, saved: RopeSaved, *, dx: Array | None = None) -> Array:
    """The gradient of x: dy turned back by the same angles. dx, like dy, is *written*; dy itself turns in place."""
    _check(dy, "dy", saved.table)
    dx = check_out("dx", dx, dy.shape, dy.dtype, dy)
    implementation(dy, __package__).rotate(dy, saved.table.cos, saved.table.sin, saved.interleaved, True, dx)
    return dx


def _check(x: Array, name: str, table: RopeTable) -> None:
    tables = (FLOAT32, FLOAT64)
    arguments: dict[str, Any] = {
        name: (x, "... H D"),
        "table.cos": (table.cos, "rows dim/2", tables),
        "table.sin": (table.sin, "rows dim/2", tables),
    }
    check(**arguments)
    check_same_dtype(**{"table.cos": table.cos, "table.sin": table.sin})
    if x.ndim not in (3, 4):
        raise ValueError(f"{name}: got shape {x.shape}, expected (rows, H, D) or (B, T, H, D)")
    if x.shape[-1] < 2 * table.cos.shape[1]:
        raise ValueError(f"{name}: got {x.shape[-1]} features, expected at least the table's {2 * table.cos.shape[1]}")
    rows = x.shape[0] if x.ndim == 3 else x.shape[0] * x.shape[1]
    if len(table.cos) != rows and not (x.ndim == 4 and len(table.cos) == x.shape[1]):
        raise ValueError(f"table: got {len(table.cos)} rows, expected {rows} like {name}")

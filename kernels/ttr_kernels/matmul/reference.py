"""Matrix products in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..common.arrays import Array

if TYPE_CHECKING:
    from . import LinearSaved


def product(a: Array, b: Array, out: Array, accumulate: bool) -> None:
    out[...] = out + a @ b if accumulate else a @ b


def forward(x: Array, weight: Array, bias: Array | None, out: Array) -> None:
    out[...] = x @ weight.T + (0 if bias is None else bias)


def backward(dy: Array, saved: LinearSaved, dx: Array, dweight: Array, dbias: Array | None, accumulate: bool) -> None:
    rows = dy.reshape(-1, dy.shape[-1])
    dx[...] = dy @ saved.weight
    dweight[...] = rows.T @ saved.x.reshape(-1, saved.x.shape[-1]) + (dweight if accumulate else 0)
    if dbias is not None:
        dbias[...] = rows.sum(axis=0) + (dbias if accumulate else 0)

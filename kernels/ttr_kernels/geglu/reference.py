"""GeGLU in float64, as the formulas stand in the docstrings."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ..common.arrays import Array

if TYPE_CHECKING:
    from . import GegluSaved

_erf = np.vectorize(math.erf, otypes=[np.float64])


def forward(x: Array, bias: Array | None, approximate: str, out: Array) -> None:
    gate, value = np.split(x if bias is None else x + bias, 2, axis=-1)
    out[...] = gate * _phi(gate, approximate)[0] * value


def backward(dy: Array, saved: GegluSaved, dx: Array, dbias: Array | None) -> None:
    gate, value = np.split(saved.x if saved.bias is None else saved.x + saved.bias, 2, axis=-1)
    phi, slope = _phi(gate, saved.approximate)
    dx[...] = np.concatenate([dy * value * (phi + gate * slope), dy * gate * phi], axis=-1)
    if dbias is not None:
        dbias += dx.reshape(-1, dx.shape[-1]).sum(axis=0)


def _phi(x: Array, approximate: str) -> tuple[Array, Array]:
    """Φ(x), exactly or by the tanh formula, and its derivative."""
    if approximate == "none":
        return 0.5 * (1 + _erf(x / math.sqrt(2))), np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    root = math.sqrt(2 / math.pi)
    t = np.tanh(root * (x + 0.044715 * x**3))
    return 0.5 * (1 + t), 0.5 * (1 - t * t) * root * (1 + 3 * 0.044715 * x * x)

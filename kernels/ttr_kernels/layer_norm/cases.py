"""Shapes that layer normalisation is tested and timed on."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..common.cases import Case, Operation
from . import layer_norm_backward, layer_norm_forward


def _inputs(*shape: int, bias: bool = True, residual: bool = False, scale: float = 1.0, eps: float = 1e-5) -> Any:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        inputs: dict[str, Any] = {
            "x": scale * rng.standard_normal(shape),
            "weight": 1 + 0.3 * rng.standard_normal(shape[-1]),
            "eps": eps,
        }
        if bias:
            inputs["bias"] = 0.3 * rng.standard_normal(shape[-1])
        if residual:
            inputs["residual"] = rng.standard_normal(shape)
        return inputs

    return make


OPERATION = Operation(
    "layer_norm",
    layer_norm_forward,
    layer_norm_backward,
    activations=("x", "residual"),
    parameters=("weight", "bias"),
    gradients=("x", "weight", "bias"),
    cases=[
        Case("one row", _inputs(1, 8)),
        Case("odd sizes", _inputs(5, 7, 33)),
        Case("many rows", _inputs(200, 16)),
        Case("no rows", _inputs(0, 16)),
        Case("no bias", _inputs(9, 24, bias=False)),
        Case("large values", _inputs(4, 24, scale=100.0)),
        Case("with residual", _inputs(70, 40, residual=True)),
        Case("wide rows with residual", _inputs(40, 1200, residual=True)),
        Case("2048x256", _inputs(2048, 256), timed=True, flops=7 * 2048 * 256),
    ],
    tolerance=2.0,
)

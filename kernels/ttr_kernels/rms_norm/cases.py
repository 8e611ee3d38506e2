"""Shapes that RMS normalisation is tested and timed on."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..common.cases import Case, Operation
from . import rms_norm_backward, rms_norm_forward


def _inputs(*shape: int, residual: bool = False, scale: float = 1.0, eps: float = 1e-6) -> Any:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        inputs: dict[str, Any] = {
            "x": scale * rng.standard_normal(shape),
            "weight": 1 + 0.3 * rng.standard_normal(shape[-1]),
            "eps": eps,
        }
        if residual:
            inputs["residual"] = rng.standard_normal(shape)
        return inputs

    return make


OPERATION = Operation(
    "rms_norm",
    rms_norm_forward,
    rms_norm_backward,
    activations=("x", "residual"),
    parameters=("weight",),
    gradients=("x", "weight"),
    cases=[
        Case("one row", _inputs(1, 8)),
        Case("odd sizes", _inputs(5, 7, 33)),
        Case("many rows", _inputs(200, 16)),
        Case("no rows", _inputs(0, 16)),
        Case("width 1", _inputs(3, 1, eps=0.5)),
        Case("large values", _inputs(4, 24, scale=100.0)),
        Case("with residual", _inputs(70, 40, residual=True)),
        Case("wide rows with residual", _inputs(40, 1200, residual=True)),
        Case("2048x256", _inputs(2048, 256), timed=True, flops=4 * 2048 * 256),
        Case("2048x256 with residual", _inputs(2048, 256, residual=True), timed=True, flops=5 * 2048 * 256),
    ],
)

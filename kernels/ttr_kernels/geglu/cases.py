"""Shapes that GeGLU is tested and timed on."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..common.cases import Case, Operation
from . import geglu_backward, geglu_forward


def _inputs(*shape: int, approximate: str = "tanh", bias: bool = False, scale: float = 1.0) -> Any:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        inputs: dict[str, Any] = {"x": scale * rng.standard_normal(shape), "approximate": approximate}
        if bias:
            inputs["bias"] = rng.standard_normal(shape[-1])
        return inputs

    return make


OPERATION = Operation(
    "geglu",
    geglu_forward,
    geglu_backward,
    activations=("x",),
    parameters=("bias",),
    gradients=("x", "bias"),
    cases=[
        Case("one row", _inputs(1, 2)),
        Case("odd sizes", _inputs(3, 5, 34)),
        Case("no rows", _inputs(0, 16)),
        Case("erf", _inputs(7, 66, approximate="none")),
        Case("large values", _inputs(7, 64, scale=30.0)),
        Case("large values, erf", _inputs(7, 64, approximate="none", scale=30.0)),
        Case("erf and bias", _inputs(130, 24, approximate="none", bias=True)),
        Case("bias", _inputs(130, 24, bias=True)),
        Case("2048 rows to 1024", _inputs(2048, 2048), timed=True, flops=10 * 2048 * 1024),
        Case("2048 rows to 1024, erf", _inputs(2048, 2048, approximate="none"), timed=True, flops=6 * 2048 * 1024),
    ],
    # A product of three rounded factors.
    tolerance=1.5,
)

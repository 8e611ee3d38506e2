"""Shapes that the linear layer is tested and timed on."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..common.cases import Case, Operation
from . import linear_backward, linear_forward


def _inputs(shape: tuple[int, ...], width: int, bias: bool = False) -> Any:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        inputs: dict[str, Any] = {
            "x": rng.standard_normal(shape),
            "weight": rng.standard_normal((width, shape[-1])) * max(shape[-1], 1) ** -0.5,
        }
        if bias:
            inputs["bias"] = rng.standard_normal(width)
        return inputs

    return make


def _timed(rows: int, inner: int, width: int) -> Case:
    return Case(
        f"{rows}x{inner} to {width}", _inputs((rows, inner), width), timed=True, flops=2.0 * rows * inner * width
    )


OPERATION = Operation(
    "matmul",
    linear_forward,
    linear_backward,
    activations=("x",),
    parameters=("weight", "bias"),
    gradients=("x", "weight", "bias"),
    cases=[
        Case("one row", _inputs((1, 8), 5)),
        Case("odd sizes", _inputs((3, 5, 33), 17)),
        Case("many rows", _inputs((300, 40), 24)),
        Case("few rows, wide", _inputs((3, 512), 1500)),
        Case("no rows", _inputs((0, 16), 8)),
        Case("inner size 1", _inputs((9, 1), 4)),
        Case("with bias", _inputs((70, 24), 40, bias=True)),
        Case("few rows, wide, with bias", _inputs((2, 5), 1100, bias=True)),
        _timed(2048, 256, 768),
        _timed(2048, 256, 2048),
        _timed(2048, 1024, 256),
    ],
    # A sum of hundreds of products in float32.
    tolerance=2.0,
    same_bits_on_any_threads=False,
)

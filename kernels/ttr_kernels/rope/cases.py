"""Shapes that rotary embedding is tested and timed on."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..common.cases import Case, Operation
from . import rope_backward, rope_cos_sin, rope_forward


def _inputs(*shape: int, dim: int | None = None, interleaved: bool = False, shared: bool = False) -> Any:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        rows = shape[1] if shared else int(np.prod(shape[:-2]))
        positions = rng.integers(0, 100000, rows)
        return {
            "x": rng.standard_normal(shape),
            "table": rope_cos_sin(positions, dim or shape[-1]),
            "interleaved": interleaved,
        }

    return make


OPERATION = Operation(
    "rope",
    rope_forward,
    rope_backward,
    activations=("x",),
    parameters=(),
    gradients=("x",),
    backward_flops=1.0,
    cases=[
        Case("one row", _inputs(1, 1, 2)),
        Case("half-split", _inputs(37, 3, 24)),
        Case("interleaved", _inputs(37, 3, 24, interleaved=True)),
        Case("part of the features", _inputs(70, 2, 20, dim=8)),
        Case("interleaved, part of the features", _inputs(70, 2, 20, dim=8, interleaved=True)),
        Case("no rows", _inputs(0, 2, 8)),
        Case("batched", _inputs(3, 50, 2, 16)),
        Case("batched, one table", _inputs(3, 50, 2, 16, shared=True)),
        Case("2048 rows, 16 heads of 32", _inputs(2048, 16, 32), timed=True, flops=3 * 2048 * 512),
        Case("2048 rows, interleaved", _inputs(2048, 16, 32, interleaved=True), timed=True, flops=3 * 2048 * 512),
    ],
)

"""Shapes that Time2Vec is tested and timed on."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..common.cases import Case, Operation
from . import time2vec_backward, time2vec_forward


def _inputs(rows: int, width: int, origin: float = 0.0) -> Any:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        frequency = np.exp(rng.uniform(-2, 2, width))
        if origin and width:
            # Feature 0 is linear: of order one over these times.
            frequency[0] = 1.0 / origin
        return {
            "times": origin + np.cumsum(rng.exponential(0.02, rows)),
            "frequency": frequency,
            "phase": rng.uniform(-3, 3, width),
        }

    return make


OPERATION = Operation(
    "time2vec",
    time2vec_forward,
    time2vec_backward,
    activations=(),
    parameters=("frequency", "phase"),
    gradients=("frequency", "phase"),
    cases=[
        Case("one row", _inputs(1, 2)),
        Case("linear feature only", _inputs(9, 1)),
        Case("no rows", _inputs(0, 8)),
        Case("odd sizes", _inputs(201, 33)),
        Case("2048x32", _inputs(2048, 32, 1e6), timed=True, flops=3 * 2048 * 32),
    ],
    # The gradient of a frequency weights rounding errors of the cosine by the largest times.
    tolerance=2.0,
)

"""Shapes that the log-normal mixture is tested and timed on."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..common.cases import Case, Operation
from . import log_normal_mixture_backward, log_normal_mixture_forward


def _inputs(rows: int, components: int, spread: float = 1.0) -> Any:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        return {
            "gaps": np.exp(spread * rng.standard_normal(rows)),
            "weight_logits": rng.standard_normal((rows, components)),
            "means": rng.standard_normal((rows, components)),
            "log_scales": 0.3 * rng.standard_normal((rows, components)),
        }

    return make


OPERATION = Operation(
    "log_normal_mixture",
    log_normal_mixture_forward,
    log_normal_mixture_backward,
    activations=("weight_logits", "means", "log_scales"),
    parameters=(),
    gradients=("weight_logits", "means", "log_scales"),
    cases=[
        Case("one component", _inputs(1, 1)),
        Case("no rows", _inputs(0, 4)),
        Case("odd sizes", _inputs(301, 7)),
        Case("far gaps", _inputs(50, 16, spread=6.0)),
        Case("2048x64", _inputs(2048, 64), timed=True, flops=10 * 2048 * 64),
    ],
    # A far gap's likelihood squares its distance, and with it the rounding of float32.
    tolerance=3.0,
)

"""Shapes that cross-entropy is tested and timed on."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..common.cases import Case, Operation
from . import (
    cross_entropy_backward,
    cross_entropy_forward,
    linear_cross_entropy_backward,
    linear_cross_entropy_forward,
)


def _targets(rng: np.random.Generator, rows: int, vocabulary: int, ignored: float) -> Any:
    targets = rng.integers(0, vocabulary, rows).astype(np.int32)
    targets[rng.random(rows) < ignored] = -1
    return targets


def _inputs(rows: int, vocabulary: int, ignored: float = 0.0, scale: float = 1.0, **options: float) -> Any:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        logits = scale * rng.standard_normal((rows, vocabulary))
        return {"logits": logits, "targets": _targets(rng, rows, vocabulary, ignored), **options}

    return make


def _linear_inputs(
    rows: int, width: int, vocabulary: int, ignored: float = 0.0, bias: bool = False, **options: float
) -> Any:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        inputs = {
            "x": rng.standard_normal((rows, width)),
            "weight": rng.standard_normal((vocabulary, width)) * width**-0.5,
            "targets": _targets(rng, rows, vocabulary, ignored),
            **options,
        }
        if bias:
            inputs["bias"] = rng.standard_normal(vocabulary)
        return inputs

    return make


OPERATION = Operation(
    "cross_entropy",
    cross_entropy_forward,
    cross_entropy_backward,
    activations=("logits",),
    parameters=(),
    gradients=("logits",),
    cases=[
        Case("one row", _inputs(1, 2)),
        Case("one class", _inputs(3, 1)),
        Case("no rows", _inputs(0, 5)),
        Case("odd sizes", _inputs(37, 33)),
        Case("all ignored", _inputs(5, 7, ignored=1.1)),
        Case("large logits", _inputs(20, 50, scale=50.0)),
        Case("label smoothing", _inputs(40, 50, label_smoothing=0.1)),
        Case("z-loss", _inputs(40, 50, z_loss=0.01)),
        Case("everything", _inputs(40, 50, ignored=0.3, label_smoothing=0.2, z_loss=0.01)),
        Case("512x4096", _inputs(512, 4096), timed=True, flops=4 * 512 * 4096),
    ],
)

LINEAR_OPERATION = Operation(
    "linear_cross_entropy",
    linear_cross_entropy_forward,
    linear_cross_entropy_backward,
    activations=("x",),
    parameters=("weight", "bias"),
    gradients=("x", "weight", "bias"),
    cases=[
        Case("one row", _linear_inputs(1, 3, 2)),
        Case("no rows", _linear_inputs(0, 3, 2)),
        Case("several chunks", _linear_inputs(50, 24, 40, rows_per_chunk=16)),
        Case("gradients kept scaled", _linear_inputs(50, 24, 40, rows_per_chunk=16, gradient_scale=1024.0)),
        Case("all ignored", _linear_inputs(9, 8, 5, ignored=1.1)),
        Case(
            "everything",
            _linear_inputs(70, 24, 40, ignored=0.3, bias=True, label_smoothing=0.1, z_loss=0.01, rows_per_chunk=33),
        ),
        # All three products are the forward's: it leaves the gradients, which the backward only scales.
        Case("2048x256 to 4096", _linear_inputs(2048, 256, 4096), timed=True, flops=6.0 * 2048 * 256 * 4096),
    ],
    backward_flops=0.0,
    # 16-bit logits are rounded once more than those of a single operation.
    tolerance=3.0,
    same_bits_on_any_threads=False,
)

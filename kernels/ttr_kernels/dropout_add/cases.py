"""Shapes that dropout is tested and timed on."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..common.cases import Case, Operation
from ..common.philox import philox_words
from . import dropout_add_backward, dropout_add_forward

_MASK = {"seed": 2**40 + 3, "offset": 2**33 + 1}
# The first element's word is the threshold itself: it is kept.
_RATE_AT_A_WORD = int(philox_words(np.zeros(1), **_MASK)[0, 0]) / 2**32


def _inputs(*shape: int, rate: float = 0.3, residual: bool = False, **options: Any) -> Any:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        inputs: dict[str, Any] = {"x": rng.standard_normal(shape), "rate": rate, **_MASK, **options}
        if residual:
            inputs["residual"] = rng.standard_normal(shape)
        return inputs

    return make


OPERATION = Operation(
    "dropout_add",
    dropout_add_forward,
    dropout_add_backward,
    activations=("x", "residual"),
    parameters=(),
    gradients=("x",),
    backward_flops=0.5,
    cases=[
        Case("one element", _inputs(1, 1)),
        Case("odd sizes", _inputs(3, 5, 33)),
        Case("many rows", _inputs(500, 70)),
        Case("nothing", _inputs(0, 16)),
        Case("rate 0", _inputs(7, 33, rate=0.0)),
        Case("rate 0 with residual", _inputs(7, 33, rate=0.0, residual=True)),
        Case("high rate", _inputs(7, 33, rate=0.99)),
        Case("a word at the threshold", _inputs(2, 5, rate=_RATE_AT_A_WORD)),
        Case("rows of a larger array", _inputs(9, 40, first_row=2**31)),
        Case("rows that begin within a call", _inputs(37, 33, first_row=7, residual=True)),
        Case("with residual", _inputs(70, 41, residual=True)),
        Case("2048x256 with residual", _inputs(2048, 256, rate=0.1, residual=True), timed=True, flops=2 * 2048 * 256),
    ],
)

"""The form in which each operation states its cases: one table serves the tests and the microbenchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Case:
    """Inputs of one call.

    Attributes:
        name: what is particular about it, e.g. "one row".
        make: random generator -> keyword arguments of the forward, floating-point arrays in float64.
        timed: large enough to be worth timing (`ttr-gpu bench kernels`); the tests leave timed cases out.
        flops: floating-point operations of the forward (an exp, logarithm or sine counts as one), if it is timed.
    """

    name: str
    make: Callable[[np.random.Generator], dict[str, Any]]
    timed: bool = False
    flops: float = 0.0


@dataclass(frozen=True)
class Operation:
    """A forward/backward pair (or a forward alone) and what a test must know to check it.

    Attributes:
        name: of the slice.
        forward: `forward(**inputs, out=None) -> (y, saved)`.
        backward: `backward(dy, saved, d<name>=None, ...) -> gradients` in the order of `gradients`; None for an
            operation of inference alone.
        activations: inputs cast to the dtype under test; their gradients are written.
        parameters: inputs that stay float32 whatever the dtype; their gradients accumulate.
        gradients: the inputs that have a gradient, in the order in which the backward returns them.
        cases: the table.
        backward_flops: floating-point operations of the backward, over those of the forward.
        tolerance: multiplies the allowed error; above 1 only with a reason.
        same_bits_on_any_threads: False where BLAS does the work: its rounding depends on the size of its blocks.
    """

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None
    activations: tuple[str, ...]
    parameters: tuple[str, ...]
    gradients: tuple[str, ...]
    cases: list[Case] = field(default_factory=list)
    backward_flops: float = 2.0
    tolerance: float = 1.0
    same_bits_on_any_threads: bool = True

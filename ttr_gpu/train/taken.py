"""Steps that the device has been given: what they came to can be read later, of several at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ttr_kernels.common.arrays import array_module, is_array

from ..data.batches import Batch


@dataclass(frozen=True)
class Taken:
    """A step.

    Attributes:
        batches: of this process, those with targets, and how many these are.
        values: losses of each of them (of all, of types, of gaps), and last the norm of the step's gradients: numbers,
            or (n,) float64 on a GPU that nobody has waited for.
        count: targets of all processes, at least 1; tokens, flops: of all too.
        rate: the learning rate; scale: of the loss; begin: when the step began; waited: seconds, for its batches.
    """

    step: int
    batches: list[tuple[Batch, int]]
    values: Any
    count: int
    tokens: int
    flops: float
    rate: float
    scale: float
    begin: float
    waited: float


def together(numbers: Sequence[Any]) -> Any:
    """Numbers as they are; those on a GPU as one array there, of its own memory, which is not waited for."""
    if not is_array(numbers[-1]):
        return [float(number) for number in numbers]
    xp = array_module(numbers[-1])
    return xp.stack([number.astype(np.float64).reshape(()) for number in numbers])


def read(steps: Sequence[Taken]) -> list[list[float]]:
    """`values` of each step as numbers. A GPU is waited for once."""
    if not is_array(steps[0].values):
        return [step.values for step in steps]
    xp = array_module(steps[0].values)
    all_values = xp.concatenate([step.values for step in steps]).get().tolist()
    ends = np.cumsum([len(step.values) for step in steps]).tolist()
    return [all_values[end - len(step.values) : end] for step, end in zip(steps, ends, strict=True)]

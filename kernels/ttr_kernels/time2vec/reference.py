"""Time2Vec in float64, as the formula stands in the docstring."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..common.arrays import Array

if TYPE_CHECKING:
    from . import Time2VecSaved


def forward(times: Array, frequency: Array, phase: Array, out: Array) -> None:
    angle = times[:, None] * frequency + phase
    out[...] = np.where(np.arange(len(frequency)) == 0, angle, np.sin(angle))


def backward(dy: Array, saved: Time2VecSaved, dfrequency: Array, dphase: Array) -> None:
    angle = saved.times[:, None] * saved.frequency + saved.phase
    dangle = dy * np.where(np.arange(dy.shape[1]) == 0, 1.0, np.cos(angle))
    dfrequency += saved.times @ dangle
    dphase += dangle.sum(axis=0)

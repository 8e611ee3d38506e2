"""Embedding in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..common.arrays import Array

if TYPE_CHECKING:
    from . import EmbeddingSaved


def forward(indices: Array, table: Array, out: Array) -> None:
    out[...] = table[indices]


def backward(dy: Array, saved: EmbeddingSaved, dtable: Array) -> None:
    np.add.at(dtable, saved.indices, dy)

"""The dtypes in which a model computes: the one place where their names are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from .errors import UserError


@dataclass(frozen=True)
class Precision:
    """Weights, activations and matrix products in `compute`; parameters, gradients and statistics in `master`."""

    name: str
    compute: np.dtype[Any]
    master: np.dtype[Any]


_PRECISIONS = {
    "float32": Precision("float32", np.dtype(np.float32), np.dtype(np.float32)),
    "bfloat16": Precision("bfloat16", np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)),
    "float16": Precision("float16", np.dtype(np.float16), np.dtype(np.float32)),
    # Runs the float64 reference of every operation: slow and exact, for tests.
    "float64": Precision("float64", np.dtype(np.float64), np.dtype(np.float64)),
}


def precision(name: str) -> Precision:
    """The precision of this name: float32, bfloat16, float16 (or float64, the reference)."""
    if name not in _PRECISIONS:
        raise UserError(f"precision: got {name!r}, expected one of float32, bfloat16, float16")
    return _PRECISIONS[name]

"""Shapes that embedding is tested and timed on."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..common.cases import Case, Operation
from . import embedding_backward, embedding_forward


def _inputs(shape: tuple[int, ...], vocabulary: int, width: int, dtype: Any = np.int32) -> Any:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        return {
            "indices": rng.integers(0, vocabulary, shape).astype(dtype),
            "table": rng.standard_normal((vocabulary, width)),
        }

    return make


OPERATION = Operation(
    "embedding",
    embedding_forward,
    embedding_backward,
    activations=(),
    parameters=("table",),
    gradients=("table",),
    cases=[
        Case("one row", _inputs((1,), 1, 3)),
        Case("no rows", _inputs((0,), 4, 3)),
        Case("one index throughout", _inputs((500,), 1, 20)),
        Case("batched, int64", _inputs((3, 50), 17, 33, np.int64)),
        Case("most rows unused", _inputs((40,), 1000, 16)),
        Case("2048 of 4096x256", _inputs((2048,), 4096, 256), timed=True),
    ],
    # Hundreds of equal-sized terms meet in one row.
    tolerance=3.0,
)

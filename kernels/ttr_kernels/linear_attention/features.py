"""Orthogonal random directions that follow from a seed alone: a model keeps the seed, not the numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..common.arrays import FLOAT32, Array
from ..common.philox import philox_words


def orthogonal_features(count: int, dim: int, seed: int, dtype: Any = FLOAT32) -> Array:
    """(count, dim) rows ω: each like a standard normal vector, orthogonal to the others of its block of `dim` rows.

    Orthogonal directions cover space more evenly than independent ones, and the error of the features is smaller for
    it (Choromanski et al. 2021, sec. 3). Normal numbers are drawn by Philox and Box & Muller (1958), so that a seed
    means the same rows, to rounding, wherever it is used.

    Raises:
        ValueError: a count or dim below 1, or a negative seed.
    """
    for name, value, least in (("count", count, 1), ("dim", dim, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name}: got {value}, expected at least {least}")
    blocks = -(-count // dim)
    directions, lengths = (_normal(blocks * dim * dim, seed, part).reshape(blocks, dim, dim) for part in (0, 1))
    for row in range(dim):
        # Gram–Schmidt, twice: once leaves what rounding brings in.
        for _ in range(2):
            along = directions[:, :row] @ directions[:, row, :, None]
            directions[:, row] -= (along * directions[:, :row]).sum(axis=1)
        directions[:, row] /= np.linalg.norm(directions[:, row], axis=-1, keepdims=True)
    # The length of a normal vector, independent of its direction.
    rows = directions * np.linalg.norm(lengths, axis=-1, keepdims=True)
    features: Array = rows.reshape(-1, dim)[:count].astype(dtype)
    return features


def _normal(count: int, seed: int, part: int) -> Array:
    words = philox_words(np.arange(-(-count // 4)), seed, part).astype(np.float64)
    uniform = (words + 0.5) * 2.0**-32
    radius, angle = np.sqrt(-2 * np.log(uniform[:, :2])), 2 * np.pi * uniform[:, 2:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)[:count]

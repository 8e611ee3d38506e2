"""Small packed batches for tests of layers and of the model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Packed:
    tokens: np.ndarray
    times: np.ndarray
    cu_seqlens: np.ndarray
    targets: np.ndarray
    target_times: np.ndarray


def packed(lengths: list[int], vocabulary: int, seed: int = 0, ignored: float = 0.1) -> Packed:
    """Random tokens with gaps over several orders of magnitude, some without a target."""
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    targets = rng.integers(0, vocabulary, total).astype(np.int32)
    targets[rng.random(total) < ignored] = -1
    tokens = rng.integers(0, vocabulary, total).astype(np.int32)
    times = np.cumsum(np.exp(rng.uniform(-2, 4, total)))
    return Packed(
        tokens=tokens,
        times=times,
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        targets=targets,
        # After the last position of a sequence there is an event too: windows are cut from longer sequences.
        target_times=times + np.append(np.diff(times), 2.5),
    )

"""What `benchmarks step` steps on: models, and batches of random tokens at random times."""

from __future__ import annotations

import csv
import gzip
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ttr_gpu.config import PRESETS, ModelConfig

EVENTS = Path(__file__).parents[1] / "examples" / "data" / "stackoverflow.csv.gz"


@dataclass(frozen=True)
class Batch:
    """Packed tokens; every position has a target, the token that follows."""

    tokens: np.ndarray[Any, Any]
    times: np.ndarray[Any, Any]
    cu_seqlens: np.ndarray[Any, Any]
    targets: np.ndarray[Any, Any]

    @property
    def target_times(self) -> np.ndarray[Any, Any]:
        """Of any value: these models do not predict times."""
        return self.times


@dataclass(frozen=True)
class Shape:
    """A model and the lengths of the sequences of its batch."""

    description: str
    model: ModelConfig
    lengths: tuple[int, ...]

    def batch(self) -> Batch:
        """The batch, the same on every side."""
        rng = np.random.default_rng(0)
        tokens = [rng.integers(0, self.model.vocabulary_size, length + 1).astype(np.int32) for length in self.lengths]
        times = [np.cumsum(rng.exponential(self.model.time_scale, length)) for length in self.lengths]
        starts = np.cumsum([0, *self.lengths], dtype=np.int32)
        inputs, targets = (np.concatenate([t[part] for t in tokens]) for part in (slice(None, -1), slice(1, None)))
        return Batch(inputs, np.concatenate(times), starts, targets)


def shape(name: str, precision: str = "float32") -> Shape:
    """The shape of this name, in this precision."""
    description, preset, vocabulary, lengths = _SHAPES[name]
    model = ModelConfig.model_validate({"vocabulary_size": vocabulary, "precision": precision, **PRESETS[preset]})
    return Shape(description, model, lengths or _lengths_of_events())


_SHAPES: dict[str, tuple[str, str, int, tuple[int, ...]]] = {
    "reference": ("8 sequences of 256, width 256, 4 layers", "tiny", 4096, (256,) * 8),
    "gpt2": ("1 sequence of 1024, width 768, 12 layers (GPT-2 124M)", "gpt2", 50257, (1024,)),
    "long": ("1 sequence of 8192, width 256, 4 layers", "tiny", 4096, (8192,)),
    "events": ("sequences as long as the shipped events', width 256, 4 layers", "tiny", 4096, ()),
}
SHAPES = tuple(_SHAPES)


def _lengths_of_events(tokens: int = 2048) -> tuple[int, ...]:
    """Lengths of the first sequences of the shipped events that together have about so many."""
    lengths: list[int] = []
    with gzip.open(EVENTS, "rt", newline="") as file:
        for _, rows in groupby(csv.DictReader(file), key=lambda row: row["sequence_id"]):
            lengths.append(sum(1 for _ in rows) - 1)
            if sum(lengths) >= tokens:
                break
    return tuple(lengths)

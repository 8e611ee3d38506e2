"""What enters the first block: the token's embedding, and the time at which it happened."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ttr_kernels.common.arrays import Array
from ttr_kernels.dropout_add import dropout_add_forward
from ttr_kernels.embedding import EmbeddingSaved, embedding_backward, embedding_forward

from ..precision import Precision
from .parameter import Parameter, normal
from .sequences import Sequences
from .time2vec import TimeEncoding, TimeEncodingSaved


@dataclass(frozen=True)
class TimedEmbeddingSaved:
    """What the forward keeps for the backward."""

    tokens: EmbeddingSaved
    time: TimeEncodingSaved | None


class TimedEmbedding:
    """y = table[token] + time encoding, or the table's row alone."""

    def __init__(
        self, vocabulary_size: int, embed_dim: int, *, time: TimeEncoding | None, precision: Precision,
        rng: np.random.Generator, name: str,
    ) -> None:  # fmt: skip
        self.precision, self.time = precision, time
        self.table = Parameter(f"{name}.weight", normal(rng, (vocabulary_size, embed_dim), 0.02, precision.master))

    @property
    def parameters(self) -> list[Parameter]:
        """All parameters, in the order of the forward."""
        return [self.table, *(self.time.parameters if self.time is not None else [])]

    def forward(self, tokens: Array, sequences: Sequences) -> tuple[Array, TimedEmbeddingSaved]:
        """tokens (total,) int32 -> y (total, C)."""
        y, saved = embedding_forward(tokens, self.table.value, dtype=self.precision.compute)
        if self.time is None:
            return y, TimedEmbeddingSaved(saved, None)
        encoded, time = self.time.forward(sequences)
        y, _ = dropout_add_forward(y, encoded, rate=0.0, out=y)
        return y, TimedEmbeddingSaved(saved, time)

    def backward(self, dy: Array, saved: TimedEmbeddingSaved, accumulate: bool = True) -> None:
        """Adds to the parameters' gradients, or writes that of the time encoding's matrix."""
        embedding_backward(dy, saved.tokens, dtable=self.table.gradient)
        if self.time is not None and saved.time is not None:
            self.time.backward(dy, saved.time, accumulate)

"""How well a model predicts a split: cross-entropy, accuracy, and for text bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..data.batches import evaluation_batches
from ..data.dataset import Split
from ..model import TransformerModel


@dataclass(frozen=True)
class Evaluation:
    """Result over one split.

    Attributes:
        tokens: targets scored: every token but each sequence's first.
        cross_entropy: nats per target.
        accuracy: share of targets that were the likeliest token.
        bits_per_byte: of the documents' UTF-8, each terminator a byte; None for events or a part of a split.
    """

    split: str
    tokens: int
    cross_entropy: float
    accuracy: float
    bits_per_byte: float | None

    @property
    def perplexity(self) -> float:
        """exp(cross_entropy)."""
        return math.exp(min(self.cross_entropy, 700.0))


def evaluate_split(
    model: TransformerModel, split: Split, *, tokens_per_batch: int, max_length: int, stride: int | None = None,
    limit_tokens: int | None = None, stopped: Callable[[], bool] | None = None,
) -> Evaluation:  # fmt: skip
    """Score every target of a split (or the first `limit_tokens`), in windows of `max_length`, without dropout.

    `stopped` is asked before every batch whether to leave the rest out.
    """
    nats, right, count = 0.0, 0, 0
    for batch in evaluation_batches(
        split, tokens_per_batch=max(tokens_per_batch, max_length), max_length=max_length, stride=stride,
        limit_tokens=limit_tokens,
    ):  # fmt: skip
        if stopped is not None and stopped():
            break
        losses, correct = model.evaluate_batch(batch)
        nats += float(losses.sum(dtype=np.float64))
        right += int(correct[batch.targets >= 0].sum())
        count += int((batch.targets >= 0).sum())
    whole = count == split.token_count - split.sequences
    bits = nats / math.log(2) / split.bytes if split.bytes and whole else None
    return Evaluation(split.name, count, nats / max(count, 1), right / max(count, 1), bits)

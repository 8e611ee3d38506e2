"""How well a model predicts a split: likelihood of types and gaps, accuracy, and for text bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..backend import to_host
from ..data.batches import Share, evaluation_batches
from ..data.dataset import Split
from ..distributed.communicator import LOCAL, Communicator, totals
from ..model import TransformerModel
from .gap_figures import GapFigures, GapScorer, in_parts
from .ranks import ranks, top_shares


@dataclass(frozen=True)
class Evaluation:
    """Result over one split.

    Attributes:
        tokens: targets scored: every token but each sequence's first.
        cross_entropy: nats per target, a mean over all targets (not of means over sequences).
        accuracy: share of targets that were the likeliest token.
        bits_per_byte: of the documents' UTF-8, each terminator a byte; None for events or a part of a split.
        time_nll: −log p(gap) in nats per target, the density per unit of the data set's time; None without a time head.
        protocol: what was scored: likelihoods of other protocols are other numbers.
        top_k: share of targets among the k likeliest tokens; gaps: all figures of the gaps' distributions. Both of
            `evaluate_in_detail` alone.
    """

    split: str
    tokens: int
    cross_entropy: float
    accuracy: float
    bits_per_byte: float | None
    time_nll: float | None = None
    protocol: str = ""
    top_k: dict[int, float] | None = None
    gaps: GapFigures | None = None

    def loss(self, time_weight: float) -> float:
        """What training minimises: cross_entropy, and time_weight times time_nll."""
        return self.cross_entropy + (0.0 if self.time_nll is None else time_weight * self.time_nll)

    @property
    def perplexity(self) -> float:
        """exp(cross_entropy)."""
        return math.exp(min(self.cross_entropy, 700.0))


def protocol(model: TransformerModel) -> str:
    """What an evaluation of this model scores."""
    given = "gap given the next type, " if model.config.time_given_type else ""
    return f"{given}first event of a sequence not scored, no survival term"


def evaluate_split(
    model: TransformerModel, split: Split, *, tokens_per_batch: int, max_length: int, stride: int | None = None,
    limit_tokens: int | None = None, stopped: Callable[[], bool] | None = None, communicator: Communicator = LOCAL,
) -> Evaluation:  # fmt: skip
    """Score every target of a split (or the first `limit_tokens`), in windows of `max_length`, without dropout.

    `stopped` is asked before every batch whether to leave the rest out. Ranks share the batches and add up what they
    found: the result is the same on all, and to rounding that of one process.
    """
    nats, time_nats, right, count = 0.0, 0.0, 0, 0
    for batch in evaluation_batches(
        split, tokens_per_batch=max(tokens_per_batch, max_length), max_length=max_length, stride=stride,
        limit_tokens=limit_tokens, share=Share(communicator.rank, communicator.size, communicator.size),
    ):  # fmt: skip
        if stopped is not None and stopped():
            break
        with model.arena.step():
            scores = model.evaluate_batch(batch)
        nats += float(scores.losses.sum(dtype=np.float64))
        if scores.time_losses is not None:
            time_nats += float(scores.time_losses.sum(dtype=np.float64))
        right += int(scores.correct[batch.targets >= 0].sum())
        count += int((batch.targets >= 0).sum())
    nats, time_nats, *counted = totals(communicator, nats, time_nats, right, count)
    right, count = (int(value) for value in counted)
    whole = count == split.token_count - split.sequences
    bits = nats / math.log(2) / split.bytes if split.bytes and whole else None
    time_nll = None if model.time_head is None else time_nats / max(count, 1)
    return Evaluation(split.name, count, nats / max(count, 1), right / max(count, 1), bits, time_nll, protocol(model))


def evaluate_in_detail(
    model: TransformerModel, split: Split, *, tokens_per_batch: int, max_length: int, stride: int | None = None,
    step: float | None = None,
) -> Evaluation:  # fmt: skip
    """`evaluate_split` with everything that is known to be asked: top-k, errors of the median gap, calibration.

    Args:
        step: of the clock's grid, for the dequantised likelihood; None: there is none.
    """
    nats, count, counts = 0.0, 0, np.zeros(model.config.vocabulary_size, np.int64)
    scorer = None if model.time_head is None else GapScorer(step)
    for batch in evaluation_batches(
        split, tokens_per_batch=max(tokens_per_batch, max_length), max_length=max_length, stride=stride
    ):  # fmt: skip
        rows = np.flatnonzero(batch.targets >= 0)
        outputs = model.outputs(batch)[model.backend.put(rows)]
        count += len(rows)
        for part in in_parts(len(rows), model.config.vocabulary_size):
            logits, targets = to_host(model.next_logits(outputs[part])).astype(np.float64), batch.targets[rows[part]]
            own = np.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
            nats += float((np.logaddexp.reduce(logits, axis=1) - own).sum())
            counts += np.bincount(ranks(logits, targets), minlength=len(counts))
        if scorer is not None and model.time_head is not None:
            gaps = model.time_head.positive(batch.target_times[rows] - batch.times[rows])
            for part in in_parts(len(rows), model.time_head.marginal_components):
                answer, known = model.next_gap(outputs[part]), None
                if model.time_head.types is not None:
                    known = model.next_gap(outputs[part], batch.targets[rows[part]])
                scorer.add(answer, gaps[part], known)
    figures = None if scorer is None else scorer.figures()
    whole = count == split.token_count - split.sequences
    return Evaluation(
        split.name, count, nats / max(count, 1), float(counts[0]) / max(count, 1),
        nats / math.log(2) / split.bytes if split.bytes and whole else None,
        None if figures is None else figures.nll, protocol(model), top_shares(counts), figures,
    )  # fmt: skip

"""How well a model predicts a split: likelihood of types and gaps, accuracy, and for text bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..backend import CENSORED, to_host
from ..config import ModelConfig
from ..data.batches import Share, evaluation_batches, last_windows
from ..data.dataset import Split
from ..distributed.communicator import LOCAL, Communicator, totals
from ..errors import UserError
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
        survival: −log P(no event from a sequence's last one to the end of observation), all of them over the number of
            targets; None if not asked for.
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
    survival: float | None = None
    top_k: dict[int, float] | None = None
    gaps: GapFigures | None = None

    def loss(self, time_weight: float) -> float:
        """What training minimises: cross_entropy, and time_weight times what is asked of time: gaps, and survival."""
        return self.cross_entropy + time_weight * ((self.time_nll or 0.0) + (self.survival or 0.0))

    @property
    def nll(self) -> float:
        """Nats per target of everything that was scored: type, gap, and survival if asked for."""
        return self.loss(1.0)

    @property
    def perplexity(self) -> float:
        """exp(cross_entropy)."""
        return math.exp(min(self.cross_entropy, 700.0))


def protocol(model: TransformerModel, split: Split, survival: bool = False) -> str:
    """What an evaluation of this model scores."""
    given = "gap given the next type, " if model.config.time_given_type else ""
    first = "scored from the start of observation" if split.first_scored else "not scored"
    last = "with the survival term up to the end of observation" if survival else "no survival term"
    return f"{given}first event of a sequence {first}, {last}"


def evaluate_split(
    model: TransformerModel, split: Split, *, tokens_per_batch: int, max_length: int, stride: int | None = None,
    limit_tokens: int | None = None, stopped: Callable[[], bool] | None = None, communicator: Communicator = LOCAL,
    survival: bool = False,
) -> Evaluation:  # fmt: skip
    """Score every target of a split (or the first `limit_tokens`), in windows of `max_length`, without dropout.

    `stopped` is asked before every batch whether to leave the rest out. With `survival` the censored intervals count,
    too, each in the window of its sequence's last event. Ranks share the batches and add up what they
    found: the result is the same on all, and to rounding that of one process.
    """
    if survival:
        check_survival(split, model.config, "survival")
    nats, time_nats, survived, right, count = 0.0, 0.0, 0.0, 0, 0
    for batch in evaluation_batches(
        split, tokens_per_batch=max(tokens_per_batch, max_length), max_length=max_length, stride=stride,
        limit_tokens=limit_tokens, share=Share(communicator.rank, communicator.size, communicator.size),
        survival=survival,
    ):  # fmt: skip
        if stopped is not None and stopped():
            break
        with model.arena.step():
            scores = model.evaluate_batch(batch)
        nats += float(scores.losses.sum(dtype=np.float64))
        if scores.time_losses is not None:
            of_survival = float(scores.time_losses[batch.targets == CENSORED].sum(dtype=np.float64))
            time_nats += float(scores.time_losses.sum(dtype=np.float64)) - of_survival
            survived += of_survival
        right += int(scores.correct[batch.targets >= 0].sum())
        count += int((batch.targets >= 0).sum())
    nats, time_nats, survived, *counted = totals(communicator, nats, time_nats, survived, right, count)
    right, count = (int(value) for value in counted)
    whole = count == split.token_count - split.sequences
    bits = nats / math.log(2) / split.bytes if split.bytes and whole else None
    time_nll = None if model.time_head is None else time_nats / max(count, 1)
    return Evaluation(
        split.name, count, nats / max(count, 1), right / max(count, 1), bits, time_nll,
        protocol(model, split, survival), survived / max(count, 1) if survival else None,
    )  # fmt: skip


def evaluate_in_detail(
    model: TransformerModel, split: Split, *, tokens_per_batch: int, max_length: int, stride: int | None = None,
    step: float | None = None, survival: bool = False,
) -> Evaluation:  # fmt: skip
    """`evaluate_split` with everything that is known to be asked: top-k, errors of the median gap, calibration.

    Args:
        step: of the clock's grid, for the dequantised likelihood; None: there is none.
        survival: count the censored intervals, too. See `survival_nats`.
    """
    nats, count, counts = 0.0, 0, np.zeros(model.config.vocabulary_size, np.int64)
    scorer = None if model.time_head is None else GapScorer(step)
    components = 0 if model.time_head is None else model.time_head.marginal_components
    for batch in evaluation_batches(
        split, tokens_per_batch=max(tokens_per_batch, max_length), max_length=max_length, stride=stride
    ):  # fmt: skip
        rows = np.flatnonzero(batch.targets >= 0)
        outputs = model.outputs(batch)[model.backend.put(rows)]
        count += len(rows)
        if model.time_head is not None:
            gaps = model.time_head.positive(batch.target_times[rows] - batch.times[rows])
        for part in in_parts(len(rows), max(model.config.vocabulary_size, components)):
            head, targets = model.next_logits(outputs[part]), batch.targets[rows[part]]
            logits = to_host(head).astype(np.float64)
            own = np.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
            nats += float((np.logaddexp.reduce(logits, axis=1) - own).sum())
            counts += np.bincount(ranks(logits, targets), minlength=len(counts))
            if scorer is not None and model.time_head is not None:
                answer, known = model.next_gap(outputs[part], logits=head), None
                if model.time_head.types is not None:
                    known = model.next_gap(outputs[part], targets)
                scorer.add(answer, gaps[part], known)
    figures = None if scorer is None else scorer.figures()
    whole = count == split.token_count - split.sequences
    return Evaluation(
        split.name, count, nats / max(count, 1), float(counts[0]) / max(count, 1),
        nats / math.log(2) / split.bytes if split.bytes and whole else None,
        None if figures is None else figures.nll, protocol(model, split, survival),
        survival_nats(model, split, tokens_per_batch, max_length) / max(count, 1) if survival else None,
        top_shares(counts), figures,
    )  # fmt: skip


def check_survival(split: Split, config: ModelConfig, option: str) -> None:
    """UserError, naming the option, where the end of observation is not known or the model does not answer for time."""
    if split.observed_until is None:
        raise UserError(
            f"{option}: {split.path} does not say when observation ended; preprocess it with --observation START,END"
        )
    if not config.time_components:
        raise UserError(f"{option}: this model does not model time (model.time_components is 0)")


def survival_nats(model: TransformerModel, split: Split, tokens_per_batch: int, max_length: int) -> float:
    """Σ −log P(gap > end of observation − last event) over all sequences, in nats.

    Raises UserError as `check_survival` does.
    """
    check_survival(split, model.config, "--survival")
    assert model.time_head is not None
    nats = 0.0
    for batch in last_windows(split, tokens_per_batch=tokens_per_batch, max_length=max_length):
        last = batch.cu_seqlens[1:] - 1
        outputs, ages = model.outputs(batch)[model.backend.put(last)], split.observed_until - batch.times[last]
        for part in in_parts(len(last), model.time_head.marginal_components):
            nats -= float(model.next_gap(outputs[part]).log_survival(ages[part]).sum())
    return nats

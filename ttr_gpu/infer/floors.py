"""What a model must beat to have learned something: n-grams and marginal distributions of gaps for events, bzip2 for
text."""

from __future__ import annotations

import bz2
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.dataset import Dataset, Split
from ..nn.gap_distribution import GapDistribution
from .gap_figures import GapFigures, GapScorer, in_parts
from .ranks import TOP, ranks, top_shares

# Sizes beyond which a floor is taken on a part: it is a yardstick, not the purpose.
_MOST_EVENTS, _MOST_TEXT = 1 << 22, 1 << 25


@dataclass(frozen=True)
class Floor:
    """A simple method's result on the same split.

    Attributes:
        value: in `unit`, "nats" or "bits per byte".
        of: what is predicted, "type", "time" or "text".
        top_k: share of targets among the k likeliest types.
        gaps: all figures of a distribution of gaps.
        survival: −log P(no event from a sequence's last one to the end of observation), summed, over the gaps scored.
    """

    name: str
    value: float
    unit: str
    accuracy: float | None = None
    of: str = "type"
    top_k: dict[int, float] | None = None
    gaps: GapFigures | None = None
    survival: float | None = None


def lowest(floors: list[Floor], of: str) -> Floor | None:
    """The best simple method for "type", "time" or "text"."""
    return min((floor for floor in floors if floor.of == of), key=lambda floor: floor.value, default=None)


def gap_floors(train: Split, test: Split, zero_gap: float, step: float | None = None) -> list[Floor]:
    """Distributions of the gap without a history, fitted to the training gaps by maximum likelihood.

    One log-normal, with all figures that a model has, and one exponential (a Poisson process of constant rate). A gap
    of zero counts as `zero_gap`, as in a model; `step` is that of the clock's grid.
    """
    fitted, scored = (_gaps(split) for split in (train, test))
    fitted, scored = (np.where(gaps > 0, gaps, zero_gap) for gaps in (fitted, scored))
    logs, mean = np.log(fitted), float(fitted.mean())
    scorer, log_scale = GapScorer(step), math.log(max(float(logs.std()), 1e-6))
    for part in in_parts(len(scored), 1):
        shape = len(scored[part]), 1
        marginal = GapDistribution(np.zeros(shape), np.full(shape, float(logs.mean())), np.full(shape, log_scale))
        scorer.add(marginal, scored[part])
    figures = scorer.figures()
    exponential = math.log(mean) + float(scored.mean()) / mean
    survivals: tuple[float | None, float | None] = (None, None)
    if test.observed_until is not None:
        count = min(test.token_count, _MOST_EVENTS)
        ends = test.offsets[1:]
        ages = test.observed_until - test.read(0, count)[1][ends[ends <= count] - 1]
        columns = np.zeros((len(ages), 1))
        log_survival = GapDistribution(columns, columns + float(logs.mean()), columns + log_scale).log_survival(ages)
        survivals = -float(log_survival.sum()) / len(scored), float(ages.sum()) / mean / len(scored)
    return [
        Floor("log-normal", figures.nll, "nats", of="time", gaps=figures, survival=survivals[0]),
        Floor("exponential", exponential, "nats", of="time", survival=survivals[1]),
    ]


def _gaps(split: Split) -> Any:
    """Gaps between neighbouring events of a split's sequences."""
    count = min(split.token_count, _MOST_EVENTS)
    gaps = np.diff(split.read(0, count)[1])
    inside = np.ones(len(gaps), bool)
    starts = split.offsets[1:-1]
    inside[starts[starts < count] - 1] = False
    return gaps[inside]


def event_floors(train: Split, test: Split, vocabulary: int, orders: int = 3) -> list[Floor]:
    """Witten–Bell n-grams (Witten & Bell 1991, method C, with back-off by interpolation) of order 0 .. `orders`.

    Order n predicts a type from the n types before it; a sequence's first event is not scored. Orders whose contexts do
    not fit 64 bits are left out.
    """
    fits = max(k for k in range(orders + 1) if vocabulary ** (k + 1) < 2**62)
    trained, train_position = _events(train)
    tested, test_position = _events(test)
    scored = test_position > 0
    # P(w) of order −1 is uniform.
    probability = np.full((len(tested), vocabulary), 1.0 / vocabulary) if vocabulary <= 256 else None
    own = np.full(len(tested), 1.0 / vocabulary)
    floors = []
    for order in range(fits + 1):
        context, valid = _contexts(trained, train_position, order, vocabulary)
        wanted, has = _contexts(tested, test_position, order, vocabulary)
        counts = _Counts(context[valid], trained[valid])
        own = np.where(has, counts.interpolate(wanted, tested, own), own)
        accuracy = shares = None
        if probability is not None:
            for kind in range(vocabulary):
                kinds = np.full(len(tested), kind)
                better = counts.interpolate(wanted, kinds, probability[:, kind])
                probability[:, kind] = np.where(has, better, probability[:, kind])
            accuracy = float((probability.argmax(axis=1) == tested)[scored].mean())
            shares = top_shares(np.bincount(ranks(probability, tested)[scored], minlength=max(TOP)))
        nats = float(-np.log(own[scored]).mean())
        floors.append(Floor(f"n-gram of order {order}", nats, "nats", accuracy, top_k=shares))
    return floors


def text_floors(dataset: Dataset) -> list[Floor]:
    """bzip2 -9 of all documents, one a line: it learns as it reads, so it sees everything before what it predicts."""
    tokenizer = dataset.tokenizer()
    parts: list[bytes] = []
    size = 0
    for name in dataset.splits:
        split = dataset.split(name)
        for begin in range(0, split.token_count, 1 << 20):
            tokens, _ = split.read(begin, min(begin + (1 << 20), split.token_count))
            pieces = np.split(tokens, np.flatnonzero(tokens == tokenizer.end) + 1)
            # The tokenizer drops special tokens; each document becomes a line.
            text = "".join(
                tokenizer.decode(piece) + ("\n" if len(piece) and piece[-1] == tokenizer.end else "")
                for piece in pieces
            )
            parts.append(text.encode())
            size += len(parts[-1])
            if size >= _MOST_TEXT:
                break
    text_bytes = b"".join(parts)[:_MOST_TEXT]
    bits = 8.0 * len(bz2.compress(text_bytes, 9)) / max(1, len(text_bytes))
    return [Floor("bzip2", bits, "bits per byte", of="text")]


class _Counts:
    """How often each token followed each context."""

    def __init__(self, contexts: Any, tokens: Any) -> None:
        self.contexts, inverse = np.unique(contexts, return_inverse=True)
        self.width = int(tokens.max(initial=0)) + 1
        pairs, self.pair_counts = np.unique(inverse * self.width + tokens, return_counts=True)
        self.pairs = pairs
        self.totals = np.bincount(inverse, minlength=len(self.contexts))
        self.distinct = np.bincount(pairs // self.width, minlength=len(self.contexts))

    def interpolate(self, contexts: Any, tokens: Any, lower: Any) -> Any:
        """(c(h w) + T(h) P_lower(w)) / (c(h) + T(h)); P_lower where the context was never seen."""
        index = np.minimum(np.searchsorted(self.contexts, contexts), len(self.contexts) - 1)
        seen = self.contexts[index] == contexts
        key = index * self.width + tokens
        at = np.minimum(np.searchsorted(self.pairs, key), len(self.pairs) - 1)
        count = np.where((self.pairs[at] == key) & (tokens < self.width), self.pair_counts[at], 0)
        distinct, total = self.distinct[index], self.totals[index]
        return np.where(seen, (count + distinct * lower) / (total + distinct), lower)


def _events(split: Split) -> tuple[Any, Any]:
    """Tokens and the position of each in its sequence."""
    count = min(split.token_count, _MOST_EVENTS)
    tokens, _ = split.read(0, count)
    starts = split.offsets[np.searchsorted(split.offsets, np.arange(count), "right") - 1]
    return tokens.astype(np.int64), np.arange(count) - starts


def _contexts(tokens: Any, position: Any, order: int, vocabulary: int) -> tuple[Any, Any]:
    """The `order` tokens before each as one number, and where there are so many."""
    key = np.zeros(len(tokens), np.int64)
    for back in range(1, order + 1):
        key[back:] += tokens[:-back] * vocabulary ** (back - 1)
    return key, position >= order

"""From logits to a drawn token: penalty of repetition, temperature, and the three ways of cutting off the tail."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ttr_kernels.common.arrays import Array


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The steps are taken in this order:

    Attributes:
        repetition_penalty: logits of tokens that occurred before are divided by it where positive and multiplied by
            it where negative (Keskar et al. 2019, *CTRL*, sec. 4.1); 1: none.
        temperature: divides the logits; 0: always the likeliest token.
        top_k: only the k likeliest tokens (Fan et al. 2018); None: all.
        top_p: only the fewest likeliest tokens whose probabilities sum to at least p (Holtzman et al. 2020, *nucleus
            sampling*); 1: all.
        min_p: only tokens at least min_p times as likely as the likeliest (Nguyen et al. 2024); 0: all.
        seed: decides the draws; sample n of a seed is the same however many samples there are.

    Raises:
        ValueError: a value out of range, naming it.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, fits, expected in (
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "a finite number of at least 0"),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1, or None"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1"),
            (
                "repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < math.inf,
                "a finite number above 0",
            ),
            ("seed", self.seed, self.seed >= 0, "at least 0"),
        ):  # fmt: skip
            if not fits:
                raise ValueError(f"{name}: got {value}, expected {expected}")


def probabilities(logits: Array, sampling: Sampling, seen: Array | None = None) -> Array:
    """(B, V) logits -> (B, V) float64 probabilities with which tokens are drawn.

    Args:
        logits: any float; −inf excludes a token.
        seen: (B, V) bool, tokens that occurred before, for the repetition penalty.

    Raises:
        ValueError: logits with NaN or +inf, or a row of nothing but −inf.
    """
    logits = np.asarray(logits).astype(np.float64)
    best = logits.max(axis=1, keepdims=True, initial=-np.inf)
    if not np.isfinite(best).all():
        raise ValueError("logits: got NaN or infinity; the model's weights or inputs are not finite")
    if sampling.repetition_penalty != 1.0 and seen is not None:
        penalty = sampling.repetition_penalty
        logits = np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)
        best = logits.max(axis=1, keepdims=True)
    if sampling.temperature == 0:
        result = np.zeros_like(logits)
        result[np.arange(len(logits)), logits.argmax(axis=1)] = 1.0
        return result
    # The difference first: a tiny temperature must not overflow it.
    weights = np.exp((logits - best) / sampling.temperature)
    if sampling.top_k is not None and sampling.top_k < weights.shape[1]:
        weights[_rank(weights) >= sampling.top_k] = 0.0
    if sampling.top_p < 1:
        order = np.argsort(-weights, axis=1, kind="stable")
        ordered = np.take_along_axis(weights, order, axis=1)
        # Of those before it; so the likeliest always stays.
        before = np.cumsum(ordered, axis=1) - ordered
        ordered[before >= sampling.top_p * ordered.sum(axis=1, keepdims=True)] = 0.0
        np.put_along_axis(weights, order, ordered, axis=1)
    if sampling.min_p > 0:
        # Relative to the likeliest, whose weight is 1.
        weights[weights < sampling.min_p] = 0.0
    normalized: Array = weights / weights.sum(axis=1, keepdims=True)
    return normalized


class Sampler:
    """Draws the tokens of several samples, each from random numbers of its own.

    Args:
        sampling: how.
        samples: how many samples there are.
        vocabulary_size: number of tokens.
        prompt: tokens that count as seen from the start.
    """

    def __init__(self, sampling: Sampling, samples: int, vocabulary_size: int, prompt: Sequence[int] | Array) -> None:
        self.sampling = sampling
        self._random = [np.random.default_rng([sampling.seed, sample]) for sample in range(samples)]
        self._seen: Array | None = None
        if sampling.repetition_penalty != 1.0:
            self._seen = np.zeros((samples, vocabulary_size), bool)
            self._seen[:, np.asarray(prompt, np.int64)] = True

    def draw(self, logits: Array, samples: Array) -> Array:
        """One token for each row of logits (B, V), which belong to the given samples (B,): (B,) int32."""
        seen = None if self._seen is None else self._seen[samples]
        chances = probabilities(logits, self.sampling, seen)
        tokens = np.empty(len(samples), np.int32)
        for row, sample in enumerate(samples):
            cumulated = np.cumsum(chances[row])
            drawn = int(np.searchsorted(cumulated, self._random[sample].random() * cumulated[-1], "right"))
            # Rounding may put the number on the sum itself: then the last token that has a chance.
            tokens[row] = drawn if drawn < len(cumulated) else np.flatnonzero(chances[row])[-1]
        if self._seen is not None:
            self._seen[samples, tokens] = True
        return tokens

    def uniform(self, samples: Array) -> Array:
        """A number in [0, 1) for each of the given samples, of its own random numbers."""
        return np.array([self._random[sample].random() for sample in samples])


def _rank(weights: Array) -> Array:
    """Of each token in its row, from 0 for the likeliest; of equals the first is ahead."""
    order = np.argsort(-weights, axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(weights.shape[1])[None], axis=1)
    return ranks

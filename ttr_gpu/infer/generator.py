"""Continuations of a prompt, token by token, several samples at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ttr_kernels.common.arrays import Array

from ..backend import to_host
from ..data.tokenizer import TextTokenizer
from ..model import TransformerModel
from ..nn.gap_distribution import GapDistribution
from .prompts import EventPrompts, Prompts, TextPrompts
from .sampling import Sampler, Sampling


class Piece(NamedTuple):
    """One new token of one sample.

    Attributes:
        sample: which sample, from 0.
        token: its number.
        text: what it adds to the text: nothing for `</s>`, or while a character is incomplete; for events a type's
            name and a line break.
        time: when it happens, as the model was told (for the last one: would have been).
        finish: None while the sample goes on; "end" after `</s>`, "length" after the last token asked for.
    """

    sample: int
    token: int
    text: str
    time: float
    finish: str | None


class Generator:
    """Generates from a model.

    Args:
        model: trained on texts or events.
        tokenizer: the data set's tokenizer, or the names of its event types.
        origin: what was subtracted from the data set's times.
    """

    def __init__(
        self, model: TransformerModel, tokenizer: TextTokenizer | Sequence[str], *, origin: float = 0.0
    ) -> None:
        self.model, self.origin = model, origin
        self.prompts: Prompts = (
            TextPrompts(tokenizer) if isinstance(tokenizer, TextTokenizer) else EventPrompts(tokenizer)
        )

    def stream(
        self, prompt: str, *, at: float | None = None, gap: float = 0.0, max_tokens: int = 256, samples: int = 1,
        sampling: Sampling | None = None, advance: str | None = None,
    ) -> Iterator[Piece]:  # fmt: skip
        """Yield the tokens of all samples as they are drawn, step by step, the samples in turn.

        The prompt is read once, all samples go on from it together, and what a step costs does not depend on how many
        came before it. A sample that ends leaves the batch.

        Args:
            prompt: text, or types of events ("login, click").
            at: time of the prompt's last token, in the data set's unit (its origin included); the new ones happen then
                too, or each `gap` after the one before, as those of the prompt do. None: times are positions, as in
                data without timestamps.
            gap: time between neighbours, in that unit.
            max_tokens: of each sample.
            samples: how many.
            sampling: how tokens are drawn; default: from the model's distribution.
            advance: let the model's time head say when each new token happens: "sample" draws its gap to the one
                before, "median" takes the distribution's median; `gap` then is of the prompt alone. None: see `at`.

        Raises:
            ValueError: a number out of range, `advance` without `at` or with a model that does not say when.
            UserError: a prompt with an unknown type, or without any.
        """
        for name, value, least in (("max_tokens", max_tokens, 1), ("samples", samples, 1), ("gap", gap, 0)):
            if not value >= least:
                raise ValueError(f"{name}: got {value}, expected at least {least}")
        if at is not None and not np.isfinite(at):
            raise ValueError(f"at: got {at}, expected a finite time")
        if advance not in (None, "sample", "median"):
            raise ValueError(f"advance: got {advance!r}, expected 'sample', 'median' or None")
        if advance is not None and self.model.time_head is None:
            raise ValueError(f"advance: got {advance!r}, but this model does not say when (model.time_components is 0)")
        if advance is not None and at is None:
            raise ValueError(f"advance: got {advance!r} without at, expected the time of the prompt's last token")
        return self._stream(prompt, at, gap, max_tokens, samples, sampling or Sampling(), advance)

    def _stream(
        self, prompt: str, at: float | None, gap: float, max_tokens: int, samples: int, sampling: Sampling,
        advance: str | None,
    ) -> Iterator[Piece]:  # fmt: skip
        model, prompts = self.model, self.prompts
        tokens = prompts.encode(prompt)
        # Of all positions, the prompt's last one at `at`.
        steps = np.arange(len(tokens) + max_tokens, dtype=np.float64)
        times = steps if at is None else at - self.origin + gap * (steps - (len(tokens) - 1))
        cache = model.new_cache(samples, len(tokens) + max_tokens)
        starts = np.array([0, len(tokens)], np.int32)
        outputs = model.prefill_outputs(tokens, times[: len(tokens)], starts, cache, np.array([0]))
        if samples > 1:
            cache.copy(0, np.arange(1, samples))
            outputs = outputs.repeat(samples, axis=0)
        logits = model.next_logits(outputs)
        sampler = Sampler(sampling, samples, prompts.size, tokens)
        texts = [prompts.detokenizer(tokens) for _ in range(samples)]
        alive, now = np.arange(samples), np.full(samples, times[len(tokens) - 1])
        for step in range(max_tokens):
            if advance is None:
                now[alive] = times[len(tokens) + step]
            else:
                now[alive] += _gaps(model.next_gap(outputs, logits=logits), advance, sampler, alive)
            # A model may have room for more tokens than the tokenizer knows.
            drawn = sampler.draw(to_host(logits)[:, : prompts.size], alive)
            for sample, token in zip(alive.tolist(), drawn.tolist(), strict=True):
                finish = "end" if token == prompts.end else "length" if step == max_tokens - 1 else None
                text = "" if finish == "end" else texts[sample].add(token)
                if finish is not None:
                    text += texts[sample].finish()
                yield Piece(sample, token, text, float(now[sample] + (0.0 if at is None else self.origin)), finish)
            going = drawn != prompts.end if prompts.end is not None else np.ones(len(drawn), bool)
            alive, drawn = alive[going], drawn[going]
            if not len(alive) or step == max_tokens - 1:
                return
            if advance is None:
                logits = model.decode_step(drawn, now[alive], cache, alive)
            else:
                outputs = model.decode_outputs(drawn, now[alive], cache, alive)
                logits = model.next_logits(outputs)


def _gaps(following: GapDistribution, advance: str, sampler: Sampler, samples: Array) -> Array:
    """(B,) time from the newest token of each sample to its next: the quantile of a half, or of a random number."""
    return following.quantile(0.5 if advance == "median" else sampler.uniform(samples))

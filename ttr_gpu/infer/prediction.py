"""What comes next, and when: the next event's distribution, and futures sampled event by event."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ttr_kernels.common.arrays import Array
from ttr_kernels.common.philox import philox_words

from ..backend import to_host
from ..decoding import ModelCache
from ..errors import UserError
from ..model import TransformerModel
from .histories import History
from .next_event import NextEvent
from .sampling import Sampler, Sampling, probabilities

# Memory that the caches of futures drawn side by side may take.
_CACHE_BYTES = 256 << 20


def parse_quantiles(text: str) -> tuple[float, ...]:
    """The probabilities of --quantiles, ascending. UserError for what is none."""
    try:
        shares = sorted({float(part) for part in text.split(",")})
    except ValueError:
        shares = []
    if not shares or not 0 < shares[0] <= shares[-1] < 1:
        raise UserError(f"--quantiles: got {text!r}, expected probabilities between 0 and 1, such as 0.1,0.5,0.9")
    return tuple(shares)


@dataclass(frozen=True)
class Future:
    """One sampled continuation: (n,) absolute float64 times and int32 tokens.

    `cut`: it had reached `max_events` before the horizon.
    """

    times: Array
    types: Array
    cut: bool


@dataclass(frozen=True)
class Prediction:
    """What a model expects after a history.

    Attributes:
        now, end: absolute times between which futures were drawn.
        survival: P(no event until now) after the last event, 1 if now is its time.
        time_quantiles: probability -> absolute time of the next event, given that there was none until now.
        type_probabilities: (V,) of the next event's type.
        futures: sampled.
    """

    history: History
    now: float
    end: float
    survival: float
    time_quantiles: dict[float, float]
    type_probabilities: Array
    futures: list[Future]

    def counts(self, moments: Array) -> Array:
        """(futures, len(moments)) int64: events of each future from `now` up to each absolute time."""
        counted = [np.searchsorted(future.times, moments, "right") for future in self.futures]
        return np.array(counted, np.int64).reshape(len(self.futures), len(moments))

    def expected_counts(self) -> Array:
        """(V,) mean number of events of each type until the horizon, over the futures."""
        size = len(self.type_probabilities)
        total = sum((np.bincount(future.types, minlength=size) for future in self.futures), np.zeros(size))
        return total / max(len(self.futures), 1)

    def record(
        self, names: Sequence[str], quantiles: Sequence[float], date: Callable[[float], str | None] | None = None
    ) -> dict[str, Any]:
        """As written to JSONL; the fields are described in docs/prediction.md. `date`: of a time, where times are
        dates."""
        order = np.argsort(-self.type_probabilities, kind="stable")
        final = self.counts(np.array([self.end]))[:, 0]
        expected, last = self.expected_counts(), float(self.history.times[-1])
        dates = date and {
            "last_time": date(last), "now": date(self.now), "end": date(self.end),
            "next": {f"{p:g}": date(moment) for p, moment in self.time_quantiles.items()},
        }  # fmt: skip
        return {
            "id": self.history.name, "events": len(self.history.times), "last_time": last, "now": self.now,
            "end": self.end, **({"dates": dates} if dates else {}), "survival": self.survival,
            "next": {
                "time": {f"{p:g}": moment for p, moment in self.time_quantiles.items()},
                "types": {names[token]: float(self.type_probabilities[token]) for token in order},
            },
            "count": {
                "mean": float(final.mean()),
                **{f"{p:g}": float(np.quantile(final, p, method="inverted_cdf")) for p in quantiles},
                "types": {names[token]: float(expected[token]) for token in order},
            },
            "futures": [
                {
                    "times": future.times.tolist(), "types": [names[token] for token in future.types],
                    **({"cut": True} if future.cut else {}),
                }
                for future in self.futures
            ],
        }  # fmt: skip


class Predictor:
    """Predicts from a model of types and gaps.

    Args:
        model: with a time head.
        types: number of event types; the model may have room for more.
        origin: what was subtracted from the data set's times.
        context: events of a history that are read, its last ones; None: all. A model without a window has met only
            positions up to the length of its training windows.

    Raises:
        UserError: a model without a time head.
    """

    def __init__(
        self, model: TransformerModel, types: int, *, origin: float = 0.0, context: int | None = None
    ) -> None:  # fmt: skip
        if model.time_head is None:
            raise UserError("this model does not know when the next event comes (model.time_components is 0)")
        self.model, self.types, self.origin, self.context = model, types, origin, context

    def predict(
        self, history: History, *, horizon: float, samples: int = 100, seed: int = 0, now: float | None = None,
        max_events: int = 256, quantiles: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95),
    ) -> Prediction:  # fmt: skip
        """The next event after a history, and sampled futures.

        A future is drawn as the model factorises it: a gap from its distribution, a type from its distribution, both
        are read by the model, and so on until the horizon. No intensity is evaluated and nothing is thinned.

        Args:
            horizon: futures end so long after `now`, in the data's unit.
            samples: futures; number n of a seed is the same however many there are.
            now: nothing has happened between the last event and then: the first gap is conditioned on it. Default: the
                time of the last event.
            max_events: of one future; it is then marked as cut.
            quantiles: of the next event's time.

        Raises:
            ValueError: a number out of range. UserError: a `now` before the last event, or so long after it that the
                model gives the wait no probability.
        """
        for name, value, least in (("samples", samples, 1), ("max_events", max_events, 1)):
            if value < least:
                raise ValueError(f"{name}: got {value}, expected at least {least}")
        if not (horizon > 0 and np.isfinite(horizon)):
            raise ValueError(f"horizon: got {horizon}, expected a positive number")
        last = float(history.times[-1])
        now = last if now is None else now
        if not now >= last:
            raise UserError(f"now: got {now!r}, expected a time not before that of the last event, {last!r}")
        begin = 0 if self.context is None else max(0, len(history.times) - self.context)
        length = len(history.times) - begin + max_events
        at_once = max(1, min(samples, _CACHE_BYTES // max(self.model.new_cache(1, length).bytes, 1)))
        # Its ring 0 stays at the history's end, for every group of futures to go on from.
        cache = self.model.new_cache(at_once + 1, length)
        first = _First(self, history, begin, now - last, cache)
        times = dict(zip(quantiles, first.next.quantiles(list(quantiles)).tolist(), strict=True))
        futures: list[Future] = []
        end = now + horizon - self.origin
        sampler = Sampler(Sampling(seed=seed), samples, self.types, [])
        for number in range(0, samples, at_once):
            chosen = np.arange(number, min(number + at_once, samples))
            futures += self._futures(first, cache, chosen, end, max_events, seed, sampler)
        return Prediction(history, now, now + horizon, first.survival, times, first.next.types, futures)

    def _futures(
        self, first: _First, cache: ModelCache, chosen: Array, end: float, max_events: int, seed: int, sampler: Sampler
    ) -> list[Future]:
        """The futures of the chosen samples, side by side, in the cache's rings from 1 on; `end` is relative to the
        origin."""
        model, count = self.model, len(chosen)
        cache.copy(0, np.arange(1, count + 1))
        outputs, logits = first.outputs.repeat(count, axis=0), first.logits.repeat(count, axis=0)
        last = np.full(count, cache.last_times[0])
        times: list[list[float]] = [[] for _ in chosen]
        types: list[list[int]] = [[] for _ in chosen]
        alive = np.arange(count)
        for step in range(max_events):
            if step == 0:
                gaps = first.draw(chosen, seed)
            else:
                gaps = model.next_gap(outputs, logits=logits).sample(seed=seed, offset=step, rows=chosen[alive])
            moments = last[alive] + gaps
            going = moments <= end
            alive, moments = alive[going], moments[going]
            if not len(alive):
                break
            drawn = sampler.draw(to_host(logits)[going, : self.types], chosen[alive])
            for ring, moment, token in zip(alive, moments, drawn, strict=True):
                times[ring].append(float(moment))
                types[ring].append(int(token))
            last[alive] = moments
            outputs = model.decode_outputs(drawn, moments, cache, alive + 1)
            logits = model.next_logits(outputs)
        going_on = set(alive.tolist())
        return [
            Future(np.array(moments) + self.origin, np.array(tokens, np.int32), ring in going_on)
            for ring, (moments, tokens) in enumerate(zip(times, types, strict=True))
        ]


class _First:
    """The next event after a history, `wait` after its last one without another; events from `begin` on are read, into
    the cache's ring 0."""

    def __init__(self, predictor: Predictor, history: History, begin: int, wait: float, cache: ModelCache) -> None:
        model = predictor.model
        tokens, times = history.types[begin:], history.times[begin:] - predictor.origin
        starts = np.array([0, len(tokens)], np.int32)
        self.outputs = model.prefill_outputs(tokens, times, starts, cache, np.array([0]))
        self.logits = model.next_logits(self.outputs)
        self.gap, self.wait = model.next_gap(self.outputs, logits=self.logits), wait
        last = float(history.times[-1])
        types = probabilities(to_host(self.logits)[:, : predictor.types], Sampling())[0]
        self.next = NextEvent(types, last, last + wait, self.gap)
        self.survival = float(np.exp(self.gap.log_survival(np.array([wait])))[0]) if wait > 0 else 1.0
        if not self.survival > 0:
            raise UserError(
                f"now: got {last + wait!r}, {wait:g} after the last event; expected an earlier time, since the model "
                "gives so long a wait no probability"
            )

    def draw(self, samples: Array, seed: int) -> Array:
        """The first gaps of these samples."""
        if self.wait == 0:
            return self.gap[np.zeros(len(samples), np.int64)].sample(seed=seed, offset=0, rows=samples)
        uniform = (philox_words(samples, seed, 0)[:, 0].astype(np.float64) + 0.5) / 2.0**32
        drawn: Array = self.gap.quantiles_after(uniform, np.array([self.wait]))[0]
        return drawn

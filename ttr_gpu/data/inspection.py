"""A look at a data set: counts, times, gaps, vocabulary, samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .dataset import Dataset, Split
from .gaps import GapHistogram
from .timestamps import UNITS, date_text, is_date

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Sample:
    """The first positions of a sequence: (time as text, token as text)."""

    split: str
    sequence: int
    length: int
    positions: list[tuple[str, str]]


@dataclass(frozen=True)
class Inspection:
    """What `ttr-gpu inspect` shows.

    Attributes:
        gaps: (from, to, count) per half decade, in the data set's unit; zero gaps apart.
        common: (token as text, share of all tokens), the most common first.
    """

    summary: dict[str, Any]
    gaps: list[tuple[float, float, int]]
    zero_gaps: int
    common: list[tuple[str, float]]
    samples: list[Sample]


def inspect_dataset(dataset: Dataset, samples: int = 3, length: int = 12, common: int = 12) -> Inspection:
    """Read all splits once, in blocks."""
    counts = np.zeros(dataset.vocabulary_size, np.int64)
    gaps = GapHistogram()
    for name in dataset.splits:
        split = dataset.split(name)
        for begin in range(0, split.token_count, _BLOCK):
            # One token more than the block, for the gap across its end.
            tokens, times = split.read(begin, min(begin + _BLOCK + 1, split.token_count))
            counts += np.bincount(tokens[:_BLOCK], minlength=len(counts))[: len(counts)]
            first = np.searchsorted(split.offsets, np.arange(begin + 1, begin + len(times)))
            inside = split.offsets[first] != np.arange(begin + 1, begin + len(times))
            gaps.add(np.diff(times)[inside])
    names = _token_names(dataset)
    order = np.argsort(-counts, kind="stable")[:common]
    total = max(1, int(counts.sum()))
    shown = [(names(int(token)), counts[token] / total) for token in order if counts[token]]
    first_split = dataset.split(dataset.splits[0])
    looked_at = [_sample(dataset, first_split, i, length, names) for i in range(min(samples, first_split.sequences))]
    attributes = dataset.attributes
    summary = {
        name: attributes[name]
        for name in ("kind", "vocabulary_size", "time_unit_seconds", "origin", "terminators_appended", "rejected",
                     "fingerprint", "created_by", "splits")
    }  # fmt: skip
    summary["time_range"] = _time_range(dataset)
    return Inspection(summary, gaps.decades(), gaps.zeros, shown, looked_at)


def unit_name(seconds: float | None) -> str:
    """Name of a time unit: "seconds", "positions", or "units of 12.5 s"."""
    if seconds is None:
        return "positions"
    return next((name for name, value in UNITS.items() if value == seconds), f"units of {seconds:g} s")


def time_text(dataset: Dataset, relative: float) -> str:
    """A time as a date where its unit and size allow one, else as a number."""
    time = dataset.origin + relative
    unit = dataset.time_unit_seconds
    if unit is not None and is_date(dataset.origin, unit):
        # Where events follow each other within seconds, the fraction tells them apart.
        close = (dataset.gap.get("median_nonzero") or math.inf) * unit < 10
        text = date_text(time, unit, milliseconds=True) if close else date_text(time, unit)
        if text is not None:
            return text
    return f"{time:g}"


def _time_range(dataset: Dataset) -> list[str]:
    entries = dataset.attributes["splits"].values()
    low, high = min(e["time_min"] for e in entries), max(e["time_max"] for e in entries)
    return [time_text(dataset, low), time_text(dataset, high)]


def _token_names(dataset: Dataset) -> Any:
    if dataset.vocabulary is not None:
        return dataset.vocabulary.__getitem__
    return dataset.tokenizer().token


def _sample(dataset: Dataset, split: Split, index: int, length: int, names: Any) -> Sample:
    begin, end = int(split.offsets[index]), int(split.offsets[index + 1])
    tokens, times = split.read(begin, min(begin + length, end))
    positions = [(time_text(dataset, float(t)), names(int(token))) for token, t in zip(tokens, times, strict=True)]
    return Sample(split.name, index, end - begin, positions)

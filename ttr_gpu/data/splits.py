"""Which sequences, or which parts of them, are trained on, validated on and tested on."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np

from ..errors import UserError
from .timestamps import TimestampParser

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class SplitOptions:
    """At most one of these decides: `times` (two cut points), a split column, given files; else `fractions`.

    Attributes:
        fractions: text of three fractions, e.g. "0.8,0.1,0.1".
        seed: of the permutation of sequences.
        times: two timestamps "A,B", or percentages of events "80%,90%": before A is train, before B validation. Four,
            "START,A,B,END": what is before START, or not before END, is left out.
        given: whether each sequence's split came with the input (files or a column).
    """

    fractions: str = "0.8,0.1,0.1"
    seed: int = 0
    times: str | None = None
    given: bool = False


def parse_fractions(text: str) -> tuple[Fraction, Fraction]:
    """Train share, and train + validation share, exact: 0.6 + 0.2 is 0.8 here, not 0.8000000000000000444."""
    try:
        parts = [Fraction(part.strip()) for part in text.split(",")]
    except (ValueError, ZeroDivisionError):
        parts = []
    if len(parts) != 3 or min(parts) < 0 or sum(parts) != 1 or parts[0] == 0:
        raise UserError(f"--split: got {text!r}, expected three fractions that sum to 1, such as 0.8,0.1,0.1")
    return parts[0], parts[0] + parts[1]


def by_sequence(count: int, options: SplitOptions) -> np.ndarray[Any, Any]:
    """Split (0, 1, 2) of each sequence: train is p[:int(f0 n)] of p = default_rng(seed).permutation(n), and so on."""
    first, second = parse_fractions(options.fractions)
    if count == 1:
        raise UserError(
            "--split: the data are one sequence, which cannot be divided by sequence; cut it in time: "
            "--split-time 80%,90%"
        )
    order = np.random.default_rng(options.seed).permutation(count)
    split = np.full(count, 2, np.int8)
    split[order[: int(first * count)]] = 0
    split[order[int(first * count) : int(second * count)]] = 1
    return split


_CUTS = (
    "expected two timestamps or percentages in ascending order, such as 80%,90%, or four: start, the two cuts, and end"
)


def parse_cuts(text: str, parser: TimestampParser) -> list[tuple[str, float]]:
    """The two or four cuts of --split-time, each ("share", 0.8) or ("time", 1.7e9)."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) not in (2, 4):
        raise UserError(f"--split-time: got {text!r}; {_CUTS}")
    cuts = []
    for part in parts:
        try:
            if part.endswith("%"):
                share = float(part[:-1]) / 100
                if not 0 <= share <= 1:
                    raise ValueError
                cuts.append(("share", share))
            else:
                cuts.append(("time", parser.parse(part)))
        except ValueError as error:
            raise UserError(f"--split-time: got {text!r}; {_CUTS}" + (f" ({error})" if str(error) else "")) from None
    if any(a[0] == b[0] and a[1] > b[1] for a, b in pairwise(cuts)):
        raise UserError(f"--split-time: got {text!r}; {_CUTS}")
    return cuts


def cut_times(text: str, times: Any, parser: TimestampParser) -> np.ndarray[Any, Any]:
    """The times (4,) at which --split-time cuts: train begins, validation, test, and the end; float64.

    `times`: of all events or documents, for percentages.
    """
    cuts = []
    for kind, value in parse_cuts(text, parser):
        if kind == "share" and value < 1:
            # Of very many times a sample, evenly taken, is exact enough.
            ordered = np.sort(times[:: max(1, len(times) >> 22)])
            cuts.append(float(ordered[min(int(value * len(ordered)), len(ordered) - 1)]))
        else:
            cuts.append(np.inf if kind == "share" else value)
    if any(not a <= b for a, b in pairwise(cuts)):
        raise UserError(f"--split-time: got {text!r}, which is {','.join(map(repr, cuts))}; {_CUTS}")
    return np.array(cuts if len(cuts) == 4 else [-np.inf, *cuts, np.inf])

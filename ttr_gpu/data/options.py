"""What a preprocessing run is told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from ..errors import UserError
from .observation import parse_observation
from .splits import SplitOptions, parse_cuts, parse_fractions
from .timestamps import TimestampParser
from .tokenizer import check_vocabulary_size, load_tokenizer


@dataclass(frozen=True)
class Columns:
    """Names (or numbers from 1) of columns and JSON fields; None: looked for under the usual names."""

    sequence: str | None = None
    time: str | None = None
    type: str | None = None
    text: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class PreprocessOptions:
    """A preprocessing run; `ttr-gpu preprocess --help` says what the option of each name does."""

    inputs: list[str]
    output: Path
    validation: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)
    kind: str | None = None
    header: bool | None = None
    columns: Columns = field(default_factory=Columns)
    time_unit: str = "seconds"
    assume_utc: bool = False
    type_bins: tuple[float, ...] = ()
    observation: str | None = None
    score_first: bool = False
    by: str = "line"
    tokenizer: str = "bpe"
    vocabulary_size: int = 4096
    segment: int | None = None
    timestamp_prefix: bool = False
    timestamp_format: str = "[%Y-%m-%dT%H:%MZ] "
    one_sequence: bool = False
    split: SplitOptions = field(default_factory=SplitOptions)
    skip_errors: bool = False
    overwrite: bool = False


# Options of one kind of data, which would silently do nothing for the other.
_ONLY_FOR = {
    "events": {"type_bins": "--type-bins", "observation": "--observation", "score_first": "--score-first"},
    "text": {
        "by": "--by", "tokenizer": "--tokenizer", "vocabulary_size": "--vocab-size", "segment": "--segment",
        "timestamp_prefix": "--timestamp-prefix", "timestamp_format": "--timestamp-format",
        "one_sequence": "--one-sequence",
    },
}  # fmt: skip


def check_kind(options: PreprocessOptions, kind: str, name: str) -> None:
    """UserError for an option of the other kind of data."""
    default = PreprocessOptions([], Path())
    for other, names in _ONLY_FOR.items():
        for name_of, option in names.items():
            if other != kind and getattr(options, name_of) != getattr(default, name_of):
                raise UserError(f"{option}: is for {other}, but {name} is read as {kind} (see --kind)")
    if kind == "text" and options.columns.type:
        raise UserError(f"--type-column: is for events, but {name} is read as text (see --kind)")
    if kind == "events" and options.columns.text:
        raise UserError(f"--text-column: is for text, but {name} is read as events (see --kind)")


def parse_bins(text: str | None) -> tuple[float, ...]:
    """The ascending numbers of --type-bins; none for None."""
    try:
        bins = tuple(float(edge) for edge in (text or "").split(",") if edge)
    except ValueError:
        raise UserError(f"--type-bins: got {text!r}, expected numbers separated by commas, such as 3,4,5") from None
    _check_bins(bins)
    return bins


def _check_bins(bins: tuple[float, ...]) -> None:
    if not all(a < b for a, b in pairwise(bins)) or any(math.isnan(edge) for edge in bins):
        raise UserError(f"--type-bins: got {','.join(f'{edge:g}' for edge in bins)}, expected ascending numbers")


def check_options(options: PreprocessOptions, parser: TimestampParser) -> None:
    """Options that are wrong or cannot go together, before anything is read."""
    parse_fractions(options.split.fractions)
    if options.split.times is not None:
        parse_cuts(options.split.times, parser)
    observation = parse_observation(options.observation, parser)
    if options.observation is not None and options.split.times is not None:
        raise UserError("--observation: cannot be combined with --split-time, which ends observation at its cuts")
    if options.score_first and observation.start is None:
        raise UserError("--score-first: needs the start of observation; say it with --observation START,END")
    if options.tokenizer == "bpe":
        check_vocabulary_size(options.vocabulary_size)
    elif options.tokenizer != "bytes":
        load_tokenizer(Path(options.tokenizer))
    if options.timestamp_format != PreprocessOptions.timestamp_format and not options.timestamp_prefix:
        raise UserError("--timestamp-format: does nothing without --timestamp-prefix")
    if options.inputs.count("-") > 1:
        raise UserError("INPUT: standard input ('-') was given twice")
    if options.split.times is not None and options.split.given:
        raise UserError("--split-time: cannot be combined with --validation, --test or --split-column")
    if options.segment is not None and options.segment < 2:
        raise UserError(f"--segment: got {options.segment}, expected at least 2")
    _check_bins(options.type_bins)

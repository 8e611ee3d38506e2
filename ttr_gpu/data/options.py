"""What a preprocessing run is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .splits import SplitOptions


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

"""Events: rows of (sequence, time, type), or a record per sequence, to a data set."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .fields import SPLIT_NAMES, find_column
from .guess import SEQUENCE_NAMES, TIME_NAMES, TYPE_NAMES, Layout
from .observation import BEGIN, parse_observation
from .options import PreprocessOptions
from .progress import Progress
from .readers import records
from .rejects import Rejects
from .shards import SplitWriter
from .sources import Source
from .splits import SPLITS, by_sequence, cut_times
from .spool import EventSpool, Grouped
from .timestamps import TimestampParser
from .wording import shown

Say = Callable[[str], None]
# The one type of events that have none.
UNTYPED = "event"


class EventReader:
    """Reads all inputs into a spool: pass one of three (read; group and check; write)."""

    def __init__(self, options: PreprocessOptions, parser: TimestampParser, rejects: Rejects, folder: Path) -> None:
        self.options, self.parser, self.rejects = options, parser, rejects
        self.observation = parse_observation(options.observation, parser)
        self.spool = EventSpool(folder)
        self.sequences: dict[Any, int] = {}
        self.types: dict[str, int] = {}
        # Split of each sequence where the input says it, and the inputs' names, for messages.
        self.split_of: list[int] = []
        self.sources: list[str] = []
        # Token of the start of observation, with which sequences begin; None: they do not.
        self.begin: int | None = None

    def read(self, source: Source, layout: Layout, split: int | None, say: Say) -> None:
        """All events of one input."""
        columns = self.options.columns
        fields = layout.columns
        per_sequence = layout.form in ("json", "parquet") and "times" in fields and columns.time is None

        def find(wanted: str | None, usual: tuple[str, ...], option: str, required: bool) -> str | None:
            return find_column(wanted, usual, layout, source, option, required)

        time_name = find(columns.time, TIME_NAMES if not per_sequence else ("times",), "--time-column", True)
        type_name = find(columns.type, TYPE_NAMES if not per_sequence else ("types", "marks"), "--type-column", False)
        sequence_name = self._sequence_column(layout, source, per_sequence, time_name)
        split_name = find(columns.split, ("split",), "--split-column", True) if columns.split else None
        if type_name is None and self.options.type_bins:
            raise UserError(f"{source.name}: --type-bins: there is no type column; say which with --type-column")
        if type_name is None:
            say(f"{source.name}: no type column; every event is of the one type {UNTYPED!r}")
        if sequence_name is None and not per_sequence:
            say(f"{source.name}: no sequence column; the whole file is one sequence")
        number = len(self.sources)
        self.sources.append(source.name)
        with Progress(f"reading {source.name}", source.bytes_total, "bytes") as progress:
            for record in records(source, layout, self.rejects):
                progress.update(source.bytes_read)
                where = f"{source.name}:{record.line}"
                try:
                    if not isinstance(record.fields, dict):
                        raise ValueError("got a string; expected a record with a time")
                    key = self._key(record.fields, sequence_name, number, record.line, per_sequence)
                    self._check_split(record.fields, split_name)
                    events = list(self._events(record.fields, time_name, type_name, per_sequence))
                    index = self._sequence(key, split, record.fields, split_name)
                except ValueError as error:
                    self.rejects.add(where, str(error), str(record.fields))
                    continue
                place = (number << 40) | record.line
                for time, kind in events:
                    self.spool.append(index, time, self.types.setdefault(kind, len(self.types)), place)

    def place(self, place: int) -> str:
        """ "file:line" of an event."""
        return f"{self.sources[place >> 40]}:{place & ((1 << 40) - 1)}"

    def vocabulary(self) -> tuple[list[str], np.ndarray[Any, Any]]:
        """Sorted names of the types, and the token of each type as numbered while reading."""
        if self.options.type_bins:
            names = _bin_names(self.options.type_bins)
        else:
            names = sorted(self.types, key=_numbers_first)
        if self.options.score_first:
            if BEGIN in self.types:
                raise UserError(f"--score-first: an event type is called {BEGIN!r}, which stands for the start")
            names = [*names, BEGIN]
            self.begin = len(names) - 1
        tokens = {name: token for token, name in enumerate(names)}
        return names, np.array([tokens[name] for name in self.types], np.int32)

    def _sequence_column(self, layout: Layout, source: Source, per_sequence: bool, time_name: str | None) -> str | None:
        usual: tuple[str, ...] = SEQUENCE_NAMES
        if self.options.columns.sequence is None and not per_sequence:
            # A column `id` of a catalogue numbers its rows; only a clearer name, or the option, groups.
            usual = tuple(name for name in SEQUENCE_NAMES if name != "id")
        return find_column(self.options.columns.sequence, usual, layout, source, "--sequence-column", False)

    def _key(self, fields: dict[str, Any], name: str | None, source: int, line: int, per_sequence: bool) -> Any:
        if name is None:
            return (source, line) if per_sequence else source
        value = fields.get(name)
        if value is None or value == "":
            raise ValueError(f"{name}: got nothing; expected the name of a sequence")
        return str(value)

    def _sequence(self, key: Any, split: int | None, fields: dict[str, Any], split_name: str | None) -> int:
        given = SPLIT_NAMES[str(fields[split_name]).lower()] if split_name else split
        index = self.sequences.setdefault((split, key), len(self.sequences))
        if index == len(self.split_of):
            self.split_of.append(-1 if given is None else given)
        elif given is not None and self.split_of[index] != given:
            raise ValueError(
                f"sequence {key!r} is in split {SPLITS[self.split_of[index]]} elsewhere; expected one split"
            )
        return index

    def _check_split(self, fields: dict[str, Any], split_name: str | None) -> None:
        if split_name and str(fields.get(split_name)).lower() not in SPLIT_NAMES:
            raise ValueError(f"{split_name}: got {fields.get(split_name)!r}; expected train, validation or test")

    def _events(
        self, fields: dict[str, Any], time_name: str | None, type_name: str | None, per_sequence: bool
    ) -> Iterator[tuple[float, str]]:
        if time_name not in fields:
            raise ValueError(f"the record has no {time_name!r}; expected one")
        times = fields[time_name] if per_sequence else [fields[time_name]]
        if not isinstance(times, list):
            raise ValueError(f"{time_name}: got {shown(times)}; expected a list of times")
        if not times:
            raise ValueError("got an empty sequence; expected at least one event")
        if type_name is None:
            kinds: list[Any] = [UNTYPED] * len(times)
        elif per_sequence:
            kinds = fields.get(type_name, [])
            if not isinstance(kinds, list) or len(kinds) != len(times):
                count = len(kinds) if isinstance(kinds, list) else shown(kinds)
                raise ValueError(f"{type_name}: got {count} for {len(times)} times; expected as many")
        else:
            kinds = [fields.get(type_name)]
        for time, kind in zip(times, kinds, strict=True):
            yield self.parser.parse(time), self._type(kind, type_name)

    def _type(self, value: Any, name: str | None) -> str:
        if value is None or value == "" or isinstance(value, dict | list):
            raise ValueError(f"{name}: got {shown(value)}; expected the type of an event")
        if not self.options.type_bins:
            return str(value)
        try:
            number = float(value)
        except ValueError:
            number = np.nan
        if not np.isfinite(number):
            raise ValueError(f"{name}: got {shown(value)}; expected a number, since --type-bins is given")
        return _bin_names(self.options.type_bins)[bisect_right(self.options.type_bins, number)]


def check_order(reader: EventReader, grouped: Grouped) -> np.ndarray[Any, Any]:
    """Which sequences are in time order (equal times are allowed); the others are rejected whole."""
    good = np.ones(len(grouped.offsets) - 1, bool)
    for first, last in grouped.blocks():
        start, stop = int(grouped.offsets[first]), int(grouped.offsets[last])
        times = np.asarray(grouped.times[start:stop])
        backwards = np.flatnonzero(np.diff(times) < 0) + 1
        inside = backwards[~np.isin(backwards + start, grouped.offsets)]
        if not len(inside):
            continue
        owners = np.searchsorted(grouped.offsets, inside + start, "right") - 1
        for owner, at in zip(*np.unique(owners, return_index=True), strict=True):
            event = int(inside[at])
            good[owner] = False
            reader.rejects.add(
                reader.place(int(grouped.places[start + event])),
                f"time {float(times[event])!r} is before {float(times[event - 1])!r}, that of the event before it in "
                "its sequence; expected times in ascending order",
            )
    _check_observed(reader, grouped, good)
    # A sequence whose only rows were rejected has no events.
    result: np.ndarray[Any, Any] = good & (np.diff(grouped.offsets) > 0)
    return result


def _check_observed(reader: EventReader, grouped: Grouped, good: np.ndarray[Any, Any]) -> None:
    """Reject sequences, which are in order, that reach beyond the window of observation."""
    start, end = reader.observation.start, reader.observation.end
    for index in np.flatnonzero(good & (np.diff(grouped.offsets) > 0)):
        first, last = int(grouped.offsets[index]), int(grouped.offsets[index + 1]) - 1
        for event, outside in (
            (first, start is not None and grouped.times[first] < start),
            (last, end is not None and grouped.times[last] > end),
        ):
            if outside and good[index]:
                good[index] = False
                reader.rejects.add(
                    reader.place(int(grouped.places[event])),
                    f"time {float(grouped.times[event])!r} is outside the window of observation "
                    f"({reader.options.observation}); expected all events inside it",
                )


def write_events(
    reader: EventReader, grouped: Grouped, good: np.ndarray[Any, Any], tokens: np.ndarray[Any, Any],
    writers: list[SplitWriter],
) -> int:  # fmt: skip
    """Write every good sequence, whole or cut in time, to its split; pass three. Returns the events left out."""
    options = reader.options.split
    cuts, left_out = None, 0
    split = np.array(reader.split_of, np.int8)
    if options.times is not None:
        cuts = cut_times(options.times, grouped.times, reader.parser)
    elif not options.given:
        split = np.full(len(good), -1, np.int8)
        split[good] = by_sequence(int(good.sum()), options)
    with Progress("writing", len(good), "sequences") as progress:
        for first, last in grouped.blocks():
            start, stop = int(grouped.offsets[first]), int(grouped.offsets[last])
            times = np.asarray(grouped.times[start:stop])
            kinds = tokens[np.asarray(grouped.types[start:stop])]
            for index in range(first, last):
                progress.update(index)
                if not good[index]:
                    continue
                part = slice(int(grouped.offsets[index]) - start, int(grouped.offsets[index + 1]) - start)
                if cuts is None:
                    types, moments = kinds[part], times[part]
                    if reader.begin is not None:
                        # The first event then is predicted like any other.
                        types = np.concatenate([[reader.begin], types])
                        moments = np.concatenate([[reader.observation.start], moments])
                    writers[split[index]].append(types, moments)
                    continue
                bounds = part.start + np.searchsorted(times[part], cuts)
                for writer, (begin, end) in zip(writers, pairwise(bounds), strict=True):
                    writer.append(kinds[begin:end], times[begin:end])
                left_out += len(times[part]) - int(bounds[-1] - bounds[0])
    return left_out


def require_events(reader: EventReader, good: np.ndarray[Any, Any]) -> None:
    """UserError if nothing is left to write."""
    if not good.any():
        rejected = f" ({reader.rejects})" if reader.rejects.count else ""
        raise UserError(f"{', '.join(reader.sources)}: no events{rejected}; expected at least one sequence")


def _bin_names(edges: tuple[float, ...]) -> list[str]:
    text = [f"{edge:g}" for edge in edges]
    return [f"<{text[0]}", *(f"[{a},{b})" for a, b in pairwise(text)), f">={text[-1]}"]


def _numbers_first(name: str) -> tuple[int, float, str]:
    try:
        return 0, float(name), name
    except ValueError:
        return 1, 0.0, name

"""Texts: documents with or without timestamps, tokenised, to a data set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .events import Say
from .fields import SPLIT_NAMES, find_column
from .guess import TEXT_NAMES, TIME_NAMES, Layout
from .options import PreprocessOptions
from .progress import Progress
from .readers import records
from .rejects import Rejects
from .shards import SplitWriter
from .sources import Source
from .splits import by_sequence, cut_times
from .spool import TextSpool
from .timestamps import TimestampParser, date_text
from .tokenizer import END, TextTokenizer, byte_tokenizer, load_tokenizer, train_bpe

# Documents tokenised at a time.
_BATCH = 512


class TextReader:
    """Reads all inputs into a spool: pass one of three (read; train the tokenizer; write)."""

    def __init__(self, options: PreprocessOptions, parser: TimestampParser, rejects: Rejects, folder: Path) -> None:
        self.options, self.parser, self.rejects = options, parser, rejects
        self.spool = TextSpool(folder)
        self.groups: dict[Any, int] = {}
        self.split_of: list[int] = []
        self.sources: list[str] = []
        self.timed: bool | None = None
        self.terminators_appended = 0

    def read(self, source: Source, layout: Layout, split: int | None, say: Say) -> None:
        """All documents of one input."""
        columns = self.options.columns
        text_name, time_name, group_name, split_name = None, columns.time, columns.sequence, columns.split
        if layout.form in ("csv", "json", "parquet") and (layout.columns or layout.form == "csv"):
            usual = (*TEXT_NAMES, "1") if not layout.columns else TEXT_NAMES
            wanted = columns.text or ("1" if not layout.columns else None)
            text_name = find_column(wanted, usual, layout, source, "--text-column", True)
            time_name = find_column(columns.time, TIME_NAMES, layout, source, "--time-column", False)
            if group_name:
                group_name = find_column(group_name, (), layout, source, "--sequence-column", True)
            if split_name:
                split_name = find_column(split_name, (), layout, source, "--split-column", True)
        elif group_name or split_name:
            raise UserError(f"{source.name}: --sequence-column and --split-column need records; got {layout}")
        timed = time_name is not None
        if self.timed is not None and timed != self.timed:
            raise UserError(f"{source.name}: has {'' if timed else 'no '}timestamps, unlike {self.sources[0]}")
        self.timed = timed
        if not timed and self.options.timestamp_prefix:
            raise UserError(f"--timestamp-prefix: {source.name} has no timestamps; expected one with each document")
        if not timed:
            say(f"{source.name}: no timestamps; the time of a token is its position in its sequence")
        number = len(self.sources)
        self.sources.append(source.name)
        with Progress(f"reading {source.name}", source.bytes_total, "bytes") as progress:
            for record in records(source, layout, self.rejects, self.options.by):
                progress.update(source.bytes_read)
                try:
                    text, time, group, given = self._fields(record.fields, text_name, time_name, group_name, split_name)
                except ValueError as error:
                    self.rejects.add(f"{source.name}:{record.line}", str(error), str(record.fields))
                    continue
                self._add(text, time, group, split if given is None else given, (number << 40) | record.line)

    def place(self, index: int) -> str:
        """ "file:line" of a document."""
        place = int(self.spool.places[index])
        return f"{self.sources[place >> 40]}:{place & ((1 << 40) - 1)}"

    def _fields(
        self, fields: Any, text_name: str | None, time_name: str | None, group_name: str | None, split_name: str | None
    ) -> tuple[str, float, Any, int | None]:
        if isinstance(fields, str):
            if time_name is not None:
                raise ValueError("got a string; expected a record with a timestamp, as in the first record")
            return fields, 0.0, None, None
        text = fields.get(text_name) if text_name else None
        if not isinstance(text, str):
            raise ValueError(f"{text_name or 'text'}: got {type(text).__name__}; expected a string")
        time = 0.0
        if time_name is not None:
            if fields.get(time_name) is None:
                raise ValueError(f"{time_name}: got nothing; expected a timestamp, as in the first record")
            time = self.parser.parse(fields[time_name])
        given = None
        if split_name:
            given = SPLIT_NAMES.get(str(fields.get(split_name)).lower())
            if given is None:
                raise ValueError(f"{split_name}: got {fields.get(split_name)!r}; expected train, validation or test")
        return text, time, fields.get(group_name) if group_name else None, given

    def _add(self, text: str, time: float, group: Any, split: int | None, place: int) -> None:
        if text.endswith(END):
            text = text[: -len(END)]
        else:
            self.terminators_appended += 1
        if not text:
            where = f"{self.sources[place >> 40]}:{place & ((1 << 40) - 1)}"
            self.rejects.add(where, "got an empty text; expected at least one character")
            return
        if self.options.columns.sequence is None:
            # Documents of one sequence share a key; otherwise each is its own.
            group = 0 if self.options.one_sequence else len(self.spool)
        index = self.groups.setdefault((split, group), len(self.groups)) if self._joined else len(self.split_of)
        if index == len(self.split_of):
            self.split_of.append(-1 if split is None else split)
        self.spool.append(text, time, index, place)

    @property
    def _joined(self) -> bool:
        return self.options.one_sequence or self.options.columns.sequence is not None


def assign_splits(reader: TextReader) -> np.ndarray[Any, Any]:
    """Split (0, 1, 2) of each document; −1 where it is left out."""
    options, spool = reader.options.split, reader.spool
    if options.times is not None:
        times = np.asarray(spool.times) if reader.timed else np.arange(len(spool), dtype=np.float64)
        cuts = cut_times(options.times, times, reader.parser)
        part = np.searchsorted(cuts, times, "right") - 1
        return np.where(part == len(cuts) - 1, -1, part).astype(np.int8)
    if options.given:
        split = np.array(reader.split_of, np.int8)
    else:
        split = by_sequence(len(reader.split_of), options)
    of_document: np.ndarray[Any, Any] = split[spool.groups]
    return of_document


def make_tokenizer(reader: TextReader, split: np.ndarray[Any, Any]) -> TextTokenizer:
    """The tokenizer asked for; BPE is trained on the documents of the training split alone."""
    choice = reader.options.tokenizer
    if choice == "bytes":
        return byte_tokenizer()
    if choice != "bpe":
        return load_tokenizer(Path(choice))

    def texts() -> Iterator[str]:
        with Progress("training the tokenizer", len(split), "documents") as progress:
            for index in np.flatnonzero(split == 0):
                progress.update(int(index))
                yield reader.spool.text(int(index))

    return train_bpe(texts(), reader.options.vocabulary_size)


def write_texts(
    reader: TextReader, split: np.ndarray[Any, Any], tokenizer: TextTokenizer, writers: list[SplitWriter], unit: float
) -> None:
    """Tokenise and write every document to its split; pass three."""
    spool = reader.spool
    order = np.argsort(spool.groups, kind="stable")
    last_group = [-1, -1, -1]
    last_time = [0.0, 0.0, 0.0]
    position = [0, 0, 0]
    start, end = np.array([tokenizer.start], np.int32), np.array([tokenizer.end], np.int32)
    with Progress("tokenising", len(order), "documents") as progress:
        for begin in range(0, len(order), _BATCH):
            indices = order[begin : begin + _BATCH]
            encoded = tokenizer.encode_batch([spool.text(int(index)) for index in indices])
            prefixes = _prefixes(reader, tokenizer, indices, unit)
            for index, tokens, prefix in zip(indices, encoded, prefixes, strict=True):
                progress.update(begin)
                which, group = int(split[index]), int(spool.groups[index])
                if which < 0:
                    continue
                time = float(spool.times[index])
                joined = last_group[which] == group
                if joined and time < last_time[which]:
                    reader.rejects.add(
                        reader.place(int(index)), f"time {time!r} is before {last_time[which]!r}, that of the document "
                        "before it in its sequence; expected times in ascending order",
                    )  # fmt: skip
                    continue
                count = spool.bytes_of(int(index)) + 1
                body = np.concatenate((tokens, end))
                for number, piece in enumerate(_pieces(body, prefix, reader.options)):
                    continues = joined or (number > 0 and reader._joined)
                    whole = np.concatenate(piece if continues else (start, *piece))
                    position[which] = position[which] if continues else 0
                    times = np.full(len(whole), time)
                    if not reader.timed:
                        times = position[which] + np.arange(len(whole), dtype=np.float64)
                    first = number == 0
                    writers[which].append(
                        whole, times, documents=int(first), text_bytes=count if first else 0, continues=continues
                    )
                    position[which] += len(whole)
                last_group[which], last_time[which] = group, time


def _prefixes(
    reader: TextReader, tokenizer: TextTokenizer, indices: np.ndarray[Any, Any], unit: float
) -> list[np.ndarray[Any, Any]]:
    if not reader.options.timestamp_prefix:
        return [np.empty(0, np.int32)] * len(indices)
    texts = []
    for index in indices:
        text = date_text(float(reader.spool.times[index]), unit, reader.options.timestamp_format)
        if text is None:
            raise UserError(
                f"{reader.place(int(index))}: time {reader.spool.times[index]!r} is no date in years 1 .. 9999; "
                "expected times since 1970 for --timestamp-prefix (see --time-unit)"
            )
        texts.append(text)
    return tokenizer.encode_batch(texts)


def _pieces(
    body: np.ndarray[Any, Any], prefix: np.ndarray[Any, Any], options: PreprocessOptions
) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """(prefix, part) of the document's segments, which with `<s>` have at most --segment tokens."""
    capacity = len(body)
    if options.segment is not None:
        capacity = options.segment - len(prefix) - 1
        if capacity < 1:
            raise UserError(
                f"--segment: got {options.segment}, expected at least {len(prefix) + 2}: a prefix of {len(prefix)} "
                "tokens, <s>, and one token of text"
            )
    for begin in range(0, len(body), capacity):
        yield prefix, body[begin : begin + capacity]

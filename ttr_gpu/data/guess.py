"""What a file is, from its first bytes: events or text, and in which format. The guess is always printed."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from .sources import Source

# Column names understood without an option, in order of preference.
SEQUENCE_NAMES = ("sequence", "sequence_id", "seq_id", "id", "user", "user_id", "case", "case_id", "patient")
TIME_NAMES = ("time", "timestamp", "times", "date", "datetime", "t")
TYPE_NAMES = ("type", "types", "mark", "event", "event_type", "label", "activity", "kind")
TEXT_NAMES = ("text", "message", "body", "content")


@dataclass(frozen=True)
class Layout:
    """How a file is to be read.

    Attributes:
        kind: "events" or "text".
        form: "csv", "json" (values one by one, in an array or a line each), "lines" or "parquet".
        columns: names of a header, or of the first record's fields; empty if there are none.
        header: whether a CSV file's first line is a header.
        delimiter: of a CSV file.
    """

    kind: str
    form: str
    columns: tuple[str, ...] = ()
    header: bool = False
    delimiter: str = ","

    def __str__(self) -> str:
        shape = {"csv": "CSV", "json": "JSON", "lines": "plain text", "parquet": "Parquet"}[self.form]
        if self.form == "csv":
            shape += " with header" if self.header else " without header"
        return f"{self.kind}, {shape}" + (f": {','.join(self.columns)}" if self.columns else "")


def guess_layout(source: Source, kind: str | None, header: bool | None = None) -> Layout:
    """Layout of a source; `kind` and `header` are guessed where they are None."""
    head = source.peek()
    if not head.strip():
        raise UserError(f"{source.name}: the file is empty; expected events or text")
    if head[:4] == b"PAR1":
        return _parquet(source, kind)
    if b"\x00" in head:
        raise UserError(f"{source.name}: binary data; expected CSV, JSON, JSONL, Parquet or text (also as .gz)")
    text = head.decode("utf-8", "replace").removeprefix("\ufeff")
    if text.lstrip()[0] in "[{":
        return _json(text.lstrip(), kind, source)
    return _delimited(text, kind, header, source)


def _json(text: str, kind: str | None, source: Source) -> Layout:
    decoder = json.JSONDecoder()
    start = text[1:].lstrip() if text[0] == "[" else text
    try:
        first: Any = decoder.raw_decode(start)[0]
    except ValueError:
        # A first record longer than what was looked at: its field names decide.
        first = {name: None for name in ("times", "text") if f'"{name}"' in text}
    if isinstance(first, str):
        return Layout(kind or "text", "json")
    if not isinstance(first, dict):
        return Layout(kind or "events", "json")
    fields = tuple(first)
    if kind is None:
        kind = "text" if any(name in first for name in TEXT_NAMES) and "times" not in first else "events"
    return Layout(kind, "json", fields)


def _delimited(text: str, kind: str | None, header: bool | None, source: Source) -> Layout:
    lines = text.splitlines()
    name = source.path.removesuffix(".gz").lower()
    delimiter = "\t" if name.endswith(".tsv") or ("\t" in lines[0] and "," not in lines[0]) else ","
    try:
        row = next(csv.reader(lines[:1], delimiter=delimiter), [])
    except csv.Error:
        row = []
    row = [field.strip() for field in row]
    known = {field.lower() for field in row}
    named = known & {*TIME_NAMES, *TEXT_NAMES, *SEQUENCE_NAMES, *TYPE_NAMES}
    tabular = name.endswith((".csv", ".tsv")) or (len(row) > 1 and len(named) > 1) or kind == "events"
    if not tabular:
        return Layout(kind or "text", "lines")
    # A sole column of times is a sequence of events; else a sole column is text.
    times_alone = len(row) == 1 and bool(known & set(TIME_NAMES)) and len(lines) > 1 and _is_number(lines[1])
    if header is None:
        # A header names a known column; a sole column may be a text that happens to be one word.
        header = bool(named) if len(row) > 1 else bool(known & set(TEXT_NAMES)) or times_alone
        header = header or (kind == "events" and not any(_is_number(field) for field in row))
    if kind is None:
        kind = "text" if (len(row) == 1 and not times_alone) or (header and known & set(TEXT_NAMES)) else "events"
    return Layout(kind, "csv", tuple(row) if header else (), header, delimiter)


def _parquet(source: Source, kind: str | None) -> Layout:
    from .readers import open_parquet

    names = tuple(open_parquet(source).schema_arrow.names)
    if kind is None:
        kind = "text" if set(names) & set(TEXT_NAMES) else "events"
    return Layout(kind, "parquet", names)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

"""What a file is, from its first bytes: events or text, and in which format. The guess is always printed."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ..errors import UserError
from .sources import Source
from .wording import json_reason, shown

# Column names understood without an option, in order of preference.
SEQUENCE_NAMES = ("sequence", "sequence_id", "seq_id", "id", "user", "user_id", "case", "case_id", "patient")
TIME_NAMES = ("time", "timestamp", "times", "date", "datetime", "t")
TYPE_NAMES = ("type", "types", "mark", "event", "event_type", "label", "activity", "kind")
TEXT_NAMES = ("text", "message", "body", "content")
# Characters of the longest first JSON record whose fields are looked at.
_LONGEST_FIRST = 1 << 28
_KNOWN_NAMES = (*SEQUENCE_NAMES, *TIME_NAMES, *TYPE_NAMES, *TEXT_NAMES)


@dataclass(frozen=True)
class Layout:
    """How a file is to be read.

    Attributes:
        kind: "events" or "text".
        form: "csv", "json" (values one by one, in an array or a line each), "lines" or "parquet".
        columns: names of a header, or of the first record's fields; empty if there are none.
        header: whether a CSV file's first line is a header.
        delimiter: of a CSV file.
        width: columns of a CSV file's first line.
    """

    kind: str
    form: str
    columns: tuple[str, ...] = ()
    header: bool = False
    delimiter: str = ","
    width: int = 0

    def __str__(self) -> str:
        shape = {"csv": "CSV", "json": "JSON", "lines": "plain text", "parquet": "Parquet"}[self.form]
        if self.form == "csv":
            shape += " with header" if self.header else " without header"
            shape += {"\t": ", divided by tabs", ";": ", divided by semicolons", "|": ", divided by bars"}.get(
                self.delimiter, ""
            )
        return f"{self.kind}, {shape}" + (f": {','.join(self.columns)}" if self.columns else "")


def guess_layout(
    source: Source, kind: str | None, header: bool | None = None, wanted: tuple[str, ...] = ()
) -> Layout:  # fmt: skip
    """Layout of a source; `kind` and `header` are guessed where they are None. `wanted`: columns named by options."""
    head = source.peek()
    text = _decoded(head)
    if not text:
        raise UserError(f"{source.name}: the file is empty; expected events or text")
    if head[:4] == b"PAR1":
        return _parquet(source, kind)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{source.name}: is UTF-16; expected UTF-8: convert it with iconv -f UTF-16 -t UTF-8")
    if b"\x00" in head:
        raise UserError(f"{source.name}: binary data; expected CSV, JSON, JSONL, Parquet or text (also as .gz)")
    named_json = source.path.removesuffix(".gz").lower().endswith((".json", ".jsonl", ".ndjson"))
    if named_json or text[0] in "[{":
        layout = _json(text, kind, source, named_json)
        if layout is not None:
            return layout
    return _delimited(text, kind, header, wanted, source)


def _json(text: str, kind: str | None, source: Source, named_json: bool) -> Layout | None:
    """The layout of JSON; None for a text that merely begins with a bracket, such as a log's "[12:05] started"."""
    try:
        first, after = _first_value(text, source)
    except (ValueError, RecursionError) as error:
        if not named_json:
            return None
        if text[0] == "[" and text[1:].lstrip().startswith("]"):
            raise UserError(f"{source.name}: the JSON array is empty; expected events or text") from None
        raise UserError(
            f"{source.name}: malformed JSON: {json_reason(error, False)}; expected one record a line, or one array of "
            "records"
        ) from None
    if text[0] == "[" and not named_json and after not in (",", "]", ""):
        return None
    if isinstance(first, str):
        return Layout(kind or "text", "json")
    if not isinstance(first, dict):
        if not named_json:
            return None
        raise UserError(f"{source.name}:1: got {shown(first, 40)}; expected JSON strings or records")
    fields = tuple(first)
    if kind is None:
        known = {name.lower() for name in fields}
        kind = "text" if known & set(TEXT_NAMES) and "times" not in known else "events"
    return Layout(kind, "json", fields)


def _first_value(text: str, source: Source) -> tuple[Any, str]:
    """The first value of JSON (of its array, if it is one), and the character after it."""
    decoder = json.JSONDecoder()
    size = len(text)
    while True:
        start = text[1:].lstrip() if text[0] == "[" else text
        try:
            first, end = decoder.raw_decode(start)
            return first, start[end:].lstrip()[:1]
        except ValueError:
            # A first record longer than what was looked at?
            size *= 8
            longer = _decoded(source.peek(size)) if start[:1] in ('"', "{") and size <= _LONGEST_FIRST else text
            if len(longer) == len(text):
                raise
            text = longer


def _decoded(head: bytes) -> str:
    return head.decode("utf-8", "replace").removeprefix("\ufeff").lstrip()


def _delimited(text: str, kind: str | None, header: bool | None, wanted: tuple[str, ...], source: Source) -> Layout:
    lines = text.splitlines()
    name = source.path.removesuffix(".gz").lower()
    delimiter = "\t" if name.endswith(".tsv") else _delimiter(lines)
    row = _fields(lines[0], delimiter)
    known = {field.lower() for field in row}
    named = known & {*_KNOWN_NAMES, *(column.lower() for column in wanted if not column.isdigit())}
    tabular = name.endswith((".csv", ".tsv")) or (len(row) > 1 and len(named) > 1) or kind == "events"
    if not tabular:
        return Layout(kind or "text", "lines")
    # A sole column of times is a sequence of events; else a sole column is text.
    times_alone = len(row) == 1 and bool(known & set(TIME_NAMES)) and len(lines) > 1 and _is_number(lines[1])
    if header is None:
        # A header names a known column; a sole column may be a text that happens to be one word.
        header = bool(named) if len(row) > 1 else bool(known & set(TEXT_NAMES)) or times_alone
        header = header or (kind == "events" and not any(_is_number(field) for field in row))
        # Names nobody knows above numbers or dates.
        below = _fields(lines[1], delimiter) if len(lines) > 1 else []
        values = [_is_number(field) or _is_date(field) for field in row]
        header = header or (len(row) > 1 and not any(values) and any(_is_number(f) or _is_date(f) for f in below))
    if kind is None:
        kind = "text" if (len(row) == 1 and not times_alone) or (header and known & set(TEXT_NAMES)) else "events"
    return Layout(kind, "csv", tuple(row) if header else (), header, delimiter, len(row))


def _parquet(source: Source, kind: str | None) -> Layout:
    from .readers import open_parquet

    names = tuple(open_parquet(source).schema_arrow.names)
    if kind is None:
        kind = "text" if {name.lower() for name in names} & set(TEXT_NAMES) else "events"
    return Layout(kind, "parquet", names)


def _fields(line: str, delimiter: str) -> list[str]:
    try:
        row = next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        row = []
    return [field.strip() for field in row]


def _delimiter(lines: list[str]) -> str:
    """A comma, unless another one divides a header of known names, or all lines into as many fields."""
    if len(_fields(lines[0], ",")) > 1:
        return ","
    for delimiter in "\t;|":
        names = {field.lower() for field in _fields(lines[0], delimiter)}
        if len(names & set(_KNOWN_NAMES)) > 1:
            return delimiter
        # The last line looked at may be cut short.
        widths = {len(_fields(line, delimiter)) for line in (lines[:-1] or lines)[:50] if line}
        if len(widths) == 1 and max(widths) > 1 and (delimiter == "\t" or max(widths) > 2):
            return delimiter
    return ","


def _is_date(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

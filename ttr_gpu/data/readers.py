"""Raw files to records: dictionaries of named fields, each with the place it came from."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from .guess import Layout
from .rejects import Rejects
from .sources import Source
from .wording import json_reason, shown

# Characters of the longest value of a JSON array.
_LONGEST_VALUE = 64 << 20
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Record:
    """One row, one JSON value, or one line.

    Attributes:
        line: number in its file, from 1.
        fields: by column name, or by position from 1 ("1", "2", …) where there are no names; or the text itself.
    """

    line: int
    fields: dict[str, Any] | str


def records(source: Source, layout: Layout, rejects: Rejects, by: str = "line") -> Iterator[Record]:
    """Every record of a source.

    Args:
        by: plain text: "line" (a document a line; blank lines are passed over) or "paragraph" (up to a blank line).
    """
    if layout.form == "parquet":
        return _parquet(source)
    if layout.form == "json" and source.peek().decode("utf-8", "replace").removeprefix("\ufeff").lstrip()[:1] == "[":
        return _json_array(source)
    lines = source.lines(rejects)
    if layout.form == "csv":
        return _csv(source, lines, layout, rejects)
    if layout.form == "json":
        return _json_lines(source, lines, rejects)
    return _paragraphs(lines) if by == "paragraph" else _lines(lines)


def _lines(lines: Iterable[tuple[int, str]]) -> Iterator[Record]:
    for number, text in lines:
        if text.strip():
            yield Record(number, text)


def _paragraphs(lines: Iterable[tuple[int, str]]) -> Iterator[Record]:
    paragraph: list[str] = []
    start = 0
    for number, text in lines:
        if text.strip():
            start = start if paragraph else number
            paragraph.append(text)
        elif paragraph:
            yield Record(start, "\n".join(paragraph))
            paragraph = []
    if paragraph:
        yield Record(start, "\n".join(paragraph))


def _csv(source: Source, lines: Iterable[tuple[int, str]], layout: Layout, rejects: Rejects) -> Iterator[Record]:
    number = 0

    def counted() -> Iterator[str]:
        nonlocal number
        for number, text in lines:  # noqa: B007 (read by the loop below)
            yield text + "\n"

    csv.field_size_limit(1 << 30)
    reader = csv.reader(counted(), delimiter=layout.delimiter, strict=True)
    names: list[str] | None = None
    start = 1
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            expected = 'fields quoted with ""'
            if "new-line character" in str(error):
                # Python's advice is for programmers.
                error, expected = csv.Error("a carriage return within a line"), "lines that end in LF or CRLF"
            rejects.add(f"{source.name}:{start}", f"malformed CSV: {error}; expected {expected}")
            start = number + 1
            continue
        first, start = start, number + 1
        if not row:
            continue
        if names is None:
            names = [field.strip() for field in row] if layout.header else [str(i + 1) for i in range(len(row))]
            duplicate = next((name for name in names if names.count(name) > 1), None)
            if duplicate is not None:
                raise UserError(f"{source.name}:{first}: column {duplicate!r} appears twice; expected distinct names")
            if layout.header:
                continue
        if len(row) != len(names):
            reason = f"got {len(row)} fields; expected {len(names)} ({layout.delimiter.join(names)})"
            rejects.add(f"{source.name}:{first}", reason, layout.delimiter.join(row))
            continue
        yield Record(first, dict(zip(names, row, strict=True)))


def _json_lines(source: Source, lines: Iterable[tuple[int, str]], rejects: Rejects) -> Iterator[Record]:
    for number, text in lines:
        if not text.strip():
            continue
        try:
            value = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            reason = f"malformed JSON: {json_reason(error)}; expected one record a line, or one array of records"
            rejects.add(f"{source.name}:{number}", reason, text)
            continue
        if _usable(value, source, number, text, rejects):
            yield Record(number, value)


def _json_array(source: Source) -> Iterator[Record]:
    """The values of a JSON array, read as far as needed for the next one: the array, even on one line, may be larger
    than memory.

    Malformed JSON ends the run even with --on-error skip: where the next value begins is then unknown.
    """
    decoder = json.JSONDecoder(parse_constant=_no_constant)
    parts = source.text()
    text, at, number, ended = "", 0, 1, False
    expected = "["
    while True:
        end = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        number += text.count("\n", at, end)
        at = end
        where = f"{source.name}:{number}"
        got = text[at : at + 1]
        if got and got in expected:
            at += 1
            if got == "]":
                rest = text[at:].strip() or next((part for part in parts if part.strip()), "")
                if rest:
                    raise UserError(f"{where}: text after the end of the JSON array")
                return
            expected = {"[": "value]", ",": "value"}[got]
            continue
        if got and "value" not in expected:
            raise UserError(f"{where}: got {text[at : at + 20]!r}; expected ',' or ']' in the JSON array")
        if got:
            try:
                value, end = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                if ended or len(text) - at > _LONGEST_VALUE:
                    line = number + text.count("\n", at, getattr(error, "pos", at))
                    raise UserError(f"{source.name}:{line}: malformed JSON: {json_reason(error, False)}") from None
            else:
                if not isinstance(value, dict | str):
                    raise UserError(f"{where}: got {shown(value, 40)}; expected a string or a record")
                yield Record(number, value)
                number += text.count("\n", at, end)
                at, expected = end, ",]"
                continue
        if ended:
            raise UserError(f"{where}: the JSON array does not end; is the file cut short?")
        # More text than before each time: a long value is not parsed again for each of its lines.
        text, at, wanted = text[at:], 0, 2 * (len(text) - at)
        block = list(_take(parts, max(1 << 16, wanted)))
        ended = not block
        text += "".join(block)


def _take(parts: Iterator[str], characters: int) -> Iterator[str]:
    while characters > 0:
        part = next(parts, None)
        if part is None:
            return
        characters -= len(part)
        yield part


def _usable(value: Any, source: Source, number: int, text: str, rejects: Rejects) -> bool:
    if isinstance(value, dict | str):
        return True
    rejects.add(f"{source.name}:{number}", f"got a JSON {type(value).__name__}; expected a record or a string", text)
    return False


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def open_parquet(source: Source) -> Any:
    """The pyarrow file of a Parquet source."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{source.name}: reading Parquet needs pyarrow: pip install 'ttr-gpu[parquet]'") from None
    if source.path == "-":
        raise UserError("<stdin>: Parquet cannot be read from a pipe; expected a file")
    try:
        return pyarrow.parquet.ParquetFile(source.path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{source.name}: no valid Parquet file: {error}") from None


def _parquet(source: Source) -> Iterator[Record]:
    number = 0
    for batch in open_parquet(source).iter_batches(8192):
        for fields in batch.to_pylist():
            number += 1
            yield Record(number, {name: _plain(value) for name, value in fields.items()})


def _plain(value: Any) -> Any:
    return value.isoformat() if hasattr(value, "isoformat") else value

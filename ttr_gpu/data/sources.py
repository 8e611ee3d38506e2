"""Input files as numbered lines of checked UTF-8: plain, gzip (told by its content), or standard input."""

from __future__ import annotations

import codecs
import gzip
import io
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ..errors import UserError
from .rejects import Rejects

# A line longer than this is no line of a log: a binary file, or JSON that was meant to be read as one document.
_LONGEST_LINE = 64 << 20


class Source:
    """One input. `name` is what messages call it; its lines can be read once, after any number of `peek`s."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.name = "<stdin>" if path == "-" else path
        self.bytes_total: int | None = None
        if path == "-":
            # Past Python's own buffer, which waits to be full: a pipe gives what it has.
            raw: Any = getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)
        else:
            if Path(path).is_dir():
                raise UserError(f"{path}: is a folder; expected a file (give its files one by one)")
            try:
                raw = open(path, "rb")  # noqa: SIM115 (closed by `close`)
            except FileNotFoundError:
                raise UserError(f"{path}: no such file{similar(path)}") from None
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror}") from None
            self.bytes_total = os.fstat(raw.fileno()).st_size
        self._raw: IO[bytes] = io.BufferedReader(raw, 1 << 20) if path == "-" else raw
        head = self._raw.peek(2)[:2] if hasattr(self._raw, "peek") else b""
        self._stream: Any = self._raw
        if head == b"\x1f\x8b":
            self._stream = io.BufferedReader(gzip.GzipFile(fileobj=self._raw), 1 << 20)
        self._head = b""

    def peek(self, size: int = 1 << 16) -> bytes:
        """The first bytes, which stay to be read."""
        while len(self._head) < size and (part := self._read(size - len(self._head))):
            self._head += part
        return self._head[:size]

    @property
    def bytes_read(self) -> int:
        """Position in the (compressed) file, for progress."""
        return self._raw.tell() if self.bytes_total is not None else 0

    def lines(self, rejects: Rejects) -> Iterator[tuple[int, str]]:
        """(number from 1, text without its line end); lines that are not UTF-8 are rejected."""
        for number, raw in enumerate(self._raw_lines(), 1):
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                reason = f"invalid UTF-8 at byte {error.start + 1}; expected UTF-8"
                rejects.add(f"{self.name}:{number}", reason, raw.decode("utf-8", "backslashreplace"))
                continue
            # Some programs begin a file with a byte-order mark.
            yield number, (text.removeprefix("\ufeff") if number == 1 else text).rstrip("\r\n")

    def text(self) -> Iterator[str]:
        """The text in pieces of about a MiB, wherever lines end; UserError where it is not UTF-8."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        piece, self._head = self._head or self._read(1 << 20), b""
        number, first = 1, True
        while True:
            try:
                text = decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                number += error.object.count(b"\n", 0, error.start)
                raise UserError(f"{self.name}:{number}: invalid UTF-8; expected UTF-8") from None
            yield text.removeprefix("\ufeff") if first else text
            if not piece:
                return
            number += text.count("\n")
            piece, first = self._read(1 << 20), False

    def close(self) -> None:
        """Close the file."""
        if self.path != "-":
            self._raw.close()

    def _read(self, size: int) -> bytes:
        """Some bytes, as soon as there are any; none at the end."""
        try:
            data: bytes = self._stream.read1(size)
            return data
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{self.name}: the gzip data are damaged or cut short: {error}") from None
        except OSError as error:
            raise UserError(f"{self.name}: cannot be read: {error}") from None

    def _raw_lines(self) -> Iterator[bytes]:
        rest, self._head = self._head, b""
        while True:
            chunk = self._read(1 << 20)
            lines = (rest + chunk).split(b"\n")
            rest = lines.pop()
            yield from lines
            if len(rest) > _LONGEST_LINE:
                raise UserError(f"{self.name}: a line of more than {_LONGEST_LINE >> 20} MiB; expected lines of text")
            if not chunk:
                if rest:
                    yield rest
                return


def similar(path: str) -> str:
    """A hint "did you mean …?" where the folder holds a name like this one; else nothing."""
    import difflib

    folder = Path(path).parent
    names = [p.name for p in folder.glob("*")] if folder.is_dir() else []
    near = difflib.get_close_matches(Path(path).name, names, 1, 0.75)
    return f"; did you mean {folder / near[0]}?" if near else ""

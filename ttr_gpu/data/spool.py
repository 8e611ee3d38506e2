"""What has been read, on disk until it is written as shards: memory stays bounded whatever the size of the input."""

from __future__ import annotations

import os
import shutil
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

# Elements held in memory before they go to disk.
_BLOCK = 1 << 16


class Column:
    """A growing file of numbers, then a read-only array mapped from it.

    Args:
        code: of `array.array`: "q" int64, "d" float64, "i" int32.
    """

    def __init__(self, path: Path, code: str) -> None:
        self.path, self.code = path, code
        self._file: IO[bytes] | None = path.open("wb")
        self._block = array(code)
        self.count = 0

    def append(self, value: Any) -> None:
        """Add one number."""
        self._block.append(value)
        self.count += 1
        if len(self._block) >= _BLOCK:
            self._flush()

    def extend(self, values: Any) -> None:
        """Add a NumPy array."""
        self._flush()
        assert self._file is not None
        self._file.write(np.ascontiguousarray(values, self.code).tobytes())
        self.count += len(values)

    def finish(self) -> np.ndarray[Any, Any]:
        """All numbers, mapped from the file."""
        self._flush()
        if self._file is not None:
            self._file.close()
            self._file = None
        if not self.count:
            return np.empty(0, self.code)
        # A plain array over the mapping: single elements of a memmap are slow to take.
        return np.asarray(np.memmap(self.path, self.code, "r"))

    def _flush(self) -> None:
        if self._block and self._file is not None:
            self._block.tofile(self._file)
            self._block = array(self.code)


class EventSpool:
    """Events in input order; then the same grouped by sequence, sequences in the order of their first event.

    Places are kept as (input, line), so that an event that turns out to be out of order can be named.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sequence, self.time = Column(folder / "sequence", "q"), Column(folder / "time", "d")
        self.type, self.place = Column(folder / "type", "i"), Column(folder / "place", "q")

    def append(self, sequence: int, time: float, kind: int, place: int) -> None:
        """Add one event."""
        self.sequence.append(sequence)
        self.time.append(time)
        self.type.append(kind)
        self.place.append(place)

    def grouped(self, sequences: int) -> Grouped:
        """Group by sequence: a counting sort from files to files."""
        owner = self.sequence.finish()
        columns = [self.time.finish(), self.type.finish(), self.place.finish()]
        counts = np.zeros(sequences, np.int64)
        for begin in range(0, len(owner), _BLOCK):
            counts += np.bincount(owner[begin : begin + _BLOCK], minlength=sequences)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        in_order = all(
            (np.diff(owner[begin : begin + _BLOCK + 1]) >= 0).all() for begin in range(0, len(owner), _BLOCK)
        )
        if in_order:
            return Grouped(offsets, *columns)
        filled = offsets[:-1].copy()
        sorted_columns = [_mapped(self.folder / f"sorted{index}", column) for index, column in enumerate(columns)]
        for begin in range(0, len(owner), _BLOCK):
            part = np.asarray(owner[begin : begin + _BLOCK])
            order = np.argsort(part, kind="stable")
            ordered = part[order]
            starts = np.flatnonzero(np.diff(ordered, prepend=-1))
            rank = np.arange(len(part)) - np.repeat(starts, np.diff(starts, append=len(part)))
            target = filled[ordered] + rank
            for column, result in zip(columns, sorted_columns, strict=True):
                result[target] = column[begin : begin + _BLOCK][order]
            filled[ordered[starts]] += np.diff(starts, append=len(part))
        return Grouped(offsets, *sorted_columns)


def _mapped(path: Path, like: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A file to write into as an array. Its space is taken at once: on a full disk, a write to a mapped page kills."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(like.nbytes, 1))
    return np.memmap(path, like.dtype, "r+", shape=like.shape)


class Grouped:
    """Events by sequence: sequence i is the slice offsets[i]:offsets[i + 1] of `times`, `types` and `places`."""

    def __init__(self, offsets: Any, times: Any, types: Any, places: Any) -> None:
        self.offsets, self.times, self.types, self.places = offsets, times, types, places

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of whole sequences, of about a block of events each (at least one sequence)."""
        first = 0
        while first < len(self.offsets) - 1:
            last = int(np.searchsorted(self.offsets, self.offsets[first] + _BLOCK, "right")) - 1
            last = min(max(last, first + 1), len(self.offsets) - 1)
            yield first, last
            first = last


class TextSpool:
    """Documents in input order: their text, time, and the sequence to which they belong."""

    def __init__(self, folder: Path) -> None:
        self._texts = (folder / "texts").open("w+b")
        self._ends, self._times = Column(folder / "ends", "q"), Column(folder / "times", "d")
        self._groups, self._places = Column(folder / "groups", "q"), Column(folder / "places", "q")
        self._end = 0

    def append(self, text: str, time: float, group: int, place: int) -> None:
        """Add one document."""
        data = text.encode("utf-8")
        self._texts.write(data)
        self._end += len(data)
        self._ends.append(self._end)
        self._times.append(time)
        self._groups.append(group)
        self._places.append(place)

    def finish(self) -> None:
        """No more documents will come."""
        self._texts.flush()
        self.ends, self.times = self._ends.finish(), self._times.finish()
        self.groups, self.places = self._groups.finish(), self._places.finish()

    def __len__(self) -> int:
        return self._ends.count

    def bytes_of(self, index: int) -> int:
        """Length of a document in UTF-8."""
        return int(self.ends[index]) - (int(self.ends[index - 1]) if index else 0)

    def text(self, index: int) -> str:
        """One document."""
        start = int(self.ends[index - 1]) if index else 0
        self._texts.seek(start)
        return self._texts.read(int(self.ends[index]) - start).decode("utf-8")

    def close(self) -> None:
        """Close the file of texts."""
        self._texts.close()


def free_space_error(error: OSError, folder: Path) -> str:
    """What to say of a write into a folder that failed."""
    free = shutil.disk_usage(folder).free if folder.exists() else 0
    return f"cannot be written: {error.strerror or error} ({free / 2**20:,.0f} MiB are free in {folder.resolve()})"

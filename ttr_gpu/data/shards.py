"""Writing `data.zarr`: shards of tokens and times, checksums, and a rename at the end that makes it exist.

The format is described in docs/data.md. Everything is written to `<target>.partial-<pid>` beside the target; only a
complete, synced folder gets the target's name, and a failure of any kind removes the partial one.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .gaps import GapHistogram
from .sharded_array import ShardedArray
from .spool import free_space_error

FORMAT, FORMAT_VERSION = "ttr-gpu-dataset", 1
# Positions of appended sequences that are taken up at once.
_JOINED = 1 << 16


@contextlib.contextmanager
def partial_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write into; on leaving it is renamed to `target`, or removed after any error or Ctrl-C."""
    if target.exists() and not overwrite:
        raise UserError(f"{target}: exists already; choose another -o, or add --overwrite")
    if target.exists() and not _is_dataset(target):
        raise UserError(f"{target}: exists already and is no data set; --overwrite replaces data sets only")
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise UserError(f"{target}: cannot be created: {error.strerror}") from None
    try:
        yield partial
        _sync(partial)
        if target.exists():
            # The old data set goes only when the new one is complete.
            old = target.with_name(f"{partial.name}-old")
            target.rename(old)
            partial.rename(target)
            _remove(old)
        else:
            partial.rename(target)
        _sync_one(target.parent)
    except OSError as error:
        raise UserError(f"{target}: {free_space_error(error, target.parent)}") from None
    finally:
        _remove(partial)


def note_leftovers(target: Path, say: Callable[[str], None]) -> None:
    """Say if earlier runs to this target were killed: nothing but they could have removed their folders."""
    if not target.parent.is_dir():
        return
    for folder in sorted(target.parent.glob(f"{glob.escape(target.name)}.partial-*")):
        say(f"note: {folder} was left by a run that was killed, or is being written; remove it if no run is going on")


def _is_dataset(path: Path) -> bool:
    try:
        attributes = json.loads((path / "zarr.json").read_text())["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(attributes.get("format") == FORMAT)


class SplitWriter:
    """Appends sequences to one split.

    Args:
        root: the zarr group of the data set.
        name: of the split.
        vocabulary_size: decides between uint16 and uint32 tokens.
        origin: subtracted from all times.
    """

    def __init__(self, root: Any, name: str, vocabulary_size: int, origin: float) -> None:
        self._root, self.name, self.origin = root, name, origin
        self._dtype = np.dtype(np.uint16 if vocabulary_size <= 1 << 16 else np.uint32)
        self._tokens = ShardedArray(self._group, "tokens", self._dtype)
        self._times = ShardedArray(self._group, "times", np.dtype(np.float64))
        # Tokens, times and `continues` as they were appended; see `_join`.
        self._fresh: tuple[list[Any], list[Any], list[bool]] = ([], [], [])
        self._fresh_count = 0
        self._offsets = array("q", [0])
        self._digests = [hashlib.sha256(), hashlib.sha256()]
        self.documents = self.bytes = 0
        self._last_time = 0.0
        self.time_min, self.time_max = np.inf, -np.inf
        self.gaps = GapHistogram()

    @property
    def sequences(self) -> int:
        """Sequences written."""
        return len(self._offsets) - 1

    def append(
        self, tokens: Any, times: Any, *, documents: int = 0, text_bytes: int = 0, continues: bool = False
    ) -> None:
        """Add one sequence, int32 tokens and absolute times, or more of the last one (`continues`)."""
        count = len(tokens)
        if not count:
            return
        if continues:
            self._offsets[-1] += count
        else:
            self._offsets.append(self._offsets[-1] + count)
        self.documents += documents
        self.bytes += text_bytes
        for fresh, value in zip(self._fresh, (tokens, times, continues), strict=True):
            fresh.append(value)
        self._fresh_count += count
        # Sequences are often short: the arithmetic is done for many of them at once.
        if self._fresh_count >= _JOINED:
            self._join()

    def _join(self) -> None:
        """Take up what was appended: gaps, extremes, hashes, and the values themselves."""
        if not self._fresh_count:
            return
        tokens, times, continues = self._fresh
        self._fresh, self._fresh_count = ([], [], []), 0
        starts = np.cumsum([0, *(len(part) for part in tokens[:-1])])
        narrow = np.concatenate(tokens).astype(self._dtype)
        relative = np.concatenate(times).astype(np.float64, copy=False) - self.origin
        gaps = np.diff(relative, prepend=self._last_time)
        inside = np.ones(len(gaps), bool)
        inside[starts] = continues
        self.gaps.add(gaps[inside])
        self._last_time = float(relative[-1])
        self.time_min = min(self.time_min, float(relative.min()))
        self.time_max = max(self.time_max, float(relative.max()))
        self._digests[0].update(narrow.astype("<u4").tobytes())
        self._digests[1].update(relative.astype("<f8").tobytes())
        self._tokens.append(narrow)
        self._times.append(relative)

    def finish(self) -> dict[str, Any]:
        """Write the rest; returns the split's entry in the attributes."""
        self._join()
        self._tokens.finish()
        self._times.finish()
        offsets = ShardedArray(self._group, "offsets", np.dtype(np.int64))
        offsets.append(np.frombuffer(self._offsets, np.int64))
        offsets.finish()
        return {
            "sequences": self.sequences, "tokens": int(self._offsets[-1]), "documents": self.documents,
            "bytes": self.bytes, "time_min": self.time_min, "time_max": self.time_max,
        }  # fmt: skip

    def digest(self) -> str:
        """Hash of the split's content, whatever its chunks and compression."""
        offsets = hashlib.sha256(np.frombuffer(self._offsets, np.int64).astype("<i8").tobytes()).hexdigest()
        return f"{self.name}:{self._digests[0].hexdigest()}:{self._digests[1].hexdigest()}:{offsets}"

    def _group(self) -> Any:
        # Made with its first array: an empty split has none.
        return self._root.require_group(self.name)


def finish_dataset(
    folder: Path, root: Any, writers: list[SplitWriter], attributes: dict[str, Any], vocabulary: str
) -> None:
    """Write the attributes, with checksums of every file and of themselves, and a fingerprint of the content."""
    splits = {writer.name: writer.finish() for writer in writers if writer.sequences}
    content = [vocabulary, *(writer.digest() for writer in writers if writer.sequences)]
    train = next((writer for writer in writers if writer.name == "train"), None)
    written = {
        "format": FORMAT, "format_version": FORMAT_VERSION, **attributes, "splits": splits,
        "gap": train.gaps.summary() if train is not None else {},
        "checksums": file_checksums(folder),
        "fingerprint": hashlib.sha256("\n".join(content).encode()).hexdigest(),
    }  # fmt: skip
    root.attrs.update({**written, "attributes_sha256": attributes_checksum(written)})


def attributes_checksum(attributes: dict[str, Any]) -> str:
    """SHA-256 of a data set's attributes but this one: the root's zarr.json cannot hold a checksum of itself."""
    described = {name: value for name, value in attributes.items() if name != "attributes_sha256"}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def file_checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """{"bytes", "sha256"} of every file of a data set but the root's own metadata."""
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / "zarr.json"
    }


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path, ignore_errors=True)

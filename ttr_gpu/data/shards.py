"""Writing `data.zarr`: shards of tokens and times, checksums, and a rename at the end that makes it exist.

The format is described in docs/data.md. Everything is written to `<target>.partial-<pid>` beside the target; only a
complete, synced folder gets the target's name, and a failure of any kind removes the partial one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .gaps import GapHistogram
from .spool import free_space_error

FORMAT, FORMAT_VERSION = "ttr-gpu-dataset", 1
# Elements of an inner chunk (1 MiB of float64) and of a shard (64 MiB of float64).
CHUNK, SHARD = 1 << 17, 1 << 23


@contextlib.contextmanager
def partial_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write into; on leaving it is renamed to `target`, or removed after any error or Ctrl-C."""
    if target.exists() and not overwrite:
        raise UserError(f"{target}: exists already; choose another -o, or add --overwrite")
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
        raise UserError(free_space_error(error, target.parent)) from None
    finally:
        _remove(partial)


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
        self._tokens: list[Any] = []
        self._times: list[Any] = []
        self._pending = 0
        self._group: Any = None
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
        if not len(tokens):
            return
        relative = np.asarray(times, np.float64) - self.origin
        self.gaps.add(np.diff(relative))
        if continues:
            self.gaps.add(relative[:1] - self._last_time)
            self._offsets[-1] += len(tokens)
        else:
            self._offsets.append(self._offsets[-1] + len(tokens))
        self._last_time = float(relative[-1])
        self.time_min = min(self.time_min, float(relative[0]))
        self.time_max = max(self.time_max, float(relative[-1]))
        self.documents += documents
        self.bytes += text_bytes
        narrow = np.asarray(tokens).astype(self._dtype)
        self._digests[0].update(narrow.astype("<u4").tobytes())
        self._digests[1].update(relative.astype("<f8").tobytes())
        self._tokens.append(narrow)
        self._times.append(relative)
        self._pending += len(tokens)
        if self._pending >= SHARD:
            self._write(SHARD)

    def finish(self) -> dict[str, Any]:
        """Write the rest; returns the split's entry in the attributes."""
        while self._pending:
            self._write(min(SHARD, self._pending))
        offsets = np.frombuffer(self._offsets, np.int64)
        if self._group is not None:
            _store(self._group, "offsets", offsets, 0, min(SHARD, _rounded(len(offsets))))
        return {
            "sequences": self.sequences, "tokens": int(self._offsets[-1]), "documents": self.documents,
            "bytes": self.bytes, "time_min": self.time_min, "time_max": self.time_max,
        }  # fmt: skip

    def digest(self) -> str:
        """Hash of the split's content, whatever its chunks and compression."""
        offsets = hashlib.sha256(np.frombuffer(self._offsets, np.int64).astype("<i8").tobytes()).hexdigest()
        return f"{self.name}:{self._digests[0].hexdigest()}:{self._digests[1].hexdigest()}:{offsets}"

    def _write(self, count: int) -> None:
        if self._group is None:
            self._group = self._root.create_group(self.name)
            # Small data do not allocate a shard of 64 MiB.
            self._shard = SHARD if count == SHARD else _rounded(count)
            self._written = 0
        for name, parts in (("tokens", self._tokens), ("times", self._times)):
            values = np.concatenate(parts)
            _store(self._group, name, values[:count], self._written, self._shard)
            parts[:] = [values[count:]] if len(values) > count else []
        self._written += count
        self._pending -= count


def finish_dataset(
    folder: Path, root: Any, writers: list[SplitWriter], attributes: dict[str, Any], vocabulary: str
) -> None:
    """Write the attributes, with checksums of every file and a fingerprint of the content."""
    splits = {writer.name: writer.finish() for writer in writers if writer.sequences}
    content = [vocabulary, *(writer.digest() for writer in writers if writer.sequences)]
    train = next((writer for writer in writers if writer.name == "train"), None)
    root.attrs.update(
        {
            "format": FORMAT, "format_version": FORMAT_VERSION, **attributes, "splits": splits,
            "gap": train.gaps.summary() if train is not None else {},
            "checksums": file_checksums(folder),
            "fingerprint": hashlib.sha256("\n".join(content).encode()).hexdigest(),
        }
    )  # fmt: skip


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


def _rounded(count: int) -> int:
    chunk = min(CHUNK, max(count, 1))
    return -(-count // chunk) * chunk


def _store(group: Any, name: str, values: Any, start: int, shard: int) -> None:
    """Write `values` at `start`, creating or growing the array."""
    from zarr.codecs import ZstdCodec

    if start == 0:
        group.create_array(
            name, shape=values.shape, dtype=values.dtype, chunks=(min(CHUNK, shard),), shards=(shard,),
            compressors=ZstdCodec(level=3), fill_value=0, config={"write_empty_chunks": True},
        )  # fmt: skip
        target = group[name].with_config({"write_empty_chunks": True})
    else:
        target = group[name].with_config({"write_empty_chunks": True})
        target.resize((start + len(values),))
    target[start : start + len(values)] = values


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

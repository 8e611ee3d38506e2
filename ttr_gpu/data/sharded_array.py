"""A one-dimensional Zarr array that grows by whole shards, so that no chunk is ever read back or written twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Of uncompressed values: an inner chunk, what one read decompresses at least; and a shard, which is a file.
CHUNK_BYTES, SHARD_BYTES = 1 << 20, 64 << 20


class ShardedArray:
    """Collects values, and writes each shard when it is full and the rest at the end.

    Args:
        group: gives the Zarr group when there is something to write.
        name: of the array in it.
        dtype: of its values.
    """

    def __init__(self, group: Callable[[], Any], name: str, dtype: np.dtype[Any]) -> None:
        self._group, self._name, self._dtype = group, name, dtype
        self._chunk, self._shard = CHUNK_BYTES // dtype.itemsize, SHARD_BYTES // dtype.itemsize
        self._parts: list[Any] = []
        self._pending = self._written = 0

    def append(self, values: np.ndarray[Any, Any]) -> None:
        """Add values of the array's dtype."""
        self._parts.append(values)
        self._pending += len(values)
        while self._pending >= self._shard:
            self._write(self._shard)

    def finish(self) -> None:
        """Write what is left."""
        if self._pending:
            self._write(self._pending)

    def _write(self, count: int) -> None:
        values = np.concatenate(self._parts)
        self._parts = [values[count:].copy()] if len(values) > count else []
        start = self._written
        if start == 0:
            self._create(count)
        target = self._group()[self._name].with_config({"write_empty_chunks": True})
        target.resize((start + count,))
        target[start : start + count] = values[:count]
        self._written += count
        self._pending -= count

    def _create(self, count: int) -> None:
        from zarr.codecs import ZstdCodec

        # Small data do not allocate a shard of 64 MiB.
        chunk = min(self._chunk, count)
        shard = min(self._shard, -(-count // chunk) * chunk)
        # Chunks of zeros are written too, so that what is missing is lost, and never zeros; the checksum tells a
        # changed byte when it is read.
        self._group().create_array(
            self._name, shape=(0,), dtype=self._dtype, chunks=(chunk,), shards=(shard,),
            compressors=ZstdCodec(level=3, checksum=True), fill_value=0,
        )  # fmt: skip


def lost_shard(array: Any, begin: int, end: int) -> Path | None:
    """A file of the shards that hold [begin, end) that is not there: Zarr would read zeros. None: all are there.

    Args:
        array: of a Zarr group on disk (arrays in memory have no shards).
    """
    shards = getattr(array, "shards", None)
    if shards is None or end <= begin:
        return None
    folder = Path(array.store.root) / array.path / "c"
    files = [folder / str(index) for index in range(begin // shards[0], (end - 1) // shards[0] + 1)]
    return next((file for file in files if not file.is_file()), None)

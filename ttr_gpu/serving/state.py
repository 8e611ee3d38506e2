"""Streams that outlive the service: a folder with a file for each, written whole or not at all.

Streams do not depend on each other, so a folder of which only a part was written holds every stream at some moment of
its own, and no half of one.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from ..infer.event_stream import EventStreams, SavedStream
from .engine import StreamEngine

SUFFIX = ".stream"
# Bytes of streams that are copied at a time, for which requests wait.
_COPIED = 16 << 20


def prepare(folder: Path) -> None:
    """Make the folder, see that it can be written (not only when the service ends), and remove what a killed service
    left half-written. UserError if it cannot be."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        for path in folder.glob(f".*{SUFFIX}.partial-*"):
            path.unlink()
    except OSError as error:
        raise UserError(f"--state {folder}: cannot be written: {error.strerror or error}") from None


def load_streams(folder: Path, streams: EventStreams) -> dict[str, int]:
    """Read what a `Keeper` wrote: the ring of each stream.

    Raises:
        UserError: a file that is damaged, of another model, or more of them than there are rings.
    """
    rings: dict[str, int] = {}
    paths = sorted(folder.glob(f"*{SUFFIX}"))
    if len(paths) > len(streams.cache.lengths):
        raise UserError(
            f"--state {folder}: holds {len(paths)} streams, more than the limit of {len(streams.cache.lengths)}; "
            f"set --streams {len(paths)} or more"
        )
    for ring, path in enumerate(paths):
        rings[streams.load(path, ring)] = ring
    return rings


class Keeper:
    """Writes the streams that have changed into a folder: at the end, and every so often before.

    A service that is killed loses at most what has come in the last `every` seconds, as long as writing takes less than
    half of that: it begins twice as often. What is in a file is the stream after some request, never within one.

    Args:
        engine: whose streams; what is in the folder already is what it began with.
        every: seconds; 0: only at the end.
        say: is told in one line what goes wrong. A folder that cannot be written is tried again.
        took: is told the seconds of each writing.

    Attributes:
        failure: why the last writing failed; None if it did not.
    """

    def __init__(
        self, folder: Path, engine: StreamEngine, every: float, say: Callable[[str], object],
        took: Callable[[float], object] = lambda seconds: None,
    ) -> None:  # fmt: skip
        self.folder, self.engine, self.every = folder, engine, every
        self.failure: str | None = None
        self._say, self._took, self._ending = say, took, asyncio.Event()
        self._slow = False
        cache = engine.streams.cache
        self._together = max(1, _COPIED * len(cache.lengths) // max(1, cache.bytes))

    async def run(self) -> None:
        """Write now and then until `end`, and then what is still to be written."""
        ending = False
        while not ending:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), self.every / 2 if self.every else None)
            # What has changed when the end is asked for within a writing is still to be written.
            ending, before, begun = self._ending.is_set(), self.failure, time.monotonic()
            await self.save()
            seconds = time.monotonic() - begun
            self._took(seconds)
            if self.failure is not None and before is None and not ending:
                self._say(f"{self.failure}; the service goes on, and tries again every {self.every / 2:g} s")
            if self.every and seconds > self.every / 2 and not self._slow:
                self._slow = True
                self._say(
                    f"--save-every {self.every:g}: writing streams took {seconds:.1f} s; a crash may lose more than "
                    f"the last {self.every:g} s; expected at least {2 * seconds:.1f}"
                )

    @property
    def count(self) -> int:
        """Streams that have had an event."""
        return sum(self.engine.streams.length(ring) > 0 for ring in self.engine.rings.values())

    def end(self) -> None:
        """To be called when the engine has come to its end: `run` writes once more and returns."""
        self._ending.set()

    async def save(self) -> None:
        """Write what has changed since the last time, and remove files of streams that are no more."""
        changed, self.engine.changed = self.engine.changed, set()
        self.failure = None
        try:
            while changed:
                waiting = sorted(changed)
                for begin in range(0, len(waiting), self._together):
                    names = waiting[begin : begin + self._together]
                    async with self.engine.at_rest:
                        # What is in the middle of a long request is left for later.
                        ready = [name for name in names if not self.engine.within_request(name)]
                        copies = {name: self._copy(name) for name in ready}
                    await asyncio.to_thread(self._write, copies)
                    changed.difference_update(ready)
                if changed:
                    await asyncio.sleep(0.01)
            await asyncio.to_thread(_sync, self.folder)
        except OSError as error:
            self.engine.changed |= changed
            self.failure = f"--state {self.folder}: streams not saved: {error.strerror or error}"

    def _copy(self, name: str) -> SavedStream | None:
        ring = self.engine.rings.get(name)
        if ring is None or not self.engine.streams.length(ring):
            return None
        return self.engine.streams.copy(ring, name=name)

    def _write(self, copies: dict[str, SavedStream | None]) -> None:
        for name, copy in copies.items():
            path = self.folder / _file_name(name)
            if copy is None:
                path.unlink(missing_ok=True)
            else:
                copy.write(path)


def _file_name(name: str) -> str:
    # Names are anything printable; file names are not.
    return hashlib.sha256(name.encode()).hexdigest()[:32] + SUFFIX


def _sync(folder: Path) -> None:
    """What was renamed and removed in it reaches the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Streams that outlive the service: a folder with a file for each, written whole or not at all.

Streams do not depend on each other, so a folder of which only a part was written holds every stream at some moment of
its own, and no half of one.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ..errors import UserError
from ..infer.event_stream import EventStreams

SUFFIX = ".stream"


def prepare(folder: Path) -> None:
    """Make the folder, and see that it can be written: not only when the service ends. UserError if not."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--state {folder}: cannot be written: {error.strerror or error}") from None


def save_streams(folder: Path, streams: EventStreams, rings: dict[str, int]) -> int:
    """Write all streams that have had an event; files of streams that are no more go. Returns how many were written."""
    kept = set()
    for name, ring in rings.items():
        if streams.length(ring):
            path = folder / _file_name(name)
            streams.save(path, ring, name=name)
            kept.add(path.name)
    for path in folder.glob(f"*{SUFFIX}"):
        if path.name not in kept:
            path.unlink()
    return len(kept)


def load_streams(folder: Path, streams: EventStreams) -> dict[str, int]:
    """Read what `save_streams` wrote: the ring of each stream.

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


def _file_name(name: str) -> str:
    # Names are anything printable; file names are not.
    return hashlib.sha256(name.encode()).hexdigest()[:32] + SUFFIX

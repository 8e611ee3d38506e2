"""TensorBoard events of a run, written by the thread that calls.

tensorboardX's own SummaryWriter hands events to a thread through a bounded queue: when that thread dies, of a full
disk, the loop waits for it for ever. So only the file format is the library's.
"""

from __future__ import annotations

import time
from pathlib import Path

_FLUSH_SECONDS = 10.0


class TensorBoardFile:
    """Appends scalars to a new event file in a folder. Every method raises OSError if it cannot be written.

    Args:
        folder: made if it is not there.
        purge_step: what earlier files hold from this step on is to be forgotten.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        folder.mkdir(exist_ok=True)
        self._proto = event_pb2
        # The library names files by the second: two of one second would be one.
        self._file = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        self._flushed = time.monotonic()
        if purge_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._file.write_event(event_pb2.Event(wall_time=time.time(), step=purge_step, session_log=start))

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Add values by name, all of one step."""
        from tensorboardX.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._file.write_event(self._proto.Event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Give what was added to the system."""
        self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush, and close the file."""
        self._file.close()

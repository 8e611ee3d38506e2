"""Progress of a long pass: a bar on a terminal, a line now and then elsewhere, always on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any


class Progress:
    """`with Progress("reading", total) as p: p.update(done)`; total None if unknown."""

    def __init__(self, label: str, total: int | None, unit: str = "") -> None:
        self.label, self.total, self.unit = label, total, unit
        self._bar: Any = None
        self._next = time.monotonic() + 5.0
        self._calls = 0

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(self.unit)]
            self._bar = RichProgress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int) -> None:
        """Say how much is done. Cheap: may be called for every record."""
        self._calls += 1
        if self._calls % 256:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        elif time.monotonic() >= self._next:
            share = f" of {self.total:,} ({100 * done / self.total:.0f} %)" if self.total else ""
            print(f"{self.label}: {done:,}{share} {self.unit}", file=sys.stderr, flush=True)
            self._next = time.monotonic() + 5.0

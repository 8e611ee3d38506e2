"""Training on a terminal: a table of the last steps that stands still, with lines above it."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

# Rows of the table, and seconds between two drawings of it.
_ROWS, _PAUSE = 8, 0.2


class LiveTable:
    """A table of a run's last logged steps and its newest one, under a bar of its progress.

    Args:
        console: where to draw; default: standard output.
    """

    def __init__(self, console: Any = None) -> None:
        from rich.console import Console
        from rich.live import Live

        self.console = console or Console()
        # Drawn by the loop itself, so that no thread of its own takes time from a step.
        self._live = Live(console=self.console, auto_refresh=False, transient=False)
        self._rows: deque[dict[str, str]] = deque(maxlen=_ROWS)
        self._drawn = -1e9
        self._begun = self._ended = False

    def line(self, text: str) -> None:
        """Print a line above the table."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, cells: dict[str, str], done: int, total: int, keep: bool) -> None:
        """A step's figures by the names of their columns; with `keep` they stay when newer ones come."""
        if self._ended:
            return
        if not self._begun:
            self._live.start()
            self._begun = True
        if keep:
            self._rows.append(cells)
        if time.monotonic() - self._drawn >= _PAUSE or done == total:
            newest = [] if keep else [cells]
            self._live.update(self._drawing([*self._rows, *newest], done, total), refresh=True)
            self._drawn = time.monotonic()

    def close(self) -> None:
        """The last state of the table stays; lines printed later stand under it."""
        self._ended = True
        if self._begun:
            self._live.stop()
            self._begun = False

    def _drawing(self, rows: list[dict[str, str]], done: int, total: int) -> Any:
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for name in rows[-1]:
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*row.values(), style=None if row is rows[-1] else "dim")
        return Group(table, ProgressBar(total=total, completed=done, width=min(60, self.console.width)))

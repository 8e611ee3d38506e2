"""What a run says while it runs: one dense line per step, `metrics.jsonl`, `log.txt`, and TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from ..data.spool import free_space_error
from ..errors import UserError
from .live import LiveTable
from .tensorboard import TensorBoardFile
from .trackers import Tracker


@dataclass(frozen=True)
class StepMetrics:
    """Figures of one optimizer step; rates are those of this step alone.

    Attributes:
        seconds: of the whole step; wait_seconds: of these, until its data were there.
        gradient_norm: before clipping; None for a step that was skipped, since its gradients overflowed in float16.
        loss_scale: of this step, None unless the run is in float16; skipped: steps skipped so far.
        type_loss, time_loss: nats per event of the next type and of the gap to it, of which `loss` is made; None
            unless both are learned.
    """

    step: int
    loss: float
    lr: float
    gradient_norm: float | None
    tokens: int
    seconds: float
    wait_seconds: float
    flops: float
    memory: int
    loss_scale: float | None = None
    skipped: int = 0
    type_loss: float | None = None
    time_loss: float | None = None


class RunLog:
    """Writes to the console, `log.txt`, `metrics.jsonl`, `tensorboard/` and a tracker.

    A resumed run goes on in the same files.

    Its methods raise UserError if a file cannot be written (a full disk). A tracker that fails is named and left out.

    Args:
        folder: of the run.
        total: steps of the whole run.
        peak: measured floating-point operations per second of this machine's matrix product.
        echo: prints a line.
        every: a line for each so many steps.
        first_step: the first step to come; what an interrupted run recorded from there on is dropped, since it comes
            again.
        live: a table in which steps are shown instead of as lines.
        tracker: gets all scalars too.
    """

    def __init__(
        self, folder: Path, total: int, peak: float, echo: Callable[[str], None], every: int, first_step: int = 1, *,
        live: LiveTable | None = None, tracker: Tracker | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.total, self.peak, self.every = folder, total, peak, every
        self._echo, self._live, self._tracker = echo, live, tracker
        self._pace: float | None = None
        with self._explained():
            if first_step > 1:
                _drop_records(folder / "metrics.jsonl", first_step)
            self._metrics: IO[str] = (folder / "metrics.jsonl").open("a", encoding="utf-8")
            self._log: IO[str] = (folder / "log.txt").open("a", encoding="utf-8")
            self._board = TensorBoardFile(folder / "tensorboard", first_step if first_step > 1 else None)

    def line(self, text: str) -> None:
        """Print and keep a line."""
        self._echo(text)
        self._keep(text)

    def _keep(self, text: str) -> None:
        with self._explained():
            self._log.write(text + "\n")
            self._log.flush()

    def record(self, kind: str, *, step: int, **values: Any) -> None:
        """Append one record to metrics.jsonl; its numbers, and those of nested dictionaries, are scalars elsewhere."""
        scalars = dict(_numbers(kind, values))
        with self._explained():
            record = {"kind": kind, "time": round(time.time(), 3), "step": step, **values}
            self._metrics.write(json.dumps(record) + "\n")
            self._metrics.flush()
            self._board.scalars(scalars, step)
        if self._tracker is not None:
            try:
                self._tracker.scalars(scalars, step)
            except UserError as error:
                self._tracker = None
                self.line(f"{error}; training goes on without it")

    def step(self, metrics: StepMetrics) -> None:
        """Record a step and, every so many steps, print its line."""
        self.record("step", **asdict(metrics))
        seconds = metrics.seconds
        # A running mean: the estimate of the end should not jump with every step.
        self._pace = seconds if self._pace is None else 0.95 * self._pace + 0.05 * seconds
        logged = metrics.step % self.every == 0 or metrics.step in (1, self.total)
        if not logged and self._live is None:
            return
        cells = _cells(metrics, self.total, self.peak, self._pace)
        if self._live is not None:
            self._live.step(cells, metrics.step, self.total, keep=logged)
        if logged:
            (self.line if self._live is None else self._keep)(_line(cells))

    def flush(self) -> None:
        """Give all that was recorded to the system."""
        with self._explained():
            self._board.flush()

    def close(self) -> None:
        """Close the files. Raises nothing: what could be written has been flushed before."""
        if self._live is not None:
            self._live.close()
        for file in (self._metrics, self._log, self._board):
            with contextlib.suppress(OSError):
                file.close()
        if self._tracker is not None:
            with contextlib.suppress(UserError):
                self._tracker.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """OSError as a line that says how to go on."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.folder}: metrics {free_space_error(error, self.folder)}; once there is room, go on from the "
                f"last checkpoint with --resume {self.folder}"
            ) from None


def _cells(metrics: StepMetrics, total: int, peak: float, pace: float) -> dict[str, str]:
    """A step's figures by their names, as they are shown; `pace`: seconds per step to come."""
    seconds = metrics.seconds
    cells = {
        "step": f"{metrics.step:>{len(str(total))}}/{total}", "loss": f"{metrics.loss:7.4f}", "lr": f"{metrics.lr:.2e}",
        "norm": "  skip" if metrics.gradient_norm is None else f"{metrics.gradient_norm:6.3f}",
        "tok/s": f"{metrics.tokens / seconds:>9,.0f}", "% peak": f"{100 * metrics.flops / seconds / peak:3.0f}",
        "memory": f"{metrics.memory / 2**30:.2f} GiB", "wait": f"{100 * metrics.wait_seconds / seconds:2.0f} %",
    }  # fmt: skip
    if metrics.type_loss is not None:
        cells["loss"] += f" (type {metrics.type_loss:.4f}, time {metrics.time_loss:.4f})"
    if metrics.loss_scale is not None:
        cells["scale"] = f"{metrics.loss_scale:g} ({metrics.skipped} skipped)"
    return {**cells, "ETA": duration((total - metrics.step) * pace)}


def _line(cells: dict[str, str]) -> str:
    """What `_cells` shows, in one line: each figure after its name, or before its unit."""
    units = {"tok/s": " tok/s", "% peak": " % peak", "memory": ""}
    return "  ".join(value + units[name] if name in units else f"{name} {value}" for name, value in cells.items())


def _numbers(path: str, values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """("path/name", value) of every number in nested dictionaries."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(f"{path}/{name}", value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{path}/{name}", value


class NoLog:
    """In place of a RunLog on the ranks that do not write."""

    def line(self, text: str) -> None:
        pass

    def record(self, kind: str, **values: object) -> None:
        pass

    def step(self, metrics: StepMetrics) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def duration(seconds: float) -> str:
    """ "0:42", "12:05" or "3:04:05"."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All records of a run's metrics.jsonl; a last line cut short by a crash is left out."""
    return [record for _, record in _records(folder / "metrics.jsonl")]


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(line, record) of each line that is whole."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            yield line, json.loads(line)


def _drop_records(path: Path, first_step: int) -> None:
    """Leave out what is of `first_step` or later, and a line cut short; at no moment is the file half-written."""
    kept = [line + "\n" for line, record in _records(path) if record.get("step", 0) < first_step]
    replacement = path.with_name(f".{path.name}.partial")
    replacement.write_text("".join(kept), encoding="utf-8")
    replacement.replace(path)

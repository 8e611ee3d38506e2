"""What a run says while it runs: one dense line per step, `metrics.jsonl`, `log.txt`, and TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any


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
    """Writes to the console, `log.txt`, `metrics.jsonl` and `tensorboard/`; a resumed run goes on in the same files.

    Args:
        folder: of the run.
        total: steps of the whole run.
        peak: measured floating-point operations per second of this machine's matrix product.
        echo: prints a line.
        every: a line for each so many steps.
        first_step: the first step to come; what an interrupted run recorded from there on is dropped, since it comes
            again.
    """

    def __init__(
        self, folder: Path, total: int, peak: float, echo: Callable[[str], None], every: int, first_step: int = 1
    ) -> None:
        from tensorboardX import SummaryWriter

        self.total, self.peak, self.every = total, peak, every
        self._echo = echo
        if first_step > 1:
            _drop_records(folder / "metrics.jsonl", first_step)
        self._metrics: IO[str] = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._log: IO[str] = (folder / "log.txt").open("a", encoding="utf-8")
        self._board = SummaryWriter(
            str(folder / "tensorboard"), purge_step=first_step if first_step > 1 else None, flush_secs=10
        )
        self._pace: float | None = None

    def line(self, text: str) -> None:
        """Print and keep a line."""
        self._echo(text)
        self._log.write(text + "\n")
        self._log.flush()

    def record(self, kind: str, **values: object) -> None:
        """Append one record to metrics.jsonl."""
        self._metrics.write(json.dumps({"kind": kind, "time": round(time.time(), 3), **values}) + "\n")
        self._metrics.flush()
        step = values.get("step")
        for name, value in values.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step":
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def step(self, metrics: StepMetrics) -> None:
        """Record a step and, every so many steps, print its line."""
        self.record("step", **asdict(metrics))
        seconds = metrics.seconds
        # A running mean: the estimate of the end should not jump with every step.
        self._pace = seconds if self._pace is None else 0.95 * self._pace + 0.05 * seconds
        if metrics.step % self.every and metrics.step not in (1, self.total):
            return
        width = len(str(self.total))
        norm = "  skip" if metrics.gradient_norm is None else f"{metrics.gradient_norm:6.3f}"
        scale = "" if metrics.loss_scale is None else f"scale {metrics.loss_scale:g} ({metrics.skipped} skipped)  "
        parts = ""
        if metrics.type_loss is not None:
            parts = f" (type {metrics.type_loss:.4f}, time {metrics.time_loss:.4f})"
        self.line(
            f"step {metrics.step:>{width}}/{self.total}  loss {metrics.loss:7.4f}{parts}  lr {metrics.lr:.2e}  "
            f"norm {norm}  {metrics.tokens / seconds:>9,.0f} tok/s  "
            f"{100 * metrics.flops / seconds / self.peak:3.0f} % peak  {metrics.memory / 2**30:.2f} GiB  "
            f"wait {100 * metrics.wait_seconds / seconds:2.0f} %  {scale}"
            f"ETA {duration((self.total - metrics.step) * self._pace)}"
        )

    def close(self) -> None:
        """Close the files."""
        self._metrics.close()
        self._log.close()
        self._board.close()


class NoLog:
    """In place of a RunLog on the ranks that do not write."""

    def line(self, text: str) -> None:
        pass

    def record(self, kind: str, **values: object) -> None:
        pass

    def step(self, metrics: StepMetrics) -> None:
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

"""`ttr-gpu train --profile`: where the time of training steps goes, operation by operation, and a trace to look at."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ttr_kernels.attention import AttentionSaved
from ttr_kernels.common.profiling import Call, Profiler, profiled

from ..backend import Backend
from ..distributed.communicator import Span

# Steps before the profile, which compile and fill caches, and steps in it.
_SKIPPED, _PROFILED = 3, 5


@dataclass(frozen=True)
class OperationTime:
    """What an operation took, per step.

    Attributes:
        flops, bytes: of arithmetic (0 where it is not counted) and of the arrays that it was given and returned.
    """

    name: str
    calls: float
    seconds: float
    flops: float
    bytes: float


class StepProfile:
    """Profiles a few steps of a run, then writes `profile/operations.txt` and `profile/trace.json` into its folder.

    The trace opens in chrome://tracing and ui.perfetto.dev. On a GPU each operation is waited for, so that its time is
    its own: profiled steps are slower there than others.

    Args:
        folder: of the run.
        backend: where it computes.
        peak: measured floating-point operations per second of a matrix product.
        echo: prints a line.
    """

    def __init__(self, folder: Path, backend: Backend, peak: float, echo: Callable[[str], None]) -> None:
        self.folder, self.backend, self.peak, self._echo = folder / "profile", backend, peak, echo
        self._seen = 0
        self._steps: list[tuple[float, float]] = []
        self._calls: list[tuple[Call, float]] = []
        self._spans: list[Span] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a training step."""
        self._seen += 1
        if not _SKIPPED < self._seen <= _SKIPPED + _PROFILED:
            yield
            return
        begin = time.perf_counter()
        with profiled(_flops, self.backend.synchronize if self.backend.name == "gpu" else None) as profiler:
            yield
        self._steps.append((begin, time.perf_counter()))
        self._take(profiler)
        if len(self._steps) == _PROFILED:
            self._write()

    def add_spans(self, spans: list[Span]) -> None:
        """What was communicated in the background of a step; kept if the step is one of those profiled."""
        if _SKIPPED < self._seen <= _SKIPPED + _PROFILED:
            self._spans += spans

    def finish(self) -> None:
        """The run has ended: what was profiled of it is written if that has not happened."""
        if not self._steps:
            self._echo(f"profile     none: the run ended before step {_SKIPPED + 1}")
        elif len(self._steps) < _PROFILED:
            self._write()

    def _take(self, profiler: Profiler) -> None:
        self._calls += zip(profiler.calls, profiler.described, strict=True)

    def operations(self) -> list[OperationTime]:
        """By name, the slowest first; the last is what is in no operation."""
        sums: dict[str, list[float]] = {}
        for call, flops in self._calls:
            entry = sums.setdefault(call.name, [0.0] * 4)
            for place, value in enumerate((1.0, call.own_seconds, flops, float(call.bytes))):
                entry[place] += value / len(self._steps)
        rows = sorted((OperationTime(name, *values) for name, values in sums.items()), key=lambda row: -row.seconds)
        rest = self.step_seconds() - sum(row.seconds for row in rows)
        return [*rows, OperationTime("outside of operations", 0.0, rest, 0.0, 0.0)]

    def step_seconds(self) -> float:
        """Mean time of a profiled step."""
        return float(np.mean([end - begin for begin, end in self._steps]))

    def table(self) -> list[str]:
        """Lines of text: time, arithmetic and memory traffic of each operation beside what the device can do."""
        # Loaded only here: it loads every operation.
        from ttr_kernels.benchmark import CPU, copy_bandwidth, gpu

        copy = copy_bandwidth(gpu(self.backend.xp) if self.backend.name == "gpu" else CPU)
        lines = [
            f"{len(self._steps)} steps of {1e3 * self.step_seconds():,.1f} ms; limits measured: matrix product "
            f"{self.peak / 1e9:,.0f} GFLOP/s, copy {copy / 1e9:,.1f} GB/s (read and written)",
            f"{'operation':<32}{'calls':>7}{'ms/step':>10}{'share':>8}{'GFLOP/s':>10}{'% peak':>8}"
            f"{'GB/s':>8}{'% copy':>8}",
        ]
        for row in self.operations():
            arithmetic = f"{row.flops / row.seconds / 1e9:>10,.0f}{100 * row.flops / row.seconds / self.peak:>7.0f} %"
            traffic = f"{row.bytes / row.seconds / 1e9:>8,.1f}{100 * row.bytes / row.seconds / copy:>7.0f} %"
            lines.append(
                f"{row.name:<32}{row.calls:>7,.0f}{1e3 * row.seconds:>10,.2f}"
                f"{100 * row.seconds / self.step_seconds():>7.1f}%"
                f"{arithmetic if row.flops else ' ' * 18}{traffic if row.bytes else ''}"
            )
        return lines

    def _write(self) -> None:
        self.folder.mkdir(exist_ok=True)
        lines = self.table()
        (self.folder / "operations.txt").write_text("\n".join(lines) + "\n")
        start = self._steps[0][0]
        events = [_event("step", begin - start, end - begin, {}) for begin, end in self._steps]
        events += [
            _event(call.name, call.begin - start, call.seconds, {"shapes": str(call.shapes), "bytes": call.bytes})
            for call, _ in self._calls
        ]
        events += [
            _event(span.name, span.begin - start, span.end - span.begin, {"bytes": span.bytes}, thread=1)
            for span in self._spans
        ]
        (self.folder / "trace.json").write_text(json.dumps({"traceEvents": events}))
        for line in lines:
            self._echo(line)
        self._echo(f"trace       {self.folder / 'trace.json'} (chrome://tracing or ui.perfetto.dev)")


def _flops(call: Call) -> float:
    """Floating-point operations of the matrix products and of attention; 0 for others."""
    given, result = call.arguments, call.result
    if call.name == "matmul":
        return float(2.0 * given[0].size * given[1].shape[1])
    if call.name == "linear_forward":
        return float(2.0 * given[0].size * given[1].shape[0])
    if call.name == "linear_backward":
        return float(4.0 * given[0].size * given[1].x.shape[-1])
    if call.name == "attention_forward":
        return float(4.0 * _pairs(result[1]) * result[1].q.shape[-1])
    if call.name == "attention_backward":
        return float(10.0 * _pairs(given[1]) * given[1].q.shape[-1])
    return 0.0


def _pairs(saved: AttentionSaved) -> float:
    """Visible pairs of a query and a key, over all heads."""
    visibility = saved.visibility
    queries, keys = np.diff(visibility.query_offsets), np.diff(visibility.key_offsets)
    if not visibility.causal:
        return float((queries * keys).sum() * saved.q.shape[-2])
    # Query i of n sees keys up to i + (m − n), and no more than a window of them.
    total = 0.0
    for n, m in zip(queries.tolist(), keys.tolist(), strict=True):
        seen = np.clip(np.arange(n, dtype=np.float64) + (m - n) + 1, 0, m)
        total += float((np.minimum(seen, visibility.window) if visibility.window else seen).sum())
    return float(total * saved.q.shape[-2])


def _event(name: str, begin: float, seconds: float, arguments: dict[str, Any], thread: int = 0) -> dict[str, Any]:
    """A complete event of the Trace Event Format, in microseconds; thread 1 is what runs in the background."""
    return {
        "name": name, "ph": "X", "ts": round(1e6 * begin, 3), "dur": round(1e6 * seconds, 3), "pid": 0, "tid": thread,
        "args": arguments,
    }  # fmt: skip

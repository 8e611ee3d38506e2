"""`ttr-gpu bench`: timings on this machine."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .threads import threads_option, use_threads

if TYPE_CHECKING:
    from ttr_kernels.benchmark import Timing


@click.command()
@click.argument("what", type=click.Choice(["kernels"]), default="kernels")
@click.option("--only", multiple=True, metavar="NAME", help="Only this operation; may be repeated.")
@click.option("--repeats", type=click.IntRange(min=1), default=30, show_default=True, help="Calls; the median counts.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or gpu.")
@threads_option
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="Also write the timings as JSON, and a roofline picture (PNG) beside it.")  # fmt: skip
@click.option("--compare", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="Timings that were written earlier: adds the time over theirs.")  # fmt: skip
def bench(
    what: str, only: tuple[str, ...], repeats: int, device: str, threads: int | None, output: Path | None,
    compare: Path | None,
) -> None:  # fmt: skip
    """Time every kernel, forward and backward, in float32, beside the device's limits.

    The limit of a kernel is a copy of as many bytes as its activations and results have, or its arithmetic at the rate
    of a large matrix product, whichever takes longer; both are measured here.
    """
    from ttr_gpu.backend import choose_backend
    from ttr_gpu.errors import UserError
    from ttr_gpu.roofline import draw_roofline
    from ttr_gpu.train.plan import measure_gemm_peak
    from ttr_kernels.benchmark import CPU, NAMES, gpu, time_kernels
    from ttr_kernels.common.parallel import get_threads

    use_threads(threads)
    unknown = next((name for name in only if name not in NAMES), None)
    if unknown is not None:
        raise UserError(f"--only: got {unknown!r}, expected one of {', '.join(NAMES)}")
    backend = choose_backend(device)
    earlier = _earlier(compare, backend.name, get_threads()) if compare else {}
    place, workers = (gpu(backend.xp), backend.device) if backend.name == "gpu" else (CPU, f"{get_threads()} threads")
    peak = measure_gemm_peak(backend)
    click.echo(f"{'operation':<21} {'case':<27} {'part':<8} {'ms':>8} {'GB/s':>7} {'GFLOP/s':>8} {'of limit':>9}"
               f"{'  over earlier' if compare else ''}")  # fmt: skip
    timings = []
    for timing in time_kernels(only or NAMES, repeats, place):
        timings.append(timing)
        click.echo(_line(timing, peak) + _over(timing, earlier))
    click.echo(
        f"{workers}; limit: a copy of the bytes of activations and results, or matrix products at "
        f"{peak / 1e9:,.0f} GFLOP/s, whichever takes longer", err=True,
    )  # fmt: skip
    if output is not None:
        described = {"python": sys.version.split()[0], "device": backend.name, "device_name": backend.device,
                     "threads": get_threads(), "date": time.strftime("%Y-%m-%d"),
                     "matrix_product_flops_per_second": peak}  # fmt: skip
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({**described, "timings": [t._asdict() for t in timings]}, indent=2) + "\n")
        title = f"float32, {workers}, {described['date']}"
        click.echo(f"written: {output}, {draw_roofline(output.with_suffix('.png'), timings, peak=peak, title=title)}")


def _line(timing: Timing, peak: float) -> str:
    rate = f"{timing.flops / timing.seconds / 1e9:8.1f}" if timing.flops else f"{'':>8}"
    moved, share = timing.bytes / timing.seconds / 1e9, 100 * timing.limit_seconds(peak) / timing.seconds
    name = f"{timing.operation:<21} {timing.case:<27} {timing.part:<8}"
    return f"{name} {1e3 * timing.seconds:>8.3f} {moved:>7.1f} {rate} {share:>7.0f} %"


def _over(timing: Timing, earlier: dict[tuple[str, ...], float]) -> str:
    before = earlier.get((timing.operation, timing.case, timing.part))
    return "" if before is None else f"{timing.seconds / before:>14.2f}"


def _earlier(path: Path, device: str, threads: int) -> dict[tuple[str, ...], float]:
    """Seconds by operation, case and part. UserError if the file is not one of `--output` on this device with as many
    threads."""
    from ttr_gpu.errors import UserError

    if not path.is_file():
        raise UserError(f"--compare {path}: no such file; `ttr-gpu bench --output {path}` writes one")
    try:
        described: dict[str, Any] = json.loads(path.read_text())
        where, used = described.get("device", "cpu"), int(described["threads"])
        seconds: dict[tuple[str, ...], float] = {
            (t["operation"], t["case"], t["part"]): float(t["seconds"]) for t in described["timings"]
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--compare {path}: got something that is not a file of `ttr-gpu bench --output` ({type(error).__name__}: "
            f"{error}); write one anew"
        ) from None
    if where != device:
        raise UserError(f"--compare {path}: got timings of the {where}, expected the {device}; add --device {where}")
    if device == "cpu" and used != threads:
        raise UserError(f"--compare {path}: got timings of {used} threads, expected {threads}; add --threads {used}")
    return seconds

"""`ttr-gpu bench`: timings on this machine."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click

from .threads import threads_option, use_threads


@click.command()
@click.argument("what", type=click.Choice(["kernels"]), default="kernels")
@click.option("--only", multiple=True, metavar="NAME", help="Only this operation; may be repeated.")
@click.option("--repeats", type=click.IntRange(min=1), default=30, show_default=True, help="Calls; the median counts.")
@threads_option
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Also write the timings as JSON.")
def bench(what: str, only: tuple[str, ...], repeats: int, threads: int | None, output: Path | None) -> None:
    """Time every kernel, forward and backward, in float32, beside a copy of as many bytes as it must move."""
    from ttr_gpu.errors import UserError
    from ttr_kernels.benchmark import time_operation
    from ttr_kernels.common.parallel import get_threads
    from ttr_kernels.operations import OPERATIONS

    use_threads(threads)
    names = [operation.name for operation in OPERATIONS]
    unknown = next((name for name in only if name not in names), None)
    if unknown is not None:
        raise UserError(f"--only: got {unknown!r}, expected one of {', '.join(names)}")
    rows = []
    click.echo(f"{'operation':<21} {'case':<28} {'forward':>10} {'backward':>10} {'copies':>13} {'GFLOP/s':>8}")
    for operation in OPERATIONS:
        if only and operation.name not in only:
            continue
        for timing in time_operation(operation, repeats):
            rows.append(timing)
            speed = f"{timing.flops / timing.forward_seconds / 1e9:8.0f}" if timing.flops else f"{'':>8}"
            copies, backward = f"{timing.forward_copies:5.1f} {'':>7}", f"{'':>10}"
            if timing.backward_seconds is not None and timing.backward_copies is not None:
                copies = f"{timing.forward_copies:5.1f} {timing.backward_copies:7.1f}"
                backward = f"{1e3 * timing.backward_seconds:>7.3f} ms"
            click.echo(
                f"{timing.operation:<21} {timing.case:<28} {1e3 * timing.forward_seconds:>7.3f} ms "
                f"{backward} {copies:>13} {speed}"
            )
    click.echo(f"{get_threads()} threads; copies: time over that of copying inputs and outputs once", err=True)
    if output is not None:
        described = {"python": sys.version.split()[0], "threads": get_threads(), "date": time.strftime("%Y-%m-%d")}
        output.write_text(json.dumps({**described, "timings": [timing._asdict() for timing in rows]}, indent=2) + "\n")

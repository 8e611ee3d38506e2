"""From the command to the first step, with and without compiled kernels; and what importing costs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click

from .harness import Spread, compare_option, machine, report, result_file
from .step_shapes import EVENTS

COMMAND = (sys.executable, "-m", "ttr_cli.main")


def first_step(data: Path, runs: Path, cache: Path | None) -> float:
    """Seconds from the start of `train` to its first step's line; `cache`: of compiled kernels, None for the usual."""
    environment = {**os.environ, **({} if cache is None else {"TTR_CACHE_DIR": str(cache)})}
    name = f"run-{time.monotonic_ns()}"
    options = ("--preset", "nano", "--out", str(runs), "--name", name, "--set", "train.steps=2")
    begin = time.perf_counter()
    with subprocess.Popen(
        [*COMMAND, "train", str(data), *options], env=environment, text=True, bufsize=1, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("step"):
                seconds = time.perf_counter() - begin
                process.stdout.read()
                return seconds
    raise click.ClickException("train ended without a step:\n" + "".join(said[-20:]))


def _seconds(*command: str) -> float:
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


@click.command()
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Of what is warm.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="JSON file.")
@compare_option
def startup(repeats: int, output: Path | None, compare: Path | None) -> None:
    """Time imports, `--help`, and `train` up to its first step."""
    python = (sys.executable, "-c")
    with tempfile.TemporaryDirectory() as folder:
        data, runs = Path(folder) / "data.zarr", Path(folder) / "runs"
        subprocess.run([*COMMAND, "preprocess", str(EVENTS), "-o", str(data)], check=True, stdout=subprocess.DEVNULL)
        measured: list[tuple[str, Callable[[], float], int]] = [
            ("python alone", lambda: _seconds(*python, "pass"), repeats),
            ("import ttr_kernels", lambda: _seconds(*python, "import ttr_kernels"), repeats),
            ("import ttr_gpu", lambda: _seconds(*python, "import ttr_gpu"), repeats),
            ("ttr-gpu --help", lambda: _seconds(*COMMAND, "--help"), repeats),
            ("train to step 1, cold", lambda: first_step(data, runs, Path(folder) / "cache"), 1),
            ("train to step 1, warm", lambda: first_step(data, runs, Path(folder) / "cache"), repeats),
        ]
        sides = {}
        print(machine()["cpu"])
        for name, function, count in measured:
            seconds = Spread.of([function() for _ in range(count)])
            sides[name] = {"seconds": seconds._asdict()}
            print(f"{name:<24} {seconds.median:>7.2f} s ({seconds.lower:.2f} – {seconds.upper:.2f})")
    report(output or result_file("startup"), "startup", {"sides": sides}, compare)

"""`ttr-gpu train`: a data set to a trained model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ttr_gpu.train.live import LiveTable
    from ttr_gpu.train.run import RunOptions

from .threads import threads_option, use_threads


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--preset", help="Size of the model: pico, nano, tiny, small, gpt2, gpt2-xl; default: from the data.")
@click.option(
    "--precision", type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of weights, activations and matrix products; short for --set model.precision=...; default: float32.",
)  # fmt: skip
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="TOML file with [model] and [train].")
@click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Such as train.lr=0.001; may be repeated."
)
@click.option(
    "--survival", is_flag=True,
    help="Learn from the last interval of each sequence, too, up to the end of --observation; short for --set "
    "train.survival=true.",
)  # fmt: skip
@click.option("--name", help="Name of the run; default: that of the data, and the time.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Folder of runs.")
@click.option("--resume", metavar="RUN", help="Go on with a run (its folder, a checkpoint, or 'auto': the latest).")
@click.option(
    "--continue", "go_on", is_flag=True,
    help="Go on with the run of --name if it has saved a checkpoint, or begin it: for jobs that are started again.",
)  # fmt: skip
@click.option(
    "--sweep", type=click.Path(path_type=Path), metavar="FILE",
    help="A run for each choice of settings in this TOML file (docs/training.md), or of a Slurm array task.",
)  # fmt: skip
@click.option("--plan", is_flag=True, help="Print the plan, and memory and time of each train.recompute; don't train.")
@click.option(
    "--memory-limit", metavar="SIZE", help="Such as 4GiB: train.recompute becomes the cheapest policy that fits."
)
@click.option(
    "--profile",
    is_flag=True,
    help="Time steps 4 to 8 by operation: a table, and a trace in the run's folder.",
)
@click.option(
    "--watch",
    type=click.IntRange(min=1),
    metavar="N",
    help="Every N steps: size of each layer's activations and gradients.",
)
@click.option("--tracker", type=click.Choice(["wandb", "trackio"]), help="Send the metrics there too.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or gpu.")
@threads_option
@click.option("--log-every", type=click.IntRange(min=1), default=1, show_default=True, help="Steps per printed line.")
def train(
    data: Path, preset: str | None, precision: str | None, config: Path | None, assignments: tuple[str, ...],
    survival: bool, name: str | None, out: Path, resume: str | None, go_on: bool, sweep: Path | None, plan: bool,
    memory_limit: str | None, profile: bool, watch: int | None, tracker: str | None, device: str,
    threads: int | None, log_every: int,
) -> None:  # fmt: skip
    """Train a model on DATA, a data set made by `ttr-gpu preprocess`.

    Prints the plan, a line per step, and at the end the test result beside a simple method's. Ctrl-C saves a checkpoint
    and says how to go on. Every key of --set with its default: `ttr-gpu info --keys`.
    """
    from ttr_gpu.errors import TrainingDiverged
    from ttr_gpu.train.memory_plan import in_bytes
    from ttr_gpu.train.run import RunOptions, show_plan
    from ttr_gpu.train.run import train as run

    if resume is not None:
        _refuse_with_resume("preset", "precision", "survival", "name", "plan", "continue")
    if go_on and name is None:
        raise click.UsageError("--continue: expected the --name of the run that is to be begun or gone on with")
    if precision is not None:
        assignments = (*assignments, f"model.precision={precision}")
    if survival:
        assignments = (*assignments, "train.survival=true")
    use_threads(threads)
    if memory_limit is not None and any(text.strip().startswith("train.recompute") for text in assignments):
        raise click.UsageError("--memory-limit: cannot be combined with --set train.recompute, which it chooses")
    limit = None if memory_limit is None else in_bytes(memory_limit)
    options = RunOptions(
        data, preset, config, assignments, out, name, resume, device, log_every, limit, profile, watch or 0, tracker,
        go_on,
    )  # fmt: skip
    if sweep is not None:
        _sweep(options, sweep, plan)
        return
    if plan and go_on:
        raise click.UsageError("--continue: cannot be combined with --plan, which plans a new run")
    if plan:
        show_plan(options, click.echo)
        return
    try:
        outcome = run(options, *output())
    except TrainingDiverged as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    if outcome.signal_number is not None:
        sys.exit(128 + outcome.signal_number)


def _sweep(options: RunOptions, path: Path, plan: bool) -> None:
    from ttr_gpu.train.sweep import run_sweep

    if options.resume is not None or options.go_on or plan:
        other = "plan" if plan else "resume" if options.resume is not None else "continue"
        raise click.UsageError(
            f"--sweep: cannot be combined with --{other}; the same command again goes on with a sweep"
        )
    stopped = run_sweep(options, path, output)
    if stopped is not None and stopped.signal_number is not None:
        sys.exit(128 + stopped.signal_number)


def output() -> tuple[Callable[[str], None], LiveTable | None]:
    """Where lines go, and the table of steps if this is a terminal."""
    if not sys.stdout.isatty():
        return click.echo, None
    from ttr_gpu.train.live import LiveTable

    live = LiveTable()
    return live.line, live


def _refuse_with_resume(*names: str) -> None:
    """Options that a resumed run has answered already: given, they would silently do nothing."""
    for name in names:
        parameter = "go_on" if name == "continue" else name
        if click.get_current_context().get_parameter_source(parameter) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name}: cannot be combined with --resume, which goes on with a run as it is")

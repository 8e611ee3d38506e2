"""`ttr-gpu plot`: pictures of runs."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("runs", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path),
    help="Folder of the pictures; default: plots/ in the run, or here for several.",
)  # fmt: skip
def plot(runs: tuple[Path, ...], output: Path | None) -> None:
    """Draw RUNS on one picture (loss, gradient norm, tokens per second), and for each how attention decays with age and
    the periods of its time features."""
    from ttr_gpu.errors import UserError
    from ttr_gpu.train.checkpoint import find_checkpoint, open_checkpoint
    from ttr_gpu.train.plot import plot_decay, plot_periods, plot_training

    checkpoints = [open_checkpoint(find_checkpoint(run, best=True)) for run in runs]
    for run in runs:
        if not (run / "metrics.jsonl").is_file():
            raise UserError(f"{run}: has no metrics.jsonl, expected the folder of a run")
    folder = output or (runs[0] / "plots" if len(runs) == 1 else Path("plots"))
    click.echo(f"plot        {plot_training(list(runs), folder / 'training.png')}")
    for run, checkpoint in zip(runs, checkpoints, strict=True):
        for what, draw in (("decay", plot_decay), ("periods", plot_periods)):
            name = f"{what}.png" if len(runs) == 1 else f"{what}-{run.name}.png"
            if draw(checkpoint, folder / name) is not None:
                click.echo(f"plot        {folder / name}")

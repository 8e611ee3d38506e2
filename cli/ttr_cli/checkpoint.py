"""`ttr-gpu checkpoint`: look at checkpoints, average them, export their weights."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def checkpoint() -> None:
    """Look at checkpoints, average them, and export their weights."""


@checkpoint.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--parameters", is_flag=True, help="List every parameter with its shape, mean, deviation and largest.")
def show(run: Path, parameters: bool) -> None:
    """Show the checkpoints of RUN (a run folder), or one of them, and verify their checksums."""
    from ttr_gpu.train.checkpoint import find_checkpoint, open_checkpoint
    from ttr_gpu.train.weights import checkpoint_lines, run_lines

    newest = find_checkpoint(run)
    lines = [] if newest == run else [*run_lines(run), ""]
    for line in lines:
        click.echo(line)
    for line in checkpoint_lines(open_checkpoint(newest), parameters):
        click.echo(line)


@checkpoint.command()
@click.argument("runs", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the new checkpoint.")
def average(runs: tuple[Path, ...], output: Path) -> None:
    """Average the weights of checkpoints of one model; a run folder among RUNS stands for all that it keeps.

    The result has weights alone: it can be evaluated and exported, not resumed.
    """
    from ttr_gpu.train.weights import average as write

    for path in write(list(runs), output):
        click.echo(f"averaged    {path}")
    click.echo(f"written     {output}")


@checkpoint.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The safetensors file to write.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--last", is_flag=True, help="The last checkpoint of the run, not the best on validation.")
@click.option("--no-average", is_flag=True, help="The weights themselves, of a run that averages them (train.ema).")
def export(run: Path, output: Path, dtype: str, last: bool, no_average: bool) -> None:
    """Write the weights of RUN (a run folder or a checkpoint) as one safetensors file.

    Its metadata hold the model's configuration.
    """
    from ttr_gpu.train.checkpoint import find_checkpoint, open_checkpoint
    from ttr_gpu.train.weights import export as write

    chosen = open_checkpoint(find_checkpoint(run, best=not last))
    write(chosen, output, dtype, averaged=not no_average)
    click.echo(f"written     {output} (weights of {chosen.path}, {dtype}, {output.stat().st_size / 2**20:.1f} MiB)")

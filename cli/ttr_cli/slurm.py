"""`ttr-gpu slurm`: batch scripts for a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("kind", type=click.Choice(["preprocess", "train", "sweep"]))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Machines.")
@click.option("--gpus", type=click.IntRange(min=0), default=0, show_default=True, help="GPUs of each machine.")
@click.option("--ranks", type=click.IntRange(min=1), help="Processes on each machine; default: one for each GPU.")
@click.option("--cpus", type=click.IntRange(min=1), default=4, show_default=True, help="Cores of each process.")
@click.option("--memory", metavar="SIZE", help="Of each machine, such as 64G; default: the cluster's.")
@click.option(
    "--time", default="24:00:00", show_default=True, help="Before it is over, a run saves and is queued again."
)
@click.option("--partition", help="Of the cluster.")
@click.option("--account", help="To be charged.")
@click.option("--name", default="ttr-gpu", show_default=True, help="Of the job, and with its number of the run.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write; default: print.")
def slurm(kind: Any, arguments: tuple[str, ...], output: Path | None, **resources: Any) -> None:
    """Write a batch script for `sbatch`. It prints its environment, and goes on from the last checkpoint when it was
    pre-empted or its time was over.

    \b
    ttr-gpu slurm preprocess a.csv b.csv                 a task of an array for each input
    ttr-gpu slurm train --nodes 2 --gpus 8 data.zarr -- --preset gpt2
    ttr-gpu slurm sweep lr.toml data.zarr                a task for each trial of `ttr-gpu train --sweep lr.toml`
    """
    from ttr_gpu.distributed.slurm import Job, script
    from ttr_gpu.errors import UserError

    text = script(Job(kind, arguments, **resources))
    if output is None:
        click.echo(text, nl=False)
        return
    if output.exists():
        raise UserError(f"{output}: exists already; choose another --output")
    output.write_text(text)
    output.chmod(0o755)
    click.echo(f"{output}: look it over, then  sbatch {output}")

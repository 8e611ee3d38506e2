"""`ttr-gpu eval`: a trained model on a split of a data set."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from .threads import threads_option, use_threads


@click.command(name="eval")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--split", default="test", show_default=True, help="train, validation or test.")
@click.option(
    "--stride", type=click.IntRange(min=1), help="Advance windows by so many positions: more context, slower."
)
@click.option("--max-length", type=click.IntRange(min=1), help="Positions of a window; default: as in training.")
@click.option(
    "--survival", is_flag=True,
    help="Count that nothing happened from each last event to the end of observation (preprocess --observation).",
)  # fmt: skip
@click.option("--last", is_flag=True, help="The last checkpoint of the run, not the best on validation.")
@click.option("--no-average", is_flag=True, help="The weights themselves, of a run that averages them (train.ema).")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or gpu.")
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw calibration and accuracy to this PNG."
)
def evaluate(
    run: Path, data: Path, split: str, stride: int | None, max_length: int | None, last: bool, no_average: bool,
    device: str, threads: int | None, as_json: bool, plot: Path | None, survival: bool,
) -> None:  # fmt: skip
    """Evaluate RUN (a run folder or a checkpoint) on DATA, beside the floors that a model must beat."""
    from ttr_gpu.backend import choose_backend
    from ttr_gpu.data.dataset import open_dataset
    from ttr_gpu.errors import UserError
    from ttr_gpu.infer.evaluation import evaluate_in_detail
    from ttr_gpu.infer.evaluation_plot import plot_evaluation
    from ttr_gpu.infer.report import compare, floors
    from ttr_gpu.train.checkpoint import check_same_data, find_checkpoint, open_checkpoint
    from ttr_gpu.train.run import describe

    use_threads(threads)
    backend = choose_backend(device)
    checkpoint = open_checkpoint(find_checkpoint(run, best=not last))
    dataset = open_dataset(data)
    check_same_data(checkpoint, describe(dataset), data)
    part = dataset.split(split)
    train = checkpoint.config.train
    length = max_length or train.max_length
    if stride is not None and stride > length:
        raise UserError(f"--stride: got {stride}, expected at most the length of a window, {length}")
    model = checkpoint.load_model(backend, averaged=not no_average)
    result = evaluate_in_detail(
        model, part, tokens_per_batch=train.tokens_per_batch, max_length=length, stride=stride,
        step=dataset.gap.get("grid"), survival=survival,
    )  # fmt: skip
    beside = floors(dataset, split, checkpoint.config.model)
    if plot is not None:
        plot_evaluation(result, beside, plot)
    if as_json:
        described = {"checkpoint": str(checkpoint.path), "data": str(data), **asdict(result)}
        if result.time_nll is not None:
            described["nll"] = result.nll
        click.echo(json.dumps({**described, "floors": [asdict(floor) for floor in beside]}, indent=2))
        return
    click.echo(f"{checkpoint.path} on {data}")
    for line in compare(result, beside, dataset):
        click.echo(line)

"""`ttr-gpu predict`: the next event, and sampled futures."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import click

from .threads import threads_option, use_threads


@click.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="CHECKPOINT")
@click.argument("history", metavar="HISTORY")
@click.option("--horizon", required=True, metavar="SPAN", help="How far to look: 7d, 12h, 30min, or a number of units.")
@click.option("--samples", type=click.IntRange(min=1), default=100, show_default=True, help="Futures of each history.")
@click.option("--now", metavar="TIME", help="Nothing happened since the last event until then; default: its time.")
@click.option(
    "--quantiles", default="0.05,0.25,0.5,0.75,0.95", show_default=True, metavar="P,...",
    help="Of the next event's time, and of the number of events.",
)  # fmt: skip
@click.option(
    "--max-events", type=click.IntRange(min=1), default=256, show_default=True, help="Of one future, at most."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Same seed, same futures.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="JSONL file; default: printed.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Fan chart of the first history, a PNG.")
@click.option("--sequence-column", metavar="NAME", help="As for preprocess, as the next four.")
@click.option("--time-column", metavar="NAME")
@click.option("--type-column", metavar="NAME")
@click.option("--type-bins", metavar="A,B,...", help="Turn a numeric type into one type per interval.")
@click.option("--assume-utc", is_flag=True, help="Read dates without a zone as UTC.")
@click.option("--data", type=click.Path(path_type=Path), help="The data set, if it is not where it was in training.")
@click.option("--last", is_flag=True, help="The last checkpoint of the run, not the best on validation.")
@threads_option
def predict(
    run: Path, history: str, horizon: str, samples: int, now: str | None, quantiles: str, max_events: int, seed: int,
    output: Path | None, plot: Path | None, sequence_column: str | None, time_column: str | None,
    type_column: str | None, type_bins: str | None, assume_utc: bool, data: Path | None, last: bool,
    threads: int | None,
) -> None:  # fmt: skip
    """Predict from CHECKPOINT (a run folder or a checkpoint) what follows each sequence of HISTORY.

    HISTORY is events as for `ttr-gpu preprocess` (JSONL, JSON, CSV, Parquet; '-' for standard input): a record per
    sequence with times and types, or a row per event. Prints a JSON object a line for each: when the next event comes
    and of which type, how many come until the horizon, and the sampled futures.
    """
    from ttr_gpu.data.options import Columns, PreprocessOptions, parse_bins
    from ttr_gpu.data.timestamps import parse_span
    from ttr_gpu.errors import UserError
    from ttr_gpu.infer.fan_chart import draw_fan_chart
    from ttr_gpu.infer.histories import read_histories
    from ttr_gpu.infer.prediction import Predictor, parse_quantiles
    from ttr_gpu.infer.trained import open_trained
    from ttr_gpu.whole_file import whole_file

    use_threads(threads)
    shares, bins = parse_quantiles(quantiles), parse_bins(type_bins)
    trained = open_trained(run, data, best=not last)
    names, unit = trained.tokenizer, trained.time_unit_seconds
    if not isinstance(names, list) or unit is None:
        raise UserError(f"{trained.checkpoint.path}: was trained on text, expected a model of events")
    span = parse_span(horizon, unit, "--horizon")
    moment = None if now is None else trained.parse_time(now, "--now")
    predictor = Predictor(trained.model, len(names), origin=trained.origin, context=trained.context)
    columns = Columns(sequence=sequence_column, time=time_column, type=type_column)
    options = PreprocessOptions([history], Path(), columns=columns, assume_utc=assume_utc, type_bins=bins)
    histories = read_histories(options, names, unit)
    longest = max(len(each.times) for each in histories)
    if note := trained.beyond_context(
        f"{history}: events", longest, f"only a history's last {trained.context} are read"
    ):
        click.echo(note, err=True)
    with whole_file(output) if output is not None else nullcontext() as file:
        for number, each in enumerate(histories):
            try:
                prediction = predictor.predict(
                    each, horizon=span, samples=samples, seed=seed, now=moment, max_events=max_events, quantiles=shares
                )
            except UserError as error:
                raise UserError(f"{history}: history {each.name}: --{error}") from None
            record = prediction.record(names, shares, trained.iso_date if trained.dated else None)
            line = json.dumps(record, ensure_ascii=False)
            if file is None:
                click.echo(line)
            else:
                file.write(line + "\n")
            if plot is not None and number == 0:
                draw_fan_chart(plot, prediction, names, unit)
    if output is not None:
        # Otherwise the answers themselves are what is printed.
        count = f"{len(histories)} histor{'y' if len(histories) == 1 else 'ies'}"
        click.echo(f"written: {output} ({count})" + (f", {plot}" if plot is not None else ""))

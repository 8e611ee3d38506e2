"""`ttr-gpu preprocess`: raw files to a data set."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Data set to write, e.g. data.zarr."
)
@click.option("--kind", type=click.Choice(["events", "text"]), help="Default: guessed from the file, and printed.")
@click.option("--header/--no-header", default=None, help="Whether a CSV file's first line names its columns.")
@click.option(
    "--sequence-column", metavar="NAME", help="Column or field that tells sequences apart (or a number, from 1)."
)
@click.option("--time-column", metavar="NAME", help="Column or field with the timestamp.")
@click.option("--type-column", metavar="NAME", help="Events: column or field with the type.")
@click.option("--text-column", metavar="NAME", help="Text: column or field with the text.")
@click.option(
    "--time-unit", default="seconds", show_default=True, help="Unit of numeric times, or a number of seconds."
)
@click.option("--assume-utc", is_flag=True, help="Read dates without a zone as UTC; otherwise they are an error.")
@click.option("--type-bins", metavar="A,B,...", help="Events: turn a numeric type into one type per interval.")
@click.option(
    "--observation",
    metavar="START,END",
    help="Events: when the observation of all sequences began and ended (one may be left out), for eval --survival.",
)
@click.option(
    "--score-first", is_flag=True,
    help="Events: predict the first event of a sequence too, from the start of observation.",
)  # fmt: skip
@click.option("--by", type=click.Choice(["line", "paragraph"]), default="line", help="Plain text: what a document is.")
@click.option(
    "--tokenizer", default="bpe", show_default=True, help="Text: bpe (trained here), bytes, or a tokenizer.json."
)
@click.option(
    "--vocab-size", "vocabulary_size", default=4096, show_default=True, help="Text: tokens of the BPE vocabulary."
)
@click.option("--segment", type=int, metavar="N", help="Text: cut long documents into segments of at most N tokens.")
@click.option("--timestamp-prefix", is_flag=True, help="Text: start each segment with its timestamp as readable text.")
@click.option(
    "--timestamp-format", default="[%Y-%m-%dT%H:%MZ] ", show_default=True, help="Of that prefix (strftime, UTC)."
)
@click.option("--one-sequence", is_flag=True, help="Text: join all documents into one sequence, in their order.")
@click.option(
    "--split", default="0.8,0.1,0.1", show_default=True, help="Shares of train, validation and test, by sequence."
)
@click.option("--split-seed", default=0, show_default=True, help="Of the permutation of sequences.")
@click.option(
    "--split-time", metavar="A,B", help="Cut every sequence at two times, or percentages such as 80%,90%. Four, "
    "START,A,B,END: what is before START, or not before END, is left out.",
)  # fmt: skip
@click.option("--split-column", metavar="NAME", help="Column or field that says train, validation or test.")
@click.option("--validation", multiple=True, metavar="FILE", help="Validation input; INPUT is then all training data.")
@click.option("--test", multiple=True, metavar="FILE", help="Test input.")
@click.option("--on-error", type=click.Choice(["fail", "skip"]), default="fail", show_default=True,
              help="skip: set bad input aside in OUTPUT.rejects.jsonl, with the reason.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace an existing data set, once the new one is complete.")
def preprocess(inputs: tuple[str, ...], output: Path, **given: Any) -> None:
    """Turn raw INPUT files into a data set that `ttr-gpu train` reads.

    INPUT is events (CSV, JSONL, JSON, Parquet: a row per event with sequence, time and type, or a record per sequence
    with times and types) or text (JSON array of strings, JSON/JSONL records with text and timestamp, one-column CSV,
    plain text), also gzipped, or '-' for standard input. A row that cannot be used is named as file:line.
    """
    from ttr_gpu.data.options import Columns, PreprocessOptions, parse_bins
    from ttr_gpu.data.preprocess import preprocess as run
    from ttr_gpu.data.splits import SplitOptions

    columns = Columns(**{name: given.pop(f"{name}_column") for name in ("sequence", "time", "type", "text", "split")})
    bins = parse_bins(given.pop("type_bins"))
    validation, test = list(given.pop("validation")), list(given.pop("test"))
    split = SplitOptions(
        given.pop("split"), given.pop("split_seed"), given.pop("split_time"), bool(validation or test or columns.split)
    )
    options = PreprocessOptions(
        list(inputs), output, validation=validation, test=test, columns=columns, type_bins=bins, split=split,
        skip_errors=given.pop("on_error") == "skip", **given,
    )  # fmt: skip
    result = run(options, click.echo)
    attributes = result.attributes
    for name in ("train", "validation", "test"):
        entry = attributes["splits"].get(name, {"sequences": 0, "tokens": 0})
        click.echo(f"{name:<11} {entry['sequences']:>10,} sequences {entry['tokens']:>13,} tokens")
    size = attributes["vocabulary_size"]
    what = f"event type{'s' * (size != 1)}" if attributes["kind"] == "events" else "tokens in the vocabulary"
    click.echo(f"{size:,} {what}")
    if appended := attributes["terminators_appended"]:
        documents = "document had no </s> at its" if appended == 1 else "documents had no </s> at their"
        click.echo(f"{appended:,} {documents} end; it was appended")
    if left_out := attributes["left_out"]:
        what = "event" if attributes["kind"] == "events" else "document"
        verb = "is" if left_out == 1 else "are"
        click.echo(f"{left_out:,} {what}{'s' * (left_out != 1)} outside the times of --split-time {verb} left out")
    if result.rejects_path:
        click.echo(f"{result.rejected:,} rejected, with reasons: {result.rejects_path}")
    click.echo(f"wrote {result.path}; next: ttr-gpu train {shlex.quote(str(result.path))}")

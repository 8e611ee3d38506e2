"""`ttr-gpu inspect`: what is in a data set."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Read every file and compare its checksum; names each that is wrong.")
@click.option("--samples", type=click.IntRange(min=0), default=3, show_default=True, help="Sequences to show.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(data: Path, verify: bool, samples: int, as_json: bool) -> None:
    """Show what is in DATA: counts, time range, gaps, vocabulary, and a few sequences with their times."""
    from ttr_gpu.data.dataset import open_dataset
    from ttr_gpu.data.dataset import verify as bad_files
    from ttr_gpu.data.inspection import inspect_dataset, unit_name

    if verify:
        wrong = bad_files(data)
        for line in wrong:
            click.echo(f"error: {line}", err=True)
        if wrong:
            click.echo(f"error: {len(wrong)} bad files; copy the data set again or preprocess anew", err=True)
            sys.exit(2)
        click.echo(f"{data}: every file has its checksum")
    dataset = open_dataset(data)
    result = inspect_dataset(dataset, samples=samples)
    if as_json:
        click.echo(json.dumps(asdict(result), indent=2))
        return
    summary = result.summary
    unit = unit_name(summary["time_unit_seconds"])
    click.echo(f"{data}: {summary['kind']}, times in {unit}, {' to '.join(summary['time_range'])}")
    for name, entry in summary["splits"].items():
        more = f", {entry['documents']:,} documents, {entry['bytes']:,} bytes" if entry["documents"] else ""
        click.echo(f"  {name:<11} {entry['sequences']:>10,} sequences {entry['tokens']:>13,} tokens{more}")
    if summary["terminators_appended"] or summary["rejected"]:
        click.echo(f"  {summary['terminators_appended']:,} terminators appended, {summary['rejected']:,} rejected")
    total = result.zero_gaps + sum(count for _, _, count in result.gaps)
    click.echo(f"\ngaps between neighbours of a sequence, in {unit} ({total:,}):")
    rows = [("0", result.zero_gaps)] if result.zero_gaps else []
    rows += [(f"{low:.3g} .. {high:.3g}", count) for low, high, count in result.gaps]
    most = max((count for _, count in rows), default=1)
    for label, count in rows:
        click.echo(f"  {label:>20} {count:>12,}  {'█' * round(40 * count / most)}")
    click.echo(f"\nvocabulary of {summary['vocabulary_size']:,}; the most common:")
    for token, share in result.common:
        click.echo(f"  {token!r:>20} {100 * share:>11.2f} %")
    for sample in result.samples:
        click.echo(f"\nsequence {sample.sequence} of {sample.split}, {sample.length:,} tokens:")
        for time, token in sample.positions:
            click.echo(f"  {time:>24}  {token!r}")

"""How much each way of telling a model about time is worth: one encoding changed at a time, on the shipped events."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import click

from .harness import machine, result_file, versions
from .step_shapes import EVENTS

# What every variant begins with: absolute time is one of those that are compared.
COMMON = ("model.time_features=gap",)
# Name -> what differs; {mean_gap} is the data set's.
VARIANTS: dict[str, tuple[str, ...]] = {
    "Time2Vec of the gap, bias log, RoPE by position": (),
    "no time at all": ("model.time_features=none", "model.time_bias=none"),
    "Time2Vec: none": ("model.time_features=none",),
    "Time2Vec: absolute": ("model.time_features=absolute",),
    "Time2Vec: gap, absolute": ("model.time_features=both",),
    "Time2Vec: gap, pace": ("model.time_pace={mean_gap}",),
    "bias none": ("model.time_bias=none",),
    "bias linear": ("model.time_bias=linear",),
    "RoPE by time": ("model.rope=time",),
    "RoPE by time, bias none": ("model.rope=time", "model.time_bias=none"),
    "gap given the next type": ("model.time_given_type=true",),
}
MEASURES = ("nll", "cross_entropy", "time_nll", "accuracy", "ks")


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("time-ablation"), show_default=True,
              help="Folder of the data set, the runs, and what is done already.")  # fmt: skip
@click.option("--seeds", default=3, show_default=True, help="Runs of each variant.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE",
              help="As for `ttr-gpu train`, for every run alike: such as train.steps=400.")  # fmt: skip
@click.option("--only", help="Variants whose name contains this text.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: all cores.")
def time_ablation(
    work: Path, seeds: int, assignments: tuple[str, ...], only: str | None, threads: int | None
) -> None:  # fmt: skip
    """Time2Vec of time and gap, time bias, RoPE by time: test likelihoods over several seeds, as a table.

    All other settings are those that `ttr-gpu train` chooses for events. Whatever is done already in --work is not
    done again: interrupt it, and call it again.
    """
    from ttr_kernels.common.parallel import limit_blas, set_threads

    set_threads(threads or machine()["cores"])
    limit_blas()
    data = _prepare(work)
    record = work / "results.json"
    options = {"assignments": list(assignments)}
    known: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {"options": options, "runs": {}}
    if known["options"] != options:
        raise click.UsageError(f"--work: {work} holds runs of {known['options']}, expected {options}; choose another")
    for seed in range(seeds):
        for name, changes in VARIANTS.items():
            if (only or "") not in name or f"{name}/{seed}" in known["runs"]:
                continue
            print(f"{name}, seed {seed}", flush=True)
            settings = (f"train.seed={seed}", *COMMON, *assignments, *changes)
            known["runs"][f"{name}/{seed}"] = _run(data, work / "run", settings)
            partial = record.with_suffix(".partial")
            partial.write_text(json.dumps(known, indent=1))
            partial.replace(record)
    found = {
        name: [known["runs"][f"{name}/{seed}"] for seed in range(seeds) if f"{name}/{seed}" in known["runs"]]
        for name in VARIANTS
    }
    lines = _table({name: runs for name, runs in found.items() if runs})
    print("\n".join(lines))
    if all(len(runs) == seeds for runs in found.values()):
        path = result_file("time-ablation")
        described = {
            "benchmark": "time-ablation", "date": time.strftime("%Y-%m-%d"), "machine": machine(),
            "versions": versions(), "seeds": seeds,
        }  # fmt: skip
        path.write_text(json.dumps({**described, **options, "variants": found}, indent=1) + "\n")
        draw(path.with_suffix(".png"), found)
        print(f"written: {path}")


def _prepare(work: Path) -> Path:
    from ttr_gpu.data.options import PreprocessOptions
    from ttr_gpu.data.preprocess import preprocess
    from ttr_gpu.data.splits import SplitOptions

    data = work / "data.zarr"
    if not data.exists():
        work.mkdir(parents=True, exist_ok=True)
        preprocess(PreprocessOptions([str(EVENTS)], data, split=SplitOptions("0.6,0.2,0.2")), print)
    return data


def _run(data: Path, folder: Path, assignments: tuple[str, ...]) -> dict[str, float]:
    """Train, and evaluate the best checkpoint on the test split."""
    from ttr_gpu.data.dataset import open_dataset
    from ttr_gpu.infer.evaluation import evaluate_in_detail
    from ttr_gpu.train.checkpoint import find_checkpoint, open_checkpoint
    from ttr_gpu.train.run import RunOptions, train

    shutil.rmtree(folder, ignore_errors=True)
    dataset = open_dataset(data)
    assignments = tuple(each.replace("{mean_gap}", repr(dataset.gap["mean"])) for each in assignments)
    begin = time.process_time()
    outcome = train(
        RunOptions(data, assignments=assignments, out=folder.parent, name=folder.name, log_every=10**9),
        lambda line: None,
    )
    if outcome.signal_number is not None:
        raise SystemExit(128 + outcome.signal_number)
    checkpoint = open_checkpoint(find_checkpoint(folder, best=True))
    settings = checkpoint.config.train
    result = evaluate_in_detail(
        checkpoint.load_model(), dataset.split("test"), tokens_per_batch=settings.tokens_per_batch,
        max_length=settings.max_length,
    )  # fmt: skip
    assert result.gaps is not None
    return {
        "nll": result.nll, "cross_entropy": result.cross_entropy, "time_nll": result.gaps.nll,
        "accuracy": result.accuracy, "ks": result.gaps.ks, "steps": outcome.progress.step,
        "cpu_seconds": round(time.process_time() - begin, 1),
    }  # fmt: skip


def draw(path: Path, found: dict[str, list[dict[str, float]]]) -> None:
    """Nats per event of every run: types, gaps, and both."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.0 + 0.36 * len(found)), layout="constrained")
    panels = (("cross_entropy", "next type"), ("time_nll", "gap to it"), ("nll", "both"))
    for axes, (measure, title) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        for row, runs in enumerate(found.values()):
            values = [run[measure] for run in runs]
            axes.scatter(values, [row] * len(values), s=18, color="#3182bd", zorder=3)
            axes.scatter(statistics.fmean(values), row, s=220, marker="|", color="black", zorder=2)
        axes.set_title(f"{title}, nats per event", fontsize=10)
        axes.set_yticks(range(len(found)), list(found), fontsize=9)
        axes.ticklabel_format(axis="x", useOffset=False)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="y", color="#eeeeee")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.savefig(path, dpi=150)


def _table(found: dict[str, list[dict[str, float]]]) -> list[str]:
    lines = [
        "| encoding | seeds | total, nats per event | next type, nats | gap, nats | accuracy | Kolmogorov-Smirnov |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, runs in found.items():
        cells = []
        for measure in MEASURES:
            values = [run[measure] for run in runs]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.4f}{spread}")
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    return lines

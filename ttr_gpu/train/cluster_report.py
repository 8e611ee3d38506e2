"""`ttr-gpu plan` from its options to its lines and its JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import CPU, Backend, choose_backend
from ..data.dataset import open_dataset
from ..distributed.session import Session
from ..model_size import model_size
from .cluster_plan import (
    Constant,
    Constants,
    PlanRow,
    break_even,
    cpu_constants,
    gpu_constants,
    plan_rows,
    with_given,
)
from .config import RunConfig, resolve_config
from .measured_rates import measured_rates, measured_sums
from .memory_plan import in_units
from .run import RunOptions, new_config

# Without a data set: GPT-2's vocabulary.
_VOCABULARY = 50257


@dataclass(frozen=True)
class PlanOptions:
    """What `ttr-gpu plan` is told; `ranks` are those of a machine without `gpus`, `given` the constants in SI units."""

    data: Path | None = None
    nodes: int = 1
    gpus: int = 0
    ranks: int | None = None
    preset: str | None = None
    config: Path | None = None
    assignments: tuple[str, ...] = ()
    global_tokens: int | None = None
    measure: bool | None = None
    given: dict[str, float | None] | None = None


@dataclass(frozen=True)
class Report:
    """What is printed, and what is written as JSON (see docs/distributed.md)."""

    lines: list[str]
    described: dict[str, Any]


def cluster_plan(options: PlanOptions, run: Session) -> Report:
    """Measure what is to be measured, and predict. All ranks of `run` take part in measuring.

    Raises UserError for options that do not fit each other or the data.
    """
    config = _configuration(options)
    ranks = options.gpus or options.ranks or run.communicator.local_size
    constants = _constants(options, config, run)
    # Memory follows from the kind of device alone.
    backend = Backend("gpu", np, "planned") if options.gpus else CPU
    rows = plan_rows(config, constants, _node_counts(options.nodes), ranks, backend, options.global_tokens)
    enough = break_even(config, constants, constants.network(rows[-1].nodes, ranks))
    described = {
        "model": {"parameters": model_size(config.model).total, **config.model.model_dump()},
        "train": config.train.model_dump(),
        "constants": {name: asdict(getattr(constants, name)) for name in _SHOWN},
        "tokens_that_hide_sums": enough,
        "rows": [row.described() for row in rows],
    }
    return Report(_lines(config, constants, rows, enough, "gpus" if options.gpus else "ranks"), described)


def _configuration(options: PlanOptions) -> RunConfig:
    if options.data is not None:
        told = RunOptions(options.data, options.preset, options.config, options.assignments)
        return new_config(told, open_dataset(options.data))
    data = {"vocabulary_size": _VOCABULARY}
    return resolve_config(data, options.preset or "gpt2", options.config, list(options.assignments))


def _constants(options: PlanOptions, config: RunConfig, run: Session) -> Constants:
    measure = options.measure if options.measure is not None else not options.gpus
    given = options.given or {}
    if options.gpus:
        constants = gpu_constants(config.model.precision)
        if measure:
            constants = replace(constants, **_measured(config, run, choose_backend("gpu")))
        return with_given(constants, given)
    missing = [name for name in ("products", "attention", "memory_bandwidth") if given.get(name) is None]
    rates = _measured(config, run, CPU) if measure and missing else {}
    return with_given(cpu_constants(rates, missing), given)


def _measured(config: RunConfig, run: Session, backend: Backend) -> dict[str, Constant]:
    found = measured_rates(config, backend, run.communicator)
    return found | measured_sums(backend, run.communicator) if run.communicator.size > 1 else found


def _node_counts(nodes: int) -> list[int]:
    """1, 2, 4 … and the number itself."""
    counts = [1 << power for power in range(nodes.bit_length()) if 1 << power < nodes]
    return [*counts, nodes]


# Constants: name, unit, and what of it one is.
_SHOWN = {
    "products": ("TFLOP/s", 1e12), "attention": ("TFLOP/s", 1e12), "memory_bandwidth": ("GB/s", 1e9),
    "local_bandwidth": ("GB/s", 1e9), "local_latency": ("µs", 1e-6), "link_bandwidth": ("GB/s", 1e9),
    "link_latency": ("µs", 1e-6), "overlap": ("", 1.0),
}  # fmt: skip


def _lines(config: RunConfig, constants: Constants, rows: list[PlanRow], enough: float, kind: str) -> list[str]:
    shape, train = config.model, config.train
    lines = [
        f"model       {model_size(shape).total:,} parameters: {shape.num_layers} layers, width {shape.embed_dim}, "
        f"feed-forward {shape.hidden_dim}, vocabulary {shape.vocabulary_size:,}; {shape.precision}",
        f"batch       {train.tokens_per_batch:,} tokens in windows of {train.max_length:,}; recompute "
        f"{train.recompute}",
    ]
    for name, (unit, one) in _SHOWN.items():
        constant = getattr(constants, name)
        label = name.replace("_", " ")
        lines.append(f"{label:<18}{constant.value / one:>9.4g} {unit:<8} {constant.source}")
    lines += [
        "",
        f"{'nodes':>5} {kind:>5} {'tokens':>11} {'step':>10} {'compute':>10} {'sums':>10} {'waited':>10} "
        f"{'update':>10} {'tokens/s':>11} {'efficiency':>10} {'memory':>10}   with ZeRO-1",
    ]
    for row in rows:
        step = row.step
        lines.append(
            f"{row.nodes:>5} {row.ranks:>5} {row.tokens:>11,.0f} {_ms(step.total)} {_ms(step.compute)} "
            f"{_ms(step.sums)} {_ms(step.exposed)} {_ms(step.update)} {row.tokens_per_second:>11,.0f} "
            f"{100 * row.efficiency:>8.1f} % "
            f"{in_units(row.memory.total):>10}   {_ms(row.step_sharded.total)}, {in_units(row.memory_sharded.total)}"
        )
    lines += ["", "step = compute + waited + update; waited: what of the sums the backward does not hide"]
    if rows[-1].ranks > 1:
        lines.append(
            f"sums of {rows[-1].ranks} hide, all but the last piece, behind a backward of {enough:,.0f} tokens on each"
        )
    return lines


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:>7,.1f} ms"

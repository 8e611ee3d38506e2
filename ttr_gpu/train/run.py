"""A run from its options to its summary: folder, configuration, training, test, plot."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..backend import choose_backend
from ..data.batches import Share, TrainingBatches, check_sizes
from ..data.calendar import types_follow_calendar
from ..data.dataset import Dataset, open_dataset
from ..data.pace import steady_pace
from ..distributed.session import Session, session
from ..distributed.weights import broadcast_weights
from ..errors import UserError
from ..infer.evaluation import check_survival
from ..infer.floors import Floor, lowest
from ..infer.report import compare, floors
from ..memory import keep_freed_memory
from ..model import TransformerModel
from ..model_size import ModelOutline
from .checkpoint import Checkpoint, check_same_data, find_checkpoint, list_checkpoints, open_checkpoint, open_newest
from .config import RunConfig, choose_preset, override, resolve_config
from .live import LiveTable
from .memory_plan import Planned, step_memory, table
from .metrics import duration
from .optimizer import check_sharding
from .plan import costs_of_policies, fitted, loaded_program, make_plan
from .plot import plot_run
from .trainer import Outcome, Trainer

# Log-normals in the distribution of a gap, unless model.time_components says otherwise.
_COMPONENTS = 16


@dataclass(frozen=True)
class RunOptions:
    """What `ttr-gpu train` is told.

    Attributes:
        resume: a run or checkpoint to go on from, or "auto", the latest run.
        go_on: with the run of that name where it has saved something, and else with a new one.
    """

    data: Path
    preset: str | None = None
    config: Path | None = None
    assignments: tuple[str, ...] = ()
    out: Path = Path("runs")
    name: str | None = None
    resume: str | None = None
    device: str = "auto"
    log_every: int = 1
    memory_limit: int | None = None
    profile: bool = False
    watch: int = 0
    tracker: str | None = None
    go_on: bool = False

    @property
    def folder(self) -> Path:
        """Of a new run."""
        name = self.name or f"{self.data.name.removesuffix('.zarr')}-{time.strftime('%Y%m%d-%H%M%S')}"
        return self.out / name


def train(options: RunOptions, echo: Callable[[str], None], live: LiveTable | None = None) -> Outcome:
    """Train, test the best checkpoint beside its floor, draw the plot, and say where everything is. Steps are shown in
    the `live` table, if there is one, or as lines.

    Started by mpirun or srun, the processes train one model together; the first of them prints and writes.

    Raises UserError for bad input, TrainingDiverged for a loss that is not finite.
    """
    with session(options.device) as ranks:
        return _train(options, ranks, echo if ranks.leads else lambda _: None, live)


def _train(options: RunOptions, ranks: Session, echo: Callable[[str], None], live: LiveTable | None) -> Outcome:
    keep_freed_memory()
    prepared = ranks.together(lambda: _prepare(options, echo))
    ranks.agree("the run", prepared.described())
    ranks.together(lambda: _check(prepared, ranks))
    new = prepared.checkpoint is None
    # The others do not ask whether the folder is there yet: the first one makes it.
    folder = Path(ranks.told_by_first(lambda: str(_new_folder(options) if new else prepared.folder)))
    try:
        trainer = Trainer(
            prepared.config, prepared.dataset, folder, prepared.data, backend=ranks.backend, echo=echo,
            log_every=options.log_every, resume=prepared.checkpoint, memory_limit=options.memory_limit,
            profile=options.profile, communicator=ranks.communicator, watch=options.watch, live=live,
            tracker=options.tracker,
        )  # fmt: skip
    except BaseException:
        if new and ranks.leads:
            # A run that never began leaves nothing.
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if ranks.leads:
        _write_config(folder, trainer.config, prepared.data)
    if not new:
        echo(f"resuming {folder} after step {trainer.progress.step}")
        for what, (before, now) in trainer.moved.items():
            kept = f" (--threads {before} keeps them)" if what == "threads" else ""
            echo(f"note       {what}: {now}, {before} before; the same to rounding from here on, other bits{kept}")
    outcome = trainer.run()
    if outcome.signal_number is not None:
        echo(f"{outcome.reason}: stopped after step {outcome.progress.step} of {trainer.plan.total_steps}, saved")
        echo(f"to go on: ttr-gpu train {options.data} --resume {folder}")
        return outcome
    _summarise(trainer, prepared.dataset, folder, outcome, echo)
    return outcome


@dataclass(frozen=True)
class _Prepared:
    """What a run is made of, before anything is written."""

    dataset: Dataset
    data: dict[str, Any]
    config: RunConfig
    checkpoint: Checkpoint | None

    @property
    def folder(self) -> Path:
        """Of the run that goes on."""
        assert self.checkpoint is not None
        return self.checkpoint.path.parent.parent

    def described(self) -> dict[str, Any]:
        """What must be the same for all processes that train together."""
        step = None if self.checkpoint is None else self.checkpoint.state["step"]
        data = {name: value for name, value in self.data.items() if name != "path"}
        return {"release": __version__, **self.config.model_dump(), "data": data, "checkpoint": {"step": step}}


def _check(prepared: _Prepared, ranks: Session) -> None:
    """What the trainer would refuse too, while all still hear of it as one."""
    train, communicator = prepared.config.train, ranks.communicator
    check_sizes(prepared.dataset.split("train"), train.tokens_per_batch, train.max_length)
    check_sharding(train)
    Share(communicator.rank, communicator.size, train.accumulate)


def _prepare(options: RunOptions, echo: Callable[[str], None]) -> _Prepared:
    dataset = open_dataset(options.data)
    data = describe(dataset)
    checkpoint = _resumed(options, dataset, echo)
    if checkpoint is None:
        return _Prepared(dataset, data, new_config(options, dataset), None)
    check_same_data(checkpoint, data, options.data)
    if options.go_on:
        config = new_config(options, dataset)
        _check_same_model(checkpoint, config)
    else:
        changed = [text for text in options.assignments if not text.strip().startswith("train.")]
        if changed or options.config:
            raise UserError(f"--resume: cannot change {changed[0] if changed else '--config'}; only train.* may change")
        config = override(checkpoint.config.model_dump(), list(options.assignments))
    _check_resumable(checkpoint.config, config, "--continue" if options.go_on else "--resume")
    return _Prepared(dataset, data, config, checkpoint)


def show_plan(options: RunOptions, echo: Callable[[str], None]) -> None:
    """Print what `train` would print before its first step, and what each policy of recomputation would take."""
    backend = choose_backend(options.device)
    dataset = open_dataset(options.data)
    config, split = new_config(options, dataset), dataset.split("train")
    program = loaded_program(config, backend)
    with TrainingBatches(
        split, fingerprint=dataset.fingerprint, tokens_per_batch=config.train.tokens_per_batch,
        max_length=config.train.max_length, seed=config.train.seed, survival=config.train.survival,
    ) as batches:  # fmt: skip
        data, steps = batches.memory, batches.steps_per_epoch
    model: Planned = ModelOutline(config.model, backend)
    if options.memory_limit is not None:
        config = fitted(config, model, options.memory_limit, program=program, data=data)
    free, memory = backend.free_bytes(), step_memory(model, config, config.recompute, data=data)
    if not free or memory.total <= free:
        model = TransformerModel(config.model, seed=config.train.seed, backend=backend)
    plan = make_plan(config, model, dataset, split, steps, program=program, data=data)
    there = options.memory_limit or (plan.free + program if plan.free else 0)
    for line in [*plan.lines, "", *table(costs_of_policies(plan, model, config), there, config.recompute)]:
        echo(line)


def new_config(options: RunOptions, dataset: Dataset) -> RunConfig:
    """The configuration of a run that begins. Raises UserError for one that does not fit itself or the data."""
    from_data = {
        "vocabulary_size": dataset.vocabulary_size, "time_scale": dataset.gap.get("median_nonzero") or 1.0,
        "time_span": _span(dataset), **_time_model(dataset),
    }  # fmt: skip
    preset, defaults = options.preset, dict[str, Any]()
    if preset is None:
        split, pace, calendar = dataset.split("train"), None, False
        if dataset.kind == "events":
            pace = steady_pace(split)
            calendar = "validation" in dataset.splits and types_follow_calendar(
                split, dataset.split("validation"), dataset.vocabulary_size
            )
        preset, defaults = choose_preset(dataset.kind, split.token_count - split.sequences, pace, calendar)
    config = resolve_config(from_data, preset, options.config, list(options.assignments), defaults)
    if config.model.vocabulary_size < dataset.vocabulary_size:
        raise UserError(
            f"model.vocabulary_size: got {config.model.vocabulary_size}, expected at least "
            f"{dataset.vocabulary_size}, the vocabulary of {options.data}"
        )
    if config.train.survival:
        check_survival(dataset.split("train"), config.model, "train.survival")
        if config.model.time_given_type:
            raise UserError(
                "train.survival: cannot be combined with model.time_given_type: the type of an event that has not come "
                "is not known"
            )
    return config


def _time_model(dataset: Dataset) -> dict[str, Any]:
    """Events are modelled in time, by log-normals around the training gaps."""
    gap = dataset.gap
    if dataset.kind != "events" or not gap.get("least_nonzero"):
        return {}
    return {
        "time_components": _COMPONENTS, "time_log_mean": gap["log_mean"], "time_log_std": gap["log_std"] or 1.0,
        # Half the smallest step that can be seen: of a clock of that step, a gap of zero is somewhere below.
        "time_zero_gap": 0.5 * (gap["grid"] or gap["least_nonzero"]),
    }  # fmt: skip


def describe(dataset: Dataset) -> dict[str, Any]:
    """What a checkpoint records of its data set: enough to refuse another one."""
    names = dataset.vocabulary
    text = json.dumps(names) if names is not None else (dataset.path / "tokenizer.json").read_text()
    return {
        "path": str(dataset.path), "fingerprint": dataset.fingerprint, "kind": dataset.kind,
        "vocabulary_size": dataset.vocabulary_size, "vocabulary_hash": hashlib.sha256(text.encode()).hexdigest(),
        "time_unit_seconds": dataset.time_unit_seconds, "origin": dataset.origin,
    }  # fmt: skip


def _summarise(trainer: Trainer, dataset: Dataset, folder: Path, outcome: Outcome, echo: Callable[[str], None]) -> None:
    progress, leads = outcome.progress, trainer.leads
    tested = None
    if "test" in dataset.splits:
        # Where it may be that only the first process has the folder, only that one reads.
        if leads:
            best = find_checkpoint(folder, best=True)
            if best.name != f"step-{progress.step:08d}" or trainer.averages is not None:
                open_checkpoint(best).restore_weights(trainer.model)
        broadcast_weights(trainer.communicator, trainer.model)
        tested = trainer.evaluate("test")
    if not leads:
        return
    best = find_checkpoint(folder, best=True)
    lines = [
        "",
        f"trained {progress.step:,} steps, {progress.tokens:,} tokens in {duration(progress.seconds)} "
        f"({progress.tokens / max(progress.seconds, 1e-9):,.0f} tokens/s)",
    ]
    if progress.best_loss is not None:
        per = "token" if dataset.kind == "text" else "event"
        lines.append(f"validation  {progress.best_loss:.4f} nats per {per} at step {progress.best_step}, the best")
    beside: list[Floor] = []
    if tested is not None:
        beside = floors(dataset, "test", trainer.config.model)
        lines += compare(tested, beside, dataset)
    picture = plot_run(folder, _floor_of_loss(trainer.config, beside))
    lines += [f"run         {folder}", f"plot        {picture}", f"best        {best}"]
    lines.append(f"again       ttr-gpu eval {folder} {dataset.path}")
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        for line in lines:
            echo(line)
            log.write(line + "\n")


def _floor_of_loss(config: RunConfig, beside: list[Floor]) -> tuple[str, float] | None:
    """Name and value of the best simple methods' loss, as training weighs it."""
    best, gap = lowest(beside, "type"), lowest(beside, "time")
    if best is None:
        return None
    if gap is None:
        return best.name, best.value
    return f"{best.name}, {gap.name} gaps", best.value + config.train.time_weight * gap.value


# What a run cannot change on its way, and why: everything else of train.* takes effect from the next step on.
_ORDER = "the order of the data follows from it"
_FIXED = {
    "seed": _ORDER, "tokens_per_batch": _ORDER, "max_length": _ORDER, "accumulate": _ORDER, "survival": _ORDER,
    "optimizer": "what it remembers is of another kind", "ema": "the average began with the run",
}  # fmt: skip


def _check_resumable(before: RunConfig, after: RunConfig, option: str) -> None:
    for name, why in _FIXED.items():
        old, new = getattr(before.train, name), getattr(after.train, name)
        if old != new:
            raise UserError(f"{option}: cannot change train.{name} from {old} to {new}, since {why}; begin a new run")


def _check_same_model(checkpoint: Checkpoint, config: RunConfig) -> None:
    """UserError if a run was begun with another model than is asked for now."""
    asked, run = config.model.model_dump(), checkpoint.path.parent.parent
    for name, old in checkpoint.config.model.model_dump().items():
        if old != asked[name]:
            raise UserError(
                f"--continue: got model.{name} {asked[name]}, expected {old}, with which {run} was begun; "
                "choose another --name for a new run"
            )


def _resumed(options: RunOptions, dataset: Dataset, echo: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to go on from; None for a new run."""
    if options.go_on:
        if not list_checkpoints(options.folder):
            return None
        checkpoint = open_newest(options.folder, echo)
    elif options.resume is None:
        return None
    elif options.resume == "auto":
        runs = [p for p in options.out.glob("*") if list(p.glob("checkpoints/step-*/DONE"))]
        if not runs:
            raise UserError(f"--resume auto: {options.out} holds no run with a checkpoint")
        checkpoint = open_newest(max(runs, key=lambda p: p.stat().st_mtime), echo)
    else:
        checkpoint = open_checkpoint(find_checkpoint(Path(options.resume)))
    if checkpoint.data["fingerprint"] != dataset.fingerprint:
        check_same_data(checkpoint, describe(dataset), dataset.path)
        raise UserError(
            f"{dataset.path}: its content is not what {checkpoint.path} was trained on; a run can only be resumed on "
            "the same data"
        )
    return checkpoint


def _new_folder(options: RunOptions) -> Path:
    folder = options.folder
    if folder.exists() and options.go_on:
        # Stopped before it had saved anything.
        number = next(number for number in itertools.count() if not _aside(folder, number).exists())
        folder.rename(_aside(folder, number))
    elif folder.exists():
        raise UserError(f"{folder}: exists already; choose another --name, or go on with --resume {folder}")
    make_folder(folder)
    return folder


def _aside(folder: Path, number: int) -> Path:
    return folder.with_name(f"{folder.name}.stopped-{number}")


def make_folder(folder: Path) -> None:
    """A new folder, with those it lies in; UserError if it cannot be made."""
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be created: {error.strerror}") from None


def _write_config(folder: Path, config: RunConfig, described: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps({**config.model_dump(), "data": described}, indent=2) + "\n")


def _span(dataset: Dataset) -> float:
    entry = dataset.attributes["splits"]["train"] if "train" in dataset.splits else {"time_min": 0.0, "time_max": 0.0}
    return float(entry["time_max"] - entry["time_min"]) or 1.0

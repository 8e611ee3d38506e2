"""`ttr-gpu train --sweep sweep.toml`: a run for each choice of settings, one after the other or one per Slurm task.

runs/<name>/  sweep.json (what is tried)  trial-000/ (a run)  trial-000.json (how it ended)  trial-000.lock
"""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import os
import secrets
import shutil
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..data.dataset import open_dataset
from ..distributed.launch import detect
from ..errors import TrainingDiverged, UserError
from ..whole_file import whole_file
from .checkpoint import list_checkpoints, open_newest
from .config import check_key, readable
from .live import LiveTable
from .metrics import duration
from .run import RunOptions, make_folder, new_config, train
from .trainer import Outcome


class _File(BaseModel):
    """A sweep's TOML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["grid", "random"] = "grid"
    trials: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    parameters: dict[str, Any] = Field(min_length=1)


@dataclass(frozen=True)
class Trial:
    """One choice of settings: values by key, and as `--set` takes them."""

    number: int
    values: dict[str, Any]

    @property
    def name(self) -> str:
        """Of its run's folder."""
        return f"trial-{self.number:03d}"

    @property
    def assignments(self) -> tuple[str, ...]:
        """ "key=value" of each."""
        return tuple(f"{key}={_as_text(value)}" for key, value in self.values.items())


def read_trials(path: Path) -> list[Trial]:
    """All trials of a sweep's file. They are a function of the file alone: a killed sweep finds them again.

    A grid tries every combination of lists. A random search draws `trials` times from lists and from ranges
    `{min, max}`, with `log = true` evenly in the logarithm; whole numbers stay whole.

    Raises UserError for anything else.
    """
    try:
        with path.open("rb") as file:
            described = _File.model_validate(tomllib.load(file))
    except FileNotFoundError:
        raise UserError(f"--sweep: {path}: no such file") from None
    except ValidationError as error:
        raise UserError(f"--sweep: {path}: {readable(error)}") from None
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--sweep: {path}: {error}") from None
    choices = dict(_leaves(described.parameters))
    for key, choice in choices.items():
        check_key(key, f"--sweep: {path}")
        _check_choice(choice, described.method, f"--sweep: {path}: {key}")
    if described.method == "grid":
        if described.trials is not None:
            raise UserError(f"--sweep: {path}: trials: only of method 'random'; a grid tries every combination")
        combinations: Iterator[Any] = itertools.product(*choices.values())
        return [Trial(i, dict(zip(choices, values, strict=True))) for i, values in enumerate(combinations)]
    if described.trials is None:
        raise UserError(f"--sweep: {path}: trials: got none, expected how often method 'random' draws")
    return [
        Trial(i, {key: _draw(choice, rng) for key, choice in choices.items()})
        for i in range(described.trials)
        for rng in [np.random.default_rng([described.seed, i])]
    ]


def run_sweep(
    options: RunOptions, path: Path, output: Callable[[], tuple[Callable[[str], None], LiveTable | None]]
) -> Outcome | None:
    """Run what has not ended yet of a sweep: new, or from the newest whole checkpoint of a trial that was broken off.

    With SLURM_ARRAY_TASK_ID in the environment it is the trial of that number alone. Several processes may work on a
    sweep: each takes what no other is running.

    Args:
        options: of every trial; `name` is that of the sweep's folder in `out`, by default that of the file.
        output: where a trial prints its lines, and its table.

    Returns:
        How the trial ended that a signal stopped, and with it the sweep; None if all went to their end.
    """
    trials = read_trials(path)
    if (launch := detect()).size > 1:
        raise UserError(
            f"--sweep: got {launch.size} processes of {launch.launcher}, which would train one model together, "
            "expected one; give the command several times, or use a Slurm array"
        )
    echo, _ = output()
    dataset = open_dataset(options.data)
    folder = options.out / (options.name or path.stem)
    for trial in trials:
        new_config(replace(options, assignments=(*options.assignments, *trial.assignments)), dataset)
    _keep_description(folder, path, options, trials, dataset.fingerprint)
    chosen, single = _of_this_task(trials)
    stopped = None
    for trial in chosen:
        with _locked(folder / f"{trial.name}.lock") as mine:
            if _result(folder, trial) is not None:
                echo(f"{trial.name}: ended before, {', '.join(trial.assignments)}")
                continue
            if not mine:
                echo(f"{trial.name}: is being run by another process")
                continue
            echo(f"{trial.name} of {len(trials)}: {', '.join(trial.assignments)}")
            outcome = _run(options, folder, trial, output)
        if outcome is not None and outcome.signal_number is not None:
            echo("the sweep goes on where it stands when the same command is given again")
            stopped = outcome
            break
    for line in [] if single and stopped else table(folder, trials):
        echo(line)
    return stopped


def table(folder: Path, trials: list[Trial]) -> list[str]:
    """Lines of text: how each trial ended, the best validation loss first."""
    keys = list(trials[0].values)
    rows = []
    for trial in trials:
        result = _result(folder, trial) or {"status": "open"}
        loss = result.get("best_loss")
        shown = [
            trial.name, result["status"], "" if loss is None else f"{loss:.4f}", str(result.get("best_step") or ""),
            duration(result["seconds"]) if "seconds" in result else "",
            *(_shown(trial.values[key]) for key in keys),
        ]  # fmt: skip
        rows.append((math.inf if loss is None else loss, shown))
    rows.sort(key=lambda row: row[0])
    lines = [["trial", "ended", "best loss", "at step", "time", *keys], *(shown for _, shown in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["", *("  ".join(f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True)) for line in lines)]


def _run(
    options: RunOptions, folder: Path, trial: Trial,
    output: Callable[[], tuple[Callable[[str], None], LiveTable | None]],
) -> Outcome | None:  # fmt: skip
    """Run a trial to its end, which is then written down; None if it diverged."""
    echo, live = output()
    run = folder / trial.name
    if list_checkpoints(run):
        begun = replace(options, resume=str(open_newest(run, echo).path), config=None, assignments=())
    else:
        # Broken off before its first checkpoint: nothing of it is worth keeping.
        shutil.rmtree(run, ignore_errors=True)
        assignments = (*options.assignments, *trial.assignments)
        begun = replace(options, out=folder, name=trial.name, assignments=assignments)
    try:
        outcome = train(begun, echo, live)
    except TrainingDiverged as error:
        _write(folder / f"{trial.name}.json", {"status": "diverged", "values": trial.values, "why": str(error)})
        echo(str(error))
        return None
    except UserError as error:
        raise UserError(f"{trial.name}: {error}") from None
    if outcome.signal_number is None:
        progress = outcome.progress
        result = {
            "status": outcome.reason, "values": trial.values, "best_loss": progress.best_loss,
            "best_step": progress.best_step, "step": progress.step, "seconds": progress.seconds,
        }  # fmt: skip
        _write(folder / f"{trial.name}.json", result)
    return outcome


def _of_this_task(trials: list[Trial]) -> tuple[list[Trial], bool]:
    """All trials, or that of this Slurm array task alone, and whether it is so."""
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    if task is None:
        return trials, False
    if not task.isdigit() or int(task) >= len(trials):
        raise UserError(f"SLURM_ARRAY_TASK_ID: got {task}, expected a trial: sbatch --array=0-{len(trials) - 1}")
    return [trials[int(task)]], True


def _keep_description(folder: Path, path: Path, options: RunOptions, trials: list[Trial], fingerprint: str) -> None:
    """Write what is tried into the sweep's folder, or check that it is what was begun there."""
    described = {
        "trials": [trial.values for trial in trials], "data": fingerprint, "preset": options.preset,
        "config": None if options.config is None else options.config.read_text(), "set": list(options.assignments),
    }  # fmt: skip
    there = folder / "sweep.json"
    if not folder.exists():
        _begin(folder, described)
    if not there.exists():
        raise UserError(f"{folder}: exists already and is no sweep; choose another --name")
    begun = json.loads(there.read_text())
    # As JSON has it, so that what cannot be told apart there is not told apart here.
    for name, value in json.loads(json.dumps(described)).items():
        if begun.get(name) != value:
            raise UserError(
                f"--sweep: {path}: its {name} differ from those that {folder} was begun with; choose another "
                "--name for a new sweep"
            )


def _begin(folder: Path, described: dict[str, Any]) -> None:
    """Make a sweep's folder, with its description in it as soon as it is there: tasks of an array begin at the same
    moment, and the first one makes it. What is there already stays."""
    made = folder.with_name(f".{folder.name}.partial-{secrets.token_hex(4)}")
    make_folder(made)
    try:
        _write(made / "sweep.json", described)
        # Onto a folder that holds something it fails.
        with suppress(OSError):
            made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether this process alone has the lock, which the system takes back however the process ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _result(folder: Path, trial: Trial) -> dict[str, Any] | None:
    path = folder / f"{trial.name}.json"
    result: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return result


def _write(path: Path, content: dict[str, Any]) -> None:
    """A JSON file that is whole whenever it is there."""
    try:
        with whole_file(path) as file:
            file.write(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, choice) of nested tables; a table with a `min` is a choice."""
    for name, value in values.items():
        if isinstance(value, dict) and "min" not in value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _check_choice(choice: Any, method: str, where: str) -> None:
    if isinstance(choice, list) and choice:
        return
    if method == "grid":
        raise UserError(f"{where}: got {choice!r}, expected a list of values (ranges are for method 'random')")
    numbers: list[Any] = [choice.get("min"), choice.get("max")] if isinstance(choice, dict) else []
    if not numbers or not set(choice) <= {"min", "max", "log"} or not all(type(n) in (int, float) for n in numbers):
        raise UserError(f"{where}: got {choice!r}, expected a list of values, or {{min = 1, max = 10, log = true}}")
    if not numbers[0] < numbers[1] or (choice.get("log") and numbers[0] <= 0):
        raise UserError(f"{where}: got {choice!r}, expected min < max, and with log both above 0")


def _draw(choice: Any, rng: np.random.Generator) -> Any:
    if isinstance(choice, list):
        return choice[int(rng.integers(len(choice)))]
    low, high = choice["min"], choice["max"]
    whole = isinstance(low, int) and isinstance(high, int)
    if choice.get("log"):
        drawn = math.exp(rng.uniform(math.log(low), math.log(high)))
        return min(max(round(drawn), low), high) if whole else drawn
    return int(rng.integers(low, high + 1)) if whole else float(rng.uniform(low, high))


def _as_text(value: Any) -> str:
    """A value as --set reads it: TOML, or a bare word."""
    return value if isinstance(value, str) else json.dumps(value)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _as_text(value)

"""Checkpoints: a folder of safetensors and JSON that exists only when it is complete. Nothing is ever unpickled.

step-00001000/  model.safetensors  optimizer.safetensors  config.json  state.json  DONE (checksums of the others)
                averages.safetensors, if weights are averaged: named like those of model.safetensors
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttr_kernels.common.arrays import Array

from ..backend import CPU, Backend
from ..data.shards import sha256
from ..data.spool import free_space_error
from ..errors import UserError
from ..model import TransformerModel
from .averages import Averages
from .config import RunConfig
from .optimizer import Optimizer
from .safetensors_file import checksum, read_arrays, write_arrays


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, its checksums verified.

    Attributes:
        config: of the run; `data` says what it was trained on; `state` where it stood.
    """

    path: Path
    config: RunConfig
    data: dict[str, Any]
    state: dict[str, Any]

    def load_model(self, backend: Backend = CPU, averaged: bool = True) -> TransformerModel:
        """The model with this checkpoint's weights: their average, if there is one and `averaged` says so."""
        model = TransformerModel(self.config.model, seed=self.config.train.seed, backend=backend)
        self.restore_weights(model, averaged)
        return model

    def restore_weights(self, model: TransformerModel, averaged: bool = True) -> None:
        """Copy weights (their average, as above) into a model of the same configuration."""
        path = self.path / "averages.safetensors"
        if not averaged or not path.exists():
            path = self.path / "model.safetensors"
        read_arrays(path, {p.name: p.value for p in model.parameters})
        model.values_changed()

    def restore(self, optimizer: Optimizer, averages: Averages | None = None) -> None:
        """Copy everything that training goes on from: weights, moments, averages.

        Raises UserError for a checkpoint of weights alone.
        """
        if not (self.path / "optimizer.safetensors").exists():
            raise UserError(f"{self.path}: holds weights alone, from which a run cannot be resumed")
        self.restore_weights(optimizer.model, averaged=False)
        optimizer.load_state(lambda arrays: read_arrays(self.path / "optimizer.safetensors", arrays))
        if averages is not None:
            read_arrays(self.path / "averages.safetensors", averages.state())


def checkpoint_arrays(optimizer: Optimizer, averages: Averages | None = None) -> dict[str, dict[str, Array]]:
    """All that a checkpoint of a run holds, as views: files (without their suffix), and in each its arrays by name."""
    files = {"model": {p.name: p.value for p in optimizer.model.parameters}, "optimizer": optimizer.whole_state()}
    if averages is not None:
        files["averages"] = averages.state()
    return files


def write_checkpoint(
    final: Path, config: RunConfig, data: dict[str, Any], state: dict[str, Any], files: dict[str, dict[str, Array]],
    abandoned: Callable[[], bool] = lambda: False,
) -> None:  # fmt: skip
    """Write a checkpoint of these files of NumPy arrays: to a temporary name, synced, renamed. What stood there is
    replaced once the new one is whole.

    Raises UserError if it cannot be written (a full disk), and Abandoned if that is asked for; nothing is then left of
    it.
    """
    temporary = final.with_name(f".{final.name}.partial-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        described = {"format": "ttr-gpu-checkpoint", "format_version": 1, **config.model_dump(), "data": data}
        checksums = {}
        for name, content in (("config.json", described), ("state.json", state)):
            (temporary / name).write_text(json.dumps(content, indent=2))
            checksums[name] = checksum(temporary / name)
        for name, arrays in files.items():
            file = f"{name}.safetensors"
            checksums[file] = write_arrays(temporary / file, arrays, abandoned)
        (temporary / "DONE").write_text(json.dumps(checksums, indent=2))
        for path in [*temporary.iterdir(), temporary]:
            _sync(path)
        if final.exists():
            _remove(final)
        temporary.rename(final)
        _sync(final.parent)
    except OSError as error:
        raise UserError(f"{final}: checkpoint not saved, {free_space_error(error, final.parent)}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def find_checkpoint(path: Path, best: bool = False) -> Path:
    """The checkpoint meant by a path: itself, or the last (or best) one of a run folder.

    Raises UserError where there is none.
    """
    if (path / "DONE").is_file():
        return path
    there = list_checkpoints(path)
    if not there:
        what = "holds no checkpoint" if path.exists() else "no such folder"
        if (path / "zarr.json").is_file():
            what = "is a data set, not a run"
        raise UserError(f"{path}: {what}; expected a run folder or its checkpoints/step-XXXXXXXX")
    if best:
        step = json.loads((there[-1] / "state.json").read_text()).get("best_step")
        there = [p for p in there if p.name == f"step-{step or 0:08d}"] or there
    return there[-1]


def open_newest(path: Path, say: Callable[[str], None]) -> Checkpoint:
    """The newest whole checkpoint of a run; a damaged one is named by `say` and skipped.

    Raises UserError if none is whole.
    """
    for candidate in reversed(list_checkpoints(path)):
        try:
            return open_checkpoint(candidate)
        except UserError as error:
            say(f"skipped a damaged checkpoint: {error}")
    raise UserError(f"{path}: holds no checkpoint that is whole")


def list_checkpoints(path: Path) -> list[Path]:
    """All checkpoints of a run (or of its checkpoints folder), in the order of their steps, damaged ones too."""
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    return sorted(p for p in folder.glob("step-*") if (p / "DONE").is_file()) if folder.is_dir() else []


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint and verify every checksum.

    Raises UserError for a file that is missing or damaged, or a format this release does not read.
    """
    try:
        checksums = json.loads((path / "DONE").read_text())
        for name, expected in checksums.items():
            # Checkpoints of before had SHA-256.
            computed = checksum if expected.startswith("crc32c:") else sha256
            if not (path / name).is_file() or computed(path / name) != expected:
                raise UserError(f"{path / name}: is missing or damaged (wrong checksum); use another checkpoint")
        described = json.loads((path / "config.json").read_text())
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read: {error}; use another checkpoint") from None
    if described.get("format") != "ttr-gpu-checkpoint" or described.get("format_version") != 1:
        raise UserError(f"{path}: has format version {described.get('format_version')}, this release reads 1")
    config = RunConfig.model_validate({"model": described["model"], "train": described["train"]})
    return Checkpoint(path, config, described["data"], state)


def prune(folder: Path, step: int, keep_last: int, best_step: int | None) -> None:
    """Remove all but the newest checkpoints up to `step` and the best one. What is of later steps goes too: a run that
    was resumed from an earlier checkpoint goes another way since then, and must not be resumed from the old one."""
    there = list_checkpoints(folder)
    later = [path for path in there if path.name > f"step-{step:08d}"]
    earlier = there[: len(there) - len(later)]
    for path in [*later, *earlier[:-keep_last]]:
        if path in later or best_step is None or path.name != f"step-{best_step:08d}":
            _remove(path)


def clear_leftovers(folder: Path) -> None:
    """Remove what a run left behind that was killed while it wrote or removed a checkpoint."""
    for pattern in (".step-*.partial-*", ".step-*.removed"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def check_same_data(checkpoint: Checkpoint, described: dict[str, object], path: Path) -> None:
    """UserError if a data set is not of the kind and vocabulary that a checkpoint was trained on."""
    for name in ("kind", "vocabulary_size", "vocabulary_hash"):
        got, expected = described[name], checkpoint.data[name]
        if got != expected:
            what = name.replace("_", " ")
            raise UserError(
                f"{path}: got {what} {str(got)[:12]}, expected {str(expected)[:12]} as in {checkpoint.path}; "
                f"use the data set it was trained on ({checkpoint.data['path']})"
            )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a checkpoint; renamed first, so that a folder named step-XXXXXXXX is whole whenever the process dies."""
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)

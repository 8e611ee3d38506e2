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

import numpy as np

from ttr_kernels.common.arrays import Array

from ..backend import CPU, Backend, copy_into, to_host
from ..data.shards import sha256
from ..data.spool import free_space_error
from ..errors import UserError
from ..model import TransformerModel
from .averages import Averages
from .config import RunConfig
from .optimizer import Optimizer


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
        _read_into(path, {p.name: p.value for p in model.parameters})
        model.values_changed()

    def restore(self, optimizer: Optimizer, averages: Averages | None = None) -> None:
        """Copy everything that training goes on from: weights, moments, averages.

        Raises UserError for a checkpoint of weights alone.
        """
        if not (self.path / "optimizer.safetensors").exists():
            raise UserError(f"{self.path}: holds weights alone, from which a run cannot be resumed")
        self.restore_weights(optimizer.model, averaged=False)
        _read_into(self.path / "optimizer.safetensors", optimizer.state())
        if averages is not None:
            _read_into(self.path / "averages.safetensors", averages.state())


def save_checkpoint(
    folder: Path, config: RunConfig, data: dict[str, Any], state: dict[str, Any], optimizer: Optimizer,
    averages: Averages | None = None,
) -> Path:  # fmt: skip
    """Write `folder/step-XXXXXXXX`: to a temporary name, synced, renamed. Returns its path.

    Raises UserError if it cannot be written (a full disk); nothing is then left of it.
    """
    files = {"model": {p.name: p.value for p in optimizer.model.parameters}, "optimizer": optimizer.state()}
    if averages is not None:
        files["averages"] = averages.state()
    final = folder / f"step-{state['step']:08d}"
    write_checkpoint(final, config, data, state, files)
    return final


def write_checkpoint(
    final: Path, config: RunConfig, data: dict[str, Any], state: dict[str, Any], files: dict[str, dict[str, Array]]
) -> None:
    """Write a checkpoint of these files of arrays; what stood there is replaced once the new one is whole.

    Raises UserError if it cannot be written (a full disk); nothing is then left of it.
    """
    from safetensors.numpy import save_file

    temporary = final.with_name(f".{final.name}.partial-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        for name, arrays in files.items():
            # safetensors writes wrong data for arrays that are not C-contiguous.
            contiguous = {key: np.ascontiguousarray(to_host(array)) for key, array in arrays.items()}
            save_file(contiguous, temporary / f"{name}.safetensors")
        described = {"format": "ttr-gpu-checkpoint", "format_version": 1, **config.model_dump(), "data": data}
        (temporary / "config.json").write_text(json.dumps(described, indent=2))
        (temporary / "state.json").write_text(json.dumps(state, indent=2))
        checksums = {path.name: sha256(path) for path in sorted(temporary.iterdir())}
        (temporary / "DONE").write_text(json.dumps(checksums, indent=2))
        for path in [*temporary.iterdir(), temporary]:
            _sync(path)
        if final.exists():
            _remove(final)
        temporary.rename(final)
        _sync(final.parent)
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.split(".")[0] != "safetensors":
            raise
        cause = error if isinstance(error, OSError) else OSError(str(error))
        raise UserError(f"{final}: checkpoint not saved, {free_space_error(cause, final.parent)}") from None
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
            if not (path / name).is_file() or sha256(path / name) != expected:
                raise UserError(f"{path / name}: is missing or damaged (wrong checksum); use another checkpoint")
        described = json.loads((path / "config.json").read_text())
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}; use another checkpoint") from None
    if described.get("format") != "ttr-gpu-checkpoint" or described.get("format_version") != 1:
        raise UserError(f"{path}: has format version {described.get('format_version')}, this release reads 1")
    config = RunConfig.model_validate({"model": described["model"], "train": described["train"]})
    return Checkpoint(path, config, described["data"], state)


def prune(folder: Path, keep_last: int, best_step: int | None) -> None:
    """Remove all but the newest checkpoints and the best one."""
    for path in list_checkpoints(folder)[:-keep_last]:
        if best_step is None or path.name != f"step-{best_step:08d}":
            _remove(path)


def clear_leftovers(folder: Path) -> None:
    """Remove what a run left behind that was killed while it wrote or removed a checkpoint."""
    for pattern in (".step-*.partial-*", ".step-*.removed"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a checkpoint; renamed first, so that a folder named step-XXXXXXXX is whole whenever the process dies."""
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _read_into(path: Path, targets: dict[str, Array]) -> None:
    from safetensors.numpy import load_file

    arrays = load_file(path)
    if set(arrays) != set(targets):
        name = min(set(arrays) ^ set(targets))
        raise UserError(f"{path}: {name!r} is only in {'the file' if name in arrays else 'the model'}; another model?")
    for name, target in targets.items():
        if arrays[name].shape != target.shape:
            raise UserError(f"{path}: {name} has shape {arrays[name].shape}, expected {target.shape}")
        copy_into(target, arrays[name])

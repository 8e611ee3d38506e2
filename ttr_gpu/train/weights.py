"""Checkpoints looked at, averaged, and exported as weights alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ttr_kernels.common.arrays import Array

from ..data.spool import free_space_error
from ..errors import UserError
from .checkpoint import Checkpoint, find_checkpoint, list_checkpoints, open_checkpoint, write_checkpoint

EXPORT_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def read_weights(checkpoint: Checkpoint, averaged: bool = True) -> dict[str, Array]:
    """Arrays by name: those of train.ema, if there are any and `averaged` says so, else the weights themselves."""
    from safetensors.numpy import load_file

    path = checkpoint.path / "averages.safetensors"
    arrays: dict[str, Array] = load_file(path if averaged and path.exists() else checkpoint.path / "model.safetensors")
    return arrays


def run_lines(path: Path) -> list[str]:
    """A line for each checkpoint of a run: its step, size, and whether it is whole."""
    lines = [f"{'checkpoint':<16}{'size':>10}  "]
    for folder in list_checkpoints(path):
        size = sum(file.stat().st_size for file in folder.iterdir())
        try:
            state = open_checkpoint(folder).state
            note = f"whole, {state['tokens']:,} tokens"
            if state.get("best_step") == state["step"]:
                note += f", the best so far ({state['best_loss']:.4f} nats)"
        except UserError as error:
            note = f"damaged: {error}"
        lines.append(f"{folder.name:<16}{size / 2**20:>6.1f} MiB  {note}")
    return lines


def checkpoint_lines(checkpoint: Checkpoint, parameters: bool = False) -> list[str]:
    """What a checkpoint is of, where its run stood, its files, and (with `parameters`) every array."""
    model, state = checkpoint.config.model, checkpoint.state
    weights = read_weights(checkpoint, averaged=False)
    files = ", ".join(
        f"{file.name} {file.stat().st_size / 2**20:.1f} MiB" for file in sorted(checkpoint.path.glob("*.safetensors"))
    )
    lines = [
        f"checkpoint  {checkpoint.path}, every checksum right",
        f"model       {sum(array.size for array in weights.values()):,} parameters: {model.num_layers} layers, width "
        f"{model.embed_dim}, {model.num_heads} heads, feed-forward {model.hidden_dim}, computed in {model.precision}",
        f"data        {checkpoint.data['path']}: {checkpoint.data['kind']}, vocabulary "
        f"{checkpoint.data['vocabulary_size']:,}",
        f"training    step {state['step']:,}, {state['tokens']:,} tokens, {state['seconds']:,.0f} s",
        f"files       {files}",
    ]
    if state.get("best_loss") is not None:
        lines.append(f"validation  {state['best_loss']:.4f} nats at step {state['best_step']}, the best so far")
    if state.get("averaged_from"):
        lines.append(f"average of  {', '.join(state['averaged_from'])}")
    if parameters:
        width = max(map(len, weights))
        lines.append(f"{'parameter':<{width}}  {'shape':<16}{'mean':>12}{'deviation':>12}{'largest':>12}")
        for name, array in weights.items():
            shape = " x ".join(map(str, array.shape))
            lines.append(
                f"{name:<{width}}  {shape:<16}{array.mean():>12.3e}{array.std():>12.3e}{np.abs(array).max():>12.3e}"
            )
    return lines


def average(paths: list[Path], out: Path) -> list[Path]:
    """Write to `out` a checkpoint of weights alone: the mean of checkpoints of one model; a run stands for all of its.

    Returns the checkpoints that were averaged. Raises UserError for fewer than two of them, or of different models.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; choose another --output")
    found = [each for path in paths for each in ([path] if (path / "DONE").is_file() else _checkpoints_of(path))]
    if len(found) < 2:
        raise UserError(f"{paths[0]}: got {len(found)} checkpoint, expected at least two to average")
    checkpoints = [open_checkpoint(path) for path in found]
    first = checkpoints[0]
    sums: dict[str, Any] = {}
    for checkpoint in checkpoints:
        for name, value in checkpoint.config.model:
            if value != getattr(first.config.model, name):
                raise UserError(
                    f"{checkpoint.path}: model.{name} is {value}, expected {getattr(first.config.model, name)} as in "
                    f"{first.path}; only checkpoints of one model can be averaged"
                )
        for name, array in read_weights(checkpoint, averaged=False).items():
            sums[name] = sums.get(name, 0.0) + array.astype(np.float64)
    last = max(checkpoints, key=lambda checkpoint: checkpoint.state["step"])
    means = {name: (total / len(checkpoints)).astype(np.float32) for name, total in sums.items()}
    state = {**last.state, "best_loss": None, "best_step": None, "averaged_from": [str(path) for path in found]}
    write_checkpoint(out.resolve(), last.config, last.data, state, {"model": means})
    return found


def export(checkpoint: Checkpoint, out: Path, dtype: str, averaged: bool = True) -> None:
    """Write one safetensors file of weights alone; its metadata are the model's configuration, data and step, as JSON.

    Raises UserError if `out` exists or cannot be written.
    """
    from safetensors.numpy import save_file

    if out.exists():
        raise UserError(f"{out}: exists already; choose another --output")
    arrays = {name: a.astype(EXPORT_DTYPES[dtype]) for name, a in read_weights(checkpoint, averaged).items()}
    metadata: dict[str, Any] = {
        "format": "ttr-gpu-weights", "model": checkpoint.config.model.model_dump(), "data": checkpoint.data,
        "step": checkpoint.state["step"],
    }  # fmt: skip
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        save_file(arrays, partial, metadata=texts)
        partial.replace(out)
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.split(".")[0] != "safetensors":
            raise
        cause = error if isinstance(error, OSError) else OSError(str(error))
        raise UserError(f"{out}: not written, {free_space_error(cause, out.parent)}") from None
    finally:
        partial.unlink(missing_ok=True)


def _checkpoints_of(path: Path) -> list[Path]:
    find_checkpoint(path)  # which says what is wrong with a path that has none
    return list_checkpoints(path)

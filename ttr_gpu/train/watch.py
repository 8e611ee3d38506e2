"""`--watch`: how large each layer's activations and each parameter's gradient are at a step."""

from __future__ import annotations

from typing import Any

import numpy as np

from ttr_kernels.common.arrays import Array, array_module

from ..data.batches import Batch
from ..model import TransformerModel
from ..nn.dropout import DropoutKey


def layer_statistics(
    model: TransformerModel, batch: Batch, key: DropoutKey, gradient_scale: float
) -> dict[str, dict[str, dict[str, float]]]:
    """{"activations", "gradients", "parameters"} -> layer or parameter -> "mean", "rms", "largest" (absolute).

    Activations are those of a forward of `batch` with the masks of `key`, which is run for this; gradients are what the
    backward has left in the model, divided by `gradient_scale`. Nothing is changed.
    """
    return {
        "activations": {name: _sizes(x) for name, x in model.activations(batch, key)},
        "gradients": {p.name: _sizes(p.gradient, gradient_scale) for p in model.parameters},
        "parameters": {p.name: _sizes(p.value) for p in model.parameters},
    }


def watch_line(seen: dict[str, dict[str, dict[str, float]]]) -> str:
    """The statistics in a line: the stream's way through the layers, and the extremes of the gradients."""
    stream = [f"{sizes['rms']:.2f}" for name, sizes in seen["activations"].items() if not name.endswith(".attention")]
    gradients = sorted((sizes["rms"], name) for name, sizes in seen["gradients"].items())
    (least, small), (most, large) = gradients[0], gradients[-1]
    return (
        f"size (rms) of activations {' '.join(stream)}; of gradients from {least:.1e} ({small}) to {most:.1e} ({large})"
    )


def _sizes(array: Array, scale: float = 1.0) -> dict[str, float]:
    xp: Any = array_module(array)
    values = array.astype(np.float32, copy=False)
    rms = float(xp.sqrt((values * values).mean()))
    return {"mean": float(values.mean()) / scale, "rms": rms / scale, "largest": float(xp.abs(values).max()) / scale}

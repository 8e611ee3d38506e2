"""Parameters, and the flat buffers in which a model keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from ttr_kernels.common.arena import outside
from ttr_kernels.common.arrays import Array, DType, array_module
from ttr_kernels.common.cuda.launch import address


@dataclass(eq=False)
class Parameter:
    """A trained array and its gradient.

    Attributes:
        name: dotted, e.g. "blocks.0.attention.qkv.weight"; the name in checkpoints.
        value: in the master dtype (float32).
        gradient: like value; backwards add to it.
        decay: whether the optimizer's weight decay applies (to matrices, not to gains, biases and decay rates).
        rate: learning rate relative to the run's, 1 but for matrices of a model whose learning is independent of its
            width (`model.mup_base_width`).
    """

    name: str
    value: Array
    decay: bool = True
    rate: float = 1.0
    gradient: Array = field(init=False)
    _cast: Array | None = field(init=False, default=None, repr=False)
    _cast_is_current: bool = field(init=False, default=False, repr=False)

    def __post_init__(self) -> None:
        self.gradient = np.zeros_like(self.value)

    def cast(self, dtype: DType) -> Array:
        """The value in the dtype of the computation: itself if that is the same, else a copy.

        The copy is made once and kept: whoever writes to `value` says so with `changed`.
        """
        if self.value.dtype == dtype:
            return self.value
        if self._cast is None or self._cast.dtype != dtype:
            with outside():
                self._cast = array_module(self.value).empty(self.value.shape, dtype)
            self._cast_is_current = False
        if not self._cast_is_current:
            if isinstance(self.value, np.ndarray) and self.value.dtype == np.float32:
                # Loaded only here: it loads numba, which a GPU can do without.
                from ttr_kernels.common.conversion import copy_converted

                copy_converted(self.value, self._cast)
            else:
                self._cast[...] = self.value
            self._cast_is_current = True
        return self._cast

    def keep_cast_in(self, buffer: Array) -> None:
        """Let `cast` to the buffer's dtype write its copies there."""
        self._cast, self._cast_is_current = buffer, False

    def changed(self) -> None:
        """To be called after `value` was written to: the next `cast` copies it anew."""
        self._cast_is_current = False


@dataclass(frozen=True)
class FlatParameters:
    """All values and all gradients, each in one 1-D array: what the optimizer, clipping and all-reduce work on.

    [0:decay_end) holds the parameters with weight decay, the rest those without; each in the order they were given.
    """

    values: Array
    gradients: Array
    decay_end: int

    def offset(self, parameter: Parameter) -> int:
        """Where a parameter begins in `values` and `gradients`."""
        return (address(parameter.value) - address(self.values)) // self.values.itemsize


def flatten(parameters: Sequence[Parameter], xp: ModuleType = np) -> FlatParameters:
    """Move parameters into flat buffers: afterwards `value` and `gradient` of each are views into them.

    With CuPy as `xp` they move to the current GPU, where their layers then compute.
    """
    ordered = [p for p in parameters if p.decay] + [p for p in parameters if not p.decay]
    dtype: Any = ordered[0].value.dtype
    total = sum(p.value.size for p in ordered)
    values, gradients = xp.empty(total, dtype), xp.zeros(total, dtype)
    start = 0
    for p in ordered:
        end = start + p.value.size
        values[start:end] = xp.asarray(p.value).reshape(-1)
        gradients[start:end] = xp.asarray(p.gradient).reshape(-1)
        p.value = values[start:end].reshape(p.value.shape)
        p.gradient = gradients[start:end].reshape(p.gradient.shape)
        start = end
    return FlatParameters(values, gradients, sum(p.value.size for p in ordered if p.decay))


def cast_together(flat: FlatParameters, parameters: Sequence[Parameter], dtype: DType) -> Array:
    """All values in one array of this dtype, laid out like `flat.values`: that itself, or a copy.

    Parts of the copy are what `cast` of each parameter with weight decay gives from then on, and brings up to date.
    """
    if flat.values.dtype == dtype:
        return flat.values
    together = np.zeros(flat.decay_end, dtype)
    for p in parameters:
        if p.decay:
            start = flat.offset(p)
            p.keep_cast_in(together[start : start + p.value.size].reshape(p.value.shape))
            p.cast(dtype)
    return together


def normal(rng: np.random.Generator, shape: tuple[int, ...], deviation: float, dtype: DType) -> Array:
    """Initial weights: normal with mean 0, drawn in float64 so that every dtype starts from the same numbers."""
    return (deviation * rng.standard_normal(shape)).astype(dtype)

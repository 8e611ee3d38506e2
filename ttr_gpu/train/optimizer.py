"""AdamW over a model's flat parameters, or Muon for the matrices of its blocks and AdamW for the rest.

Of several processes each may keep the moments of a part of the parameters alone, update that part, and get the others'
values from those who have theirs (Rajbhandari et al. 2020, *ZeRO: Memory Optimizations Toward Training Trillion
Parameter Models*, stage 1): to the bit the same updates.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from ttr_kernels.adamw import adamw, adamw_schedule, clip_scale, global_norm
from ttr_kernels.common.arrays import Array, is_array

from ..backend import copy_into, to_host
from ..distributed.communicator import LOCAL, Communicator
from ..errors import UserError
from ..model import TransformerModel
from ..nn.parameter import Parameter
from .config import TrainConfig
from .muon import hidden_matrices, muon


def check_sharding(config: TrainConfig) -> None:
    """UserError if moments are to be divided that cannot be."""
    if config.shard_optimizer and config.optimizer != "adamw":
        raise UserError(
            f"train.shard_optimizer: got true with train.optimizer={config.optimizer}, which needs whole matrices; "
            "expected adamw"
        )


class Optimizer:
    """Moments of every parameter, and the update.

    Attributes:
        first: AdamW's first moments and Muon's momentum, laid out like `model.flat.values`.
        second: AdamW's second moments, of the parameters that are not Muon's.
        own: the part of the parameters whose moments these are; all, unless train.shard_optimizer divides them.
    """

    def __init__(self, model: TransformerModel, config: TrainConfig, communicator: Communicator = LOCAL) -> None:
        self.model, self.config, self._communicator = model, config, communicator
        self.sharded = config.shard_optimizer and communicator.size > 1
        check_sharding(config)
        self.own = self._parts()[communicator.rank] if self.sharded else slice(0, len(model.flat.values))
        xp = model.backend.xp
        self.matrices = hidden_matrices(model) if config.optimizer == "muon" else []
        # They come first in the flat values.
        self.muon_end = sum(p.value.size for p, _ in self.matrices)
        self.first = xp.zeros_like(model.flat.values[self.own])
        self.second = xp.zeros_like(model.flat.values[self.own][self.muon_end :])
        self._groups = _groups(model, self.muon_end)
        self._rates = sorted({group[3] for group in self._groups})

    def gradient_norm(self) -> float:
        """Norm of all gradients; NaN or infinite where any gradient is. Waits for a GPU."""
        return float(self.unread_norm())

    def unread_norm(self) -> Any:
        """`gradient_norm`, which on a GPU is an array there that has not been waited for."""
        return global_norm([self.model.flat.gradients])

    @property
    def takes_unread_norm(self) -> bool:
        """Whether `update` takes a norm that has not been read: on a GPU, where all parameters are AdamW's."""
        return self.model.backend.name == "gpu" and not self.matrices

    def schedules(self, step: int, rate: float) -> Array:
        """Rows of AdamW's numbers at this step, float32, in NumPy: what `update` reads from a copy on a GPU instead of
        `step` and `rate`, so that it can be captured once for all steps."""
        betas = {"beta1": self.config.beta1, "beta2": self.config.beta2}
        return np.stack([adamw_schedule(rate * relative, step, **betas) for relative in self._rates])

    def update(
        self, step: int, rate: float, norm: Any, scale: Any = 1.0, schedules: Array | None = None
    ) -> None:  # fmt: skip
        """One step with gradients times `scale`, clipped; `norm` is theirs before scaling.

        One that has not been read and is not finite changes nothing (but of 16-bit copies, which are made anew). On a
        GPU `scale` may be an array of one number there, and `schedules` a copy of what the method of that name gives.
        """
        flat, config = self.model.flat, self.config
        clip = clip_scale(norm * scale, config.clip_norm)
        if is_array(norm):
            xp = self.model.backend.xp
            clip = xp.where(xp.isfinite(norm), clip, np.nan)
        scale = scale * clip
        for p, parts in self.matrices:
            momentum = self._part(self.first, p)
            for part in parts:
                # An orthogonal update grows with the root of the width, Adam's with the width itself.
                relative = p.rate**0.5
                muon(
                    p.value[part], p.gradient[part], momentum[part], learning_rate=rate * relative,
                    beta=config.momentum, weight_decay=config.weight_decay / relative, gradient_scale=scale,
                )  # fmt: skip
        own = self.own
        for start, end, decay, relative in self._groups:
            part = slice(max(start, own.start), min(end, own.stop))
            if part.start >= part.stop:
                continue
            first = slice(part.start - own.start, part.stop - own.start)
            second = slice(first.start - self.muon_end, first.stop - self.muon_end)
            # Divided by the rate, so that a step shrinks weights by the same share whatever the width.
            adamw(
                flat.values[part], flat.gradients[part], self.first[first], self.second[second],
                learning_rate=rate * relative, step=step, beta1=config.beta1, beta2=config.beta2, eps=config.eps,
                weight_decay=config.weight_decay / relative if decay else 0.0, gradient_scale=scale,
                schedule=None if schedules is None else schedules[self._rates.index(relative)],
            )  # fmt: skip
        if self.sharded:
            for rank, part in enumerate(self._parts()):
                self._communicator.broadcast(flat.values[part], rank)
        self.model.values_changed()

    def state(self) -> dict[str, Array]:
        """What it remembers, by parameter, as views: "<parameter>/first" and "/second", or of Muon "/momentum"."""
        arrays = {}
        for p in self.model.parameters:
            if self.model.flat.offset(p) < self.muon_end:
                arrays[f"{p.name}/momentum"] = self._part(self.first, p)
            else:
                arrays[f"{p.name}/first"] = self._part(self.first, p)
                arrays[f"{p.name}/second"] = self._part(self.second, p, self.muon_end)
        return arrays

    def whole_state(self) -> dict[str, Array]:
        """`state` of all parameters, gathered on rank 0 if each rank has a part (others give theirs, and get nothing):
        what a checkpoint holds, however many processes wrote it."""
        if not self.sharded:
            return self.state()
        whole = [np.empty(len(self.model.flat.values) if self._communicator.rank == 0 else 0, np.float32) for _ in "12"]
        for rank, part in enumerate(self._parts()):
            for moments, target in zip((self.first, self.second), whole, strict=True):
                piece = moments if rank == self._communicator.rank else self.model.backend.xp.empty(
                    part.stop - part.start, moments.dtype
                )  # fmt: skip
                self._communicator.broadcast(piece, rank)
                if len(target):
                    target[part] = to_host(piece)
        return self._named(*whole) if len(whole[0]) else {}

    def load_state(self, read: Callable[[dict[str, Array]], None]) -> None:
        """Have `read` fill arrays like those of `whole_state`, and keep what of them is this rank's."""
        if not self.sharded:
            read(self.state())
            return
        whole = [np.empty(len(self.model.flat.values), np.float32) for _ in "12"]
        read(self._named(*whole))
        copy_into(self.first, whole[0][self.own])
        copy_into(self.second, whole[1][self.own])

    def _named(self, first: Array, second: Array) -> dict[str, Array]:
        """Moments of all parameters by the names of `state`."""
        arrays = {}
        for p in self.model.parameters:
            arrays[f"{p.name}/first"] = self._part(first, p)
            arrays[f"{p.name}/second"] = self._part(second, p)
        return arrays

    def _parts(self) -> list[slice]:
        """Of the flat parameters, what each rank keeps the moments of."""
        count, ranks = len(self.model.flat.values), self._communicator.size
        edges = [count * rank // ranks for rank in range(ranks + 1)]
        return [slice(low, high) for low, high in pairwise(edges)]

    def _part(self, moments: Array, p: Parameter, skipped: int = 0) -> Array:
        start = self.model.flat.offset(p) - skipped
        part: Array = moments[start : start + p.value.size].reshape(p.value.shape)
        return part


def _groups(model: TransformerModel, begin: int) -> list[tuple[int, int, bool, float]]:
    """(begin, end, whether they decay, relative rate) of neighbours in the flat values that are updated alike."""
    groups: list[tuple[int, int, bool, float]] = []
    for p in sorted(model.parameters, key=model.flat.offset):
        start = model.flat.offset(p)
        end, kind = start + p.value.size, (p.decay, p.rate)
        if start < begin:
            continue
        if groups and groups[-1][2:] == kind:
            groups[-1] = (groups[-1][0], end, *kind)
        else:
            groups.append((start, end, *kind))
    return groups

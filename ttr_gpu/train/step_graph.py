"""Training steps as CUDA graphs: a step's kernels are captured once for each shape of a batch, and then replayed.

What changes from step to step is read from the device's memory, at fixed places: the batch and what follows from where
its sequences begin, the number from which dropout's masks follow, learning rate and bias corrections, the loss's scale
and weight. Batches are filled up with rows that have no target, so that their shapes are few. All else that a step
works in comes from the model's arena, so that nothing is allocated while a step is captured, and a replay finds its
memory as it was: whatever lives between steps lies outside.

A shape that is new is computed as usual, which compiles its kernels and makes what is kept; it is captured when it
comes the second time. Either way the results are the same bits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ttr_kernels.common.arrays import Array
from ttr_kernels.common.packing import PackedInputs

from ..backend import PackedTokens, PlacedTokens
from ..data.batches import Batch
from ..model import TransformerModel
from ..nn.dropout import DropoutKey
from ..nn.recompute import Recompute
from .config import RunConfig
from .optimizer import Optimizer
from .uploads import Copies

# Shapes of which a graph is kept; numbers of rows that a batch may be filled up to; rows are a multiple of this.
_MOST, _SIZES, _ROWS = 16, 8, 64
# What a row without a target holds.
_FILL = {"tokens": 0, "times": 0, "targets": -1, "target_times": 0}


def why_not(config: RunConfig, backend_name: str, processes: int, profile: bool) -> str | None:
    """Why the steps of a run cannot be captured, in words; None if they can, "" if nobody asked for it."""
    train = config.train
    if backend_name != "gpu" or train.cuda_graph == "off":
        return ""
    if processes > 1:
        return "several processes sum their gradients in the middle of a step"
    if train.optimizer != "adamw":
        return f"train.optimizer={train.optimizer} reads the gradient's norm on the host"
    if config.model.attention == "performer":
        return "linear attention plans its launches on the host"
    if train.survival:
        return "with train.survival, how many positions are censored differs from batch to batch"
    if profile:
        return "--profile times kernels one by one"
    return None


@dataclass
class _Shape:
    """Steps of batches that are filled up to these rows, of at most so many sequences."""

    rows: int
    placed: list[PlacedTokens]
    inputs: list[PackedInputs]
    has_run: bool = False
    graph: Any = None
    capacity: int = 0  # of the arena's block in which it was captured


class StepGraphs:
    """The steps of a run on a GPU, each as one graph where that is possible.

    Args:
        model, optimizer: what is trained.
        config: of the run; `why_not` found nothing against it.
        recompute: what the backward computes again.
        joint: whether losses of types and of gaps are wanted, too.
        dynamic: whether the loss's scale may change.
        say: prints a line.
        capture: False launches kernel by kernel.

    Attributes:
        replayed, plain: steps that were replayed, and computed kernel by kernel.
    """

    def __init__(
        self, model: TransformerModel, optimizer: Optimizer, config: RunConfig, recompute: Recompute, *, joint: bool,
        dynamic: bool, say: Callable[[str], None], capture: bool = True,
    ) -> None:  # fmt: skip
        self._model, self._optimizer, self._train, self._recompute = model, optimizer, config.train, recompute
        self._joint, self._dynamic, self._say = joint, dynamic, say
        self.replayed = self.plain = 0
        self._captures = capture
        self._said: set[str] = set()
        self._shapes: OrderedDict[tuple[int, ...], _Shape] = OrderedDict()
        xp, batches, capacity = model.backend.xp, config.train.accumulate, config.train.tokens_per_batch
        self._xp, self._copy, self._stream = xp, Copies(xp), xp.cuda.Stream(non_blocking=True)
        self._capacity = capacity
        self._rows = -(-max(capacity // _SIZES, 1) // _ROWS) * _ROWS
        kinds = {"tokens": np.int32, "times": np.float64, "targets": np.int32, "target_times": np.float64}
        self._batches = [{name: xp.empty(capacity, kind) for name, kind in kinds.items()} for _ in range(batches)]
        # A batch's number in dropout, its weight times the loss's scale; the scale, and one over it.
        self._numbers, self._weights = xp.zeros(batches, np.uint64), xp.zeros(batches, np.float32)
        self._scale, self._unscale = xp.zeros((), np.float32), xp.zeros((), np.float64)
        self._schedules = xp.zeros(optimizer.schedules(1, 0.0).shape, np.float32)
        self._values = xp.zeros(batches * (3 if joint else 1) + 1, np.float64)

    def takes(self, counted: Sequence[tuple[Batch, int]]) -> bool:
        """Whether a step of these batches is one of those that are captured."""
        return len(counted) == self._train.accumulate

    def step(self, counted: Sequence[tuple[Batch, int]], count: int, scale: float, update: int, rate: float) -> Array:
        """A whole step over batches with so many targets each, of `count` in all, as update number `update` at a rate.

        Returns what `Taken.values` holds. Weights change unless the gradients' norm is not finite.
        """
        shape = self._shape_of([batch for batch, _ in counted])
        self._write(shape, counted, count, scale, update, rate)
        arena = self._model.arena
        with arena.step():
            if shape.graph is not None and shape.capacity != arena.capacity:
                shape.graph = None
            # A replay would write over what still lives.
            is_free = arena.collect() == 0
            if not is_free:
                self._say_once(f"{arena.live} bytes of an earlier step are still in use")
            if shape.graph is None and shape.has_run and self._captures and is_free:
                self._capture(shape)
            if shape.graph is not None and is_free:
                shape.graph.launch()
                self.replayed += 1
            else:
                self._work(shape)
                self.plain += 1
        shape.has_run = True
        # Python does not see what a replay writes.
        self._model.values_changed()
        values: Array = self._values.copy()
        return values

    def _shape_of(self, batches: Sequence[Batch]) -> _Shape:
        longest = max(len(batch.tokens) for batch in batches)
        rows = min(-(-longest // self._rows) * self._rows, self._capacity)
        # One more for the rows that are added.
        sequences = 1 << max(len(batch.cu_seqlens) for batch in batches).bit_length()
        shape = self._shapes.get((rows, sequences))
        if shape is None:
            placed = [
                PlacedTokens(cu_seqlens=np.zeros(1, np.int32), **{name: a[:rows] for name, a in arrays.items()})
                for arrays in self._batches
            ]
            inputs = [PackedInputs(self._xp, sequences, self._copy) for _ in batches]
            shape = self._shapes[rows, sequences] = _Shape(rows, placed, inputs)
        self._shapes.move_to_end((rows, sequences))
        while len(self._shapes) > _MOST:
            self._shapes.popitem(last=False)
        return shape

    def _write(
        self, shape: _Shape, counted: Sequence[tuple[Batch, int]], count: int, scale: float, update: int, rate: float
    ) -> None:
        """Give the device what this step is about."""
        numbers = [DropoutKey(self._train.seed, batch.step + 1).at(0)["offset"] for batch, _ in counted]
        pairs: list[tuple[Array, Any]] = [
            (self._numbers, np.array(numbers, np.uint64)),
            (self._weights, np.array([scale * targets / count for _, targets in counted], np.float32)),
            (self._scale, np.array(scale, np.float32)),
            (self._unscale, np.array(1.0 / scale)),
            (self._schedules, self._optimizer.schedules(update, rate)),
        ]
        for index, (batch, _) in enumerate(counted):
            filled = filled_up(batch, shape.rows)
            placed = shape.placed[index] = shape.placed[index]._replace(cu_seqlens=filled.cu_seqlens)
            pairs += [(getattr(placed, name), getattr(filled, name)) for name in _FILL]
            shape.inputs[index].write(filled.cu_seqlens)
        self._copy(pairs)

    def _capture(self, shape: _Shape) -> None:
        arena, error = self._model.arena, None
        with self._stream:
            self._stream.begin_capture()
            try:
                self._work(shape)
            except Exception as raised:
                error = raised
            try:
                graph = self._stream.end_capture()
            except Exception as raised:
                error = error or raised
        if error is not None:
            self._captures = False
            what = (str(error).splitlines() or [type(error).__name__])[0]
            self._say_once(f"capturing a step failed ({what})")
            return
        shape.graph, shape.capacity = graph, arena.capacity

    def _say_once(self, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            self._say(f"cuda graph off: {why}; kernels are launched one by one")

    def _work(self, shape: _Shape) -> None:
        """The step, on what has been written."""
        model, train, optimizer = self._model, self._train, self._optimizer
        with model.arena.everything():
            found: list[Any] = []
            for index, (placed, inputs) in enumerate(zip(shape.placed, shape.inputs, strict=True)):
                key = DropoutKey(train.seed, 0, offset_at=self._numbers[index : index + 1])
                with inputs.used(placed.cu_seqlens):
                    loss, saved = model.loss_forward(
                        placed, key, label_smoothing=train.label_smoothing, z_loss=train.z_loss,
                        time_weight=train.time_weight, gradient_scale=self._scale if self._dynamic else 1.0,
                        recompute=self._recompute,
                    )  # fmt: skip
                    # One batch at a scale of 1 weighs 1.
                    is_known = len(shape.placed) == 1 and not self._dynamic
                    model.loss_backward(1.0 if is_known else self._weights[index], saved, accumulate=index > 0)
                found += [loss, saved.type_loss, saved.time_loss] if self._joint else [loss]
                del saved
            norm = optimizer.unread_norm()
            # One by one: CuPy would put arrays together from a list of addresses on the host.
            for index, number in enumerate([*found, norm]):
                self._values[index : index + 1] = number
            optimizer.update(1, 0.0, norm, self._unscale if self._dynamic else 1.0, self._schedules)


def filled_up(batch: PackedTokens, rows: int) -> PlacedTokens:
    """The batch with as many rows: those that are added are a sequence of their own, without targets."""
    added = rows - len(batch.tokens)
    if not added:
        return PlacedTokens(batch.tokens, batch.times, batch.cu_seqlens, batch.targets, batch.target_times)
    arrays = {
        name: np.concatenate([getattr(batch, name), np.full(added, value, getattr(batch, name).dtype)])
        for name, value in _FILL.items()
    }
    cu_seqlens = np.append(batch.cu_seqlens, np.int32(rows))
    return PlacedTokens(cu_seqlens=cu_seqlens, **arrays)

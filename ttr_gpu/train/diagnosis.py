"""What is said of a step of which its losses and gradients do not tell enough: layers, sequences, what to try."""

from __future__ import annotations

import math
from typing import NoReturn

from ..data.batches import Batch
from ..distributed.communicator import Communicator, exchange
from ..distributed.session import OtherRankFailed
from ..errors import TrainingDiverged
from ..model import TransformerModel
from ..nn.dropout import DropoutKey
from .checkpoint_writer import CheckpointWriter
from .config import RunConfig
from .metrics import NoLog, RunLog
from .spikes import Spike, worst_sequences
from .watch import layer_statistics, watch_line


class Diagnosis:
    """Looks into steps of a run; rank 0's log has what it finds.

    Args:
        config: of the run.
        model: with the weights of the step that is looked into.
        log: of this rank.
        checkpoints: of the run, finished when training has diverged.
        communicator: the ranks that train together.
    """

    def __init__(
        self, config: RunConfig, model: TransformerModel, log: RunLog | NoLog, checkpoints: CheckpointWriter,
        communicator: Communicator,
    ) -> None:  # fmt: skip
        self.config, self.model, self.log = config, model, log
        self.checkpoints, self.communicator = checkpoints, communicator

    def watch(self, step: int, batch: Batch, scale: float) -> None:
        """Record the statistics of every layer's activations and gradients, on one rank."""
        seen = layer_statistics(self.model, batch, self._dropout(batch), scale)
        self.log.record("watch", step=step, **seen)
        self.log.line(f"---- step {step}: {watch_line(seen)}")

    def spike(self, step: int, spike: Spike, batches: list[Batch]) -> None:
        """Name the sequences of a step that stood out, those of the highest loss first."""
        there = [batch for batch in batches if len(batch.tokens)]
        own = worst_sequences(self.model, there, self.config.train.time_weight)
        found = exchange(self.communicator, list(zip(*own, strict=True)))
        pairs = sorted((pair for pairs in found for pair in pairs), key=lambda pair: -pair[1])
        sequences, losses = [sequence for sequence, _ in pairs], [loss for _, loss in pairs]
        self.log.record(
            "spike", step=step, what=spike.what, value=spike.value, median=spike.median, sequences=sequences,
            losses=losses,
        )  # fmt: skip
        named = ", ".join(f"{sequence} ({loss:.2f})" for sequence, loss in zip(sequences[:5], losses, strict=False))
        self.log.line(
            f"---- step {step}: {spike.what} {spike.value:.4g} stands out, the median before it is {spike.median:.4g}; "
            f"of the {len(sequences)} training sequences in it, those with the highest loss: {named}"
        )

    def loss_diverged(self, step: int, losses: list[tuple[float, Batch]]) -> None:
        """Of a step with a loss that is not finite, on any rank, the first rank with such a batch raises
        TrainingDiverged, the others OtherRankFailed."""
        bad = [(loss, batch) for loss, batch in losses if not math.isfinite(loss)]
        ranks = [rank for rank, found in enumerate(exchange(self.communicator, bool(bad))) if found]
        if ranks[:1] == [self.communicator.rank]:
            loss, batch = bad[0]
            self._diverged(step, f"the loss is {loss}", batch, self._dropout(batch))
        if ranks:
            raise OtherRankFailed

    def gradient_diverged(self, step: int, norm: float, batch: Batch) -> NoReturn:
        """Raise TrainingDiverged for a norm that is not finite."""
        self._diverged(step, f"the gradient's norm is {norm}", batch, None)

    def _diverged(self, step: int, what: str, batch: Batch, key: DropoutKey | None) -> NoReturn:
        where = self.model.find_nonfinite(batch, key) or "the backward (every layer's forward is finite)"
        self.checkpoints.close()
        saved = self.checkpoints.saved_step
        kept = f"the last good checkpoint is step {saved}" if saved else "no checkpoint was saved before it"
        message = (
            f"step {step}: {what}; it first appears in {where}; {kept}. Try a lower --set train.lr (it is "
            f"{self.config.lr:g}), a longer train.warmup_steps, a smaller train.clip_norm, or check the data with "
            "`ttr-gpu inspect`"
        )
        self.log.line(message)
        raise TrainingDiverged(message)

    def _dropout(self, batch: Batch) -> DropoutKey:
        """As in the step itself."""
        return DropoutKey(self.config.train.seed, batch.step + 1, batch.first_row)

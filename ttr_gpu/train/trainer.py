"""The training loop."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ttr_kernels.common.arrays import empty
from ttr_kernels.common.parallel import get_threads

from ..backend import Backend, PackedTokens
from ..data.batches import Batch, Share, TrainingBatches, check_sizes
from ..data.dataset import Dataset
from ..distributed.communicator import LOCAL, Communicator, totals
from ..distributed.gradients import GradientSum
from ..distributed.weights import broadcast_weights, check_equal
from ..infer.evaluation import Evaluation, evaluate_split
from ..model import TransformerModel
from ..nn.dropout import DropoutKey
from .averages import Averages
from .checkpoint import Checkpoint, clear_leftovers
from .checkpoint_writer import CheckpointWriter
from .config import RunConfig
from .diagnosis import Diagnosis
from .live import LiveTable
from .loss_scale import LossScale
from .metrics import NoLog, RunLog, StepMetrics, read_metrics
from .optimizer import Optimizer
from .plan import Plan, check_weights_fit, fitted, loaded_program, make_plan
from .profile import StepProfile
from .progress import Progress
from .schedule import learning_rate
from .signals import stop_signals
from .spikes import SpikeDetector
from .step_graph import StepGraphs, why_not
from .taken import Taken, read, together
from .trackers import Tracker
from .uploads import Uploads


@dataclass(frozen=True)
class Outcome:
    """How training ended: "finished", "early" (no improvement), or the name of a signal."""

    reason: str
    progress: Progress
    signal_number: int | None = None


class Trainer:
    """Trains a model on a data set into a run folder.

    Args:
        config: of the run.
        dataset: its "train" split is trained on, its "validation" split (if there is one) watched.
        folder: of the run, which exists.
        described: what checkpoints say of the data.
        backend: where to compute.
        echo: prints a line.
        log_every: a console line for each so many steps.
        resume: a checkpoint to go on from.
        memory_limit: bytes that the run may take: `config.train.recompute` becomes the cheapest policy that does.
        profile: time the operations of a few steps.
        communicator: the ranks that train together. Rank 0 alone prints and writes.
        watch: record statistics of activations and gradients at each so many steps; 0: never.
        live: a table for a terminal, shown instead of lines.
        tracker: "wandb" or "trackio", which get the metrics too.

    Attributes:
        moved: what is another than where the resumed run has computed, as (before, now): "device", "processes" or
            "threads". Results are then the same to rounding, no longer to the bit.
    """

    def __init__(
        self, config: RunConfig, dataset: Dataset, folder: Path, described: dict[str, object], *,
        backend: Backend, echo: Callable[[str], None], log_every: int = 1, resume: Checkpoint | None = None,
        memory_limit: int | None = None, profile: bool = False, communicator: Communicator = LOCAL, watch: int = 0,
        live: LiveTable | None = None, tracker: str | None = None,
    ) -> None:  # fmt: skip
        self.watch = watch
        self.dataset, self.folder, self.described = dataset, folder, described
        self.communicator, self.leads = communicator, communicator.rank == 0
        self.split = dataset.split("train")
        self.validation = dataset.split("validation") if "validation" in dataset.splits else None
        train = config.train
        check_sizes(self.split, train.tokens_per_batch, train.max_length)
        program = loaded_program(config, backend)
        check_weights_fit(config, backend, communicator.size)
        self.model = TransformerModel(config.model, seed=train.seed, backend=backend)
        self.optimizer = Optimizer(self.model, train, communicator)
        self.averages = Averages(self.model, train.ema) if train.ema else None
        # Both types and times are learned: each is reported.
        self._joint = self.model.time_head is not None and dataset.event_types > 1
        self.progress = Progress()
        if config.model.precision == "float16":
            self.progress.loss_scale = LossScale(train.loss_scale, train.loss_scale_growth)
        self._unread: list[Taken] = []
        self.log_every = log_every
        # Overflow decides the next step's scale, and other ranks' losses are summed in the host's memory.
        self._reads_late = (
            self.optimizer.takes_unread_norm and not self.progress.loss_scale.dynamic and communicator.size == 1
        )
        self._uploads = Uploads(backend, train.tokens_per_batch) if backend.name == "gpu" else None
        self._received: list[int] = []
        self._signal = 0  # that all ranks act on
        self.checkpoints = CheckpointWriter(
            folder / "checkpoints", described, None if resume is None else resume.state["step"]
        )
        if resume is not None:
            if self.leads:
                clear_leftovers(folder / "checkpoints")
            resume.restore(self.optimizer, self.averages)
            self.progress = Progress.of(resume.state)
        here = {"device": backend.name, "processes": communicator.size, "threads": get_threads()}
        self.moved = {
            name: (before, here[name]) for name, before in self.progress.computed_on.items() if before != here[name]
        }
        self.progress.computed_on = here
        self.batches = TrainingBatches(
            self.split, fingerprint=dataset.fingerprint, tokens_per_batch=train.tokens_per_batch,
            max_length=train.max_length, seed=train.seed, start_step=self.progress.step * train.accumulate,
            share=Share(communicator.rank, communicator.size, train.accumulate), survival=train.survival,
        )  # fmt: skip
        try:
            if memory_limit is not None:
                config = fitted(
                    config, self.model, memory_limit, program=program, data=self.batches.memory, ranks=communicator.size
                )
            self.config = config
            self.plan: Plan = make_plan(
                config, self.model, dataset, self.split, self.batches.steps_per_epoch, program=program,
                data=self.batches.memory, communicator=communicator,
            )  # fmt: skip
            self.plan.check_memory()
            self.spikes = SpikeDetector(train.spike_threshold)
            for record in read_metrics(folder):
                if record["kind"] == "step" and record["step"] <= self.progress.step:
                    self.spikes.look(record["loss"], record["gradient_norm"])
            # Rank 0 cuts off what others may be reading here.
            communicator.barrier()
            peak, first = self.plan.peak, self.progress.step + 1
            self.log = (
                RunLog(
                    folder, self.plan.total_steps, peak * communicator.size, echo, log_every, first_step=first,
                    live=live, tracker=None if tracker is None else Tracker(tracker, folder, config.model_dump()),
                ) if self.leads else NoLog()
            )  # fmt: skip
            self._diagnosis = Diagnosis(config, self.model, self.log, self.checkpoints, communicator)
            self.profile = StepProfile(folder, backend, peak, self.log.line) if profile and self.leads else None
            self._sum = GradientSum(self.model, communicator) if communicator.size > 1 else None
            self._why_no_graphs = why_not(config, backend.name, communicator.size, profile)
            self._graphs = None if self._why_no_graphs is not None else StepGraphs(
                self.model, self.optimizer, config, config.recompute, joint=self._joint,
                dynamic=self.progress.loss_scale.dynamic, say=self.log.line,
            )  # fmt: skip
            broadcast_weights(communicator, self.model)
        except BaseException:
            self.batches.close()
            raise

    def run(self) -> Outcome:
        """Train to the end, or until a signal or a lack of improvement; the last step is always saved."""
        for line in self.plan.lines:
            self.log.line(line)
        if self._why_no_graphs:
            self.log.line(f"cuda graph off: {self._why_no_graphs}; kernels are launched one by one")
        try:
            with self.batches, stop_signals(aloud=self.leads) as received:
                self._received = received
                while (reason := self._reason_to_stop()) is None:
                    with self.model.arena.step(), self.profile.step() if self.profile is not None else nullcontext():
                        self._step()
                self._save()
                self.checkpoints.wait()
            self._look_for_signal()
            if self.profile is not None:
                self.profile.finish()
        except KeyboardInterrupt:
            self.checkpoints.close(abandon=True)
            raise
        finally:
            self.checkpoints.close()
            self.batches.close()
            self.log.close()
        return Outcome(reason, self.progress, self._signal or None)

    def _reason_to_stop(self) -> str | None:
        """What is due after a step, and whether that was the last one.

        A run that is resumed comes by here before its first step: an evaluation that a signal cut short is made up for,
        so that it goes on as if it had never been interrupted.
        """
        progress, plan = self.progress, self.plan
        self.checkpoints.check()
        last = progress.step >= plan.total_steps
        due = last or progress.step % plan.evaluate_every == 0
        if progress.step > progress.evaluated_step and due and self._validate():
            self._save()
        if self._stale():
            return "early"
        if progress.step and progress.step % plan.checkpoint_every == 0:
            self._save()
        if self._look_for_signal():
            return signal.Signals(self._signal).name
        return "finished" if last else None

    def _look_for_signal(self) -> int:
        """The signal that any rank has received, and on which all act; 0 if there is none."""
        received = self._received[0] if self._received else 0
        if self.communicator.size > 1:
            received = int(self.communicator.all_gather(np.array([received])).max())
        self._signal = received
        return received

    def _step(self) -> None:
        begin = time.perf_counter()
        batches = list(islice(self.batches, self.batches.share.count))
        waited = time.perf_counter() - begin
        train, progress, scaling = self.config.train, self.progress, self.progress.loss_scale
        step = progress.step + 1
        counts = [
            int(np.count_nonzero(np.greater_equal(b.targets, 0, out=empty(len(b.targets), bool)))) for b in batches
        ]
        count, tokens, flops = totals(
            self.communicator, sum(counts), sum(len(batch.tokens) for batch in batches),
            sum(self.model.flops(batch) for batch in batches),
        )  # fmt: skip
        rate = learning_rate(
            step, peak=self.config.lr, warmup=self.plan.warmup, total=self.plan.total_steps,
            min_ratio=train.min_lr_ratio, schedule=train.schedule, decay=train.decay_share,
        )  # fmt: skip
        counted = [(batch, targets) for batch, targets in zip(batches, counts, strict=True) if targets]
        watched = bool(self.watch) and step % self.watch == 0
        graphs = self._graphs if self._graphs is not None and self._graphs.takes(counted) and not watched else None
        if graphs is None:
            values = self._gradients(counted, max(int(count), 1), scaling.value)
        else:
            values = graphs.step(counted, int(count), scaling.value, step - scaling.skipped, rate)
        taken = Taken(
            step, counted, values, max(int(count), 1), int(tokens), flops, rate, scaling.value, begin, waited
        )  # fmt: skip
        if self.leads and watched:
            self._diagnosis.watch(step, batches[0], scaling.value)
        if self._reads_late:
            # What is not finite changes no weight, and is found when it is read.
            self._update(taken, values[-1], updated=graphs is not None)
            self._unread.append(taken)
            progress.step = step
            if step == 1 or step % self.log_every == 0:
                self._read()
            return
        (numbers,) = read([taken])
        losses, norm = self._judge(taken, numbers)
        if math.isfinite(norm):
            scaling.succeeded()
            self._update(taken, norm, updated=graphs is not None)
        elif not scaling.overflowed():
            self._diagnosis.gradient_diverged(step, norm, batches[-1])
        progress.step = step
        self._finish(taken, losses, norm, time.perf_counter() - begin)

    def _gradients(self, batches: list[tuple[Batch, int]], count: int, scale: float) -> Any:
        """Forward and backward of a step over batches with so many targets each, of `count` in all ranks; what
        `Taken.values` holds. Gradients are kept times `scale`."""
        train, model = self.config.train, self.model
        if not batches:
            model.zero_gradients()
        found: list[Any] = []
        for number, (batch, targets) in enumerate(batches):
            placed: PackedTokens = batch
            if self._uploads is not None:
                placed = self._uploads.take(batch)
                following = batches[number + 1][0] if number + 1 < len(batches) else self.batches.peek()
                if following is not None:
                    self._uploads.start(following)
            # A mask depends on the batch and the row in it, whichever process computes that.
            key = DropoutKey(train.seed, batch.step + 1, batch.first_row)
            loss, saved = model.loss_forward(
                placed, key, label_smoothing=train.label_smoothing, z_loss=train.z_loss, time_weight=train.time_weight,
                gradient_scale=scale, recompute=self.config.recompute,
            )  # fmt: skip
            # Batches weigh by their targets, so that several equal one large batch.
            ready = self._sum.block_done if self._sum is not None and number == len(batches) - 1 else None
            model.loss_backward(scale * targets / count, saved, ready, accumulate=number > 0)
            found += [loss, saved.type_loss, saved.time_loss] if self._joint else [loss]
            del saved  # or the next batch's forward would find its memory taken
        if self._sum is not None:
            spans = self._sum.finish()
            if self.profile is not None:
                self.profile.add_spans(spans)
        return together([*found, self.optimizer.unread_norm()])

    def _update(self, taken: Taken, norm: Any, updated: bool) -> None:
        """The weights' step, unless they have been `updated`, and what follows it; `norm` as it was computed, of
        gradients times the loss's scale."""
        # Of the updates, not of the steps, depends how far the moments are from their start at zero.
        updates = taken.step - self.progress.loss_scale.skipped
        if not updated:
            self.optimizer.update(updates, taken.rate, norm, 1.0 / taken.scale)
        if self.averages is not None:
            self.averages.update(updates)
        if taken.step % self.config.train.compare_every == 0:
            check_equal(self.communicator, self.model, taken.step)

    def _read(self) -> None:
        """Read and record the steps whose results have not been read."""
        steps, self._unread = self._unread, []
        if not steps:
            return
        found = read(steps)
        seconds = (time.perf_counter() - steps[0].begin) / len(steps)
        for taken, numbers in zip(steps, found, strict=True):
            losses, norm = self._judge(taken, numbers)
            if not math.isfinite(norm):
                self._diagnosis.gradient_diverged(taken.step, norm, taken.batches[-1][0])
            self._finish(taken, losses, norm, seconds)

    def _judge(self, taken: Taken, numbers: list[float]) -> tuple[list[float], float]:
        """A step's mean losses (of all; of types and gaps too, if both are learned), and the norm of its gradients
        times the loss's scale. TrainingDiverged for a loss that is not finite; a spike is said."""
        *losses, norm = numbers
        parts = 3 if self._joint else 1
        sums = [
            sum(loss * targets for loss, (_, targets) in zip(losses[part::parts], taken.batches, strict=True))
            for part in range(parts)
        ]
        means = [total / taken.count for total in totals(self.communicator, *sums)]
        if not math.isfinite(means[0]):
            self._diagnosis.loss_diverged(taken.step, [
                (loss, batch) for loss, (batch, _) in zip(losses[::parts], taken.batches, strict=True)
            ])  # fmt: skip
        spike = self.spikes.look(means[0], norm / taken.scale if math.isfinite(norm) else None)
        if spike is not None:
            self._diagnosis.spike(taken.step, spike, [batch for batch, _ in taken.batches])
        return means, norm

    def _finish(self, taken: Taken, losses: list[float], norm: float, seconds: float) -> None:
        """Record a step."""
        progress, scaling = self.progress, self.progress.loss_scale
        progress.tokens += taken.tokens
        progress.seconds += seconds
        loss, type_loss, time_loss = losses if self._joint else (losses[0], None, None)
        gradient_norm = norm / taken.scale if math.isfinite(norm) else None
        self.log.step(StepMetrics(
            step=taken.step, loss=loss, lr=taken.rate, gradient_norm=gradient_norm, tokens=taken.tokens,
            seconds=seconds, wait_seconds=taken.waited, flops=taken.flops,
            memory=self.model.backend.used_bytes(), loss_scale=taken.scale if scaling.dynamic else None,
            skipped=scaling.skipped, type_loss=type_loss, time_loss=time_loss,
        ))  # fmt: skip

    def evaluate(self, split_name: str, limit_tokens: int | None = None) -> Evaluation:
        """Evaluate the model as it is on a split."""
        train = self.config.train
        return evaluate_split(
            self.model, self.dataset.split(split_name), tokens_per_batch=train.tokens_per_batch,
            max_length=train.max_length, limit_tokens=limit_tokens, stopped=lambda: bool(self._received),
            communicator=self.communicator, survival=train.survival,
        )  # fmt: skip

    def _validate(self) -> bool:
        """Evaluate on the validation split; whether it is the best so far."""
        if self.validation is None:
            return False
        self._read()
        progress = self.progress
        limit = self.config.train.evaluate_tokens
        result = plain = self.evaluate("validation", limit)
        if self.averages is not None:
            # What is kept in the end, and so decides which step is the best.
            with self.averages.in_model():
                result = self.evaluate("validation", limit)
        if self._look_for_signal():
            # Cut short, and so no measure: a Ctrl-C need not wait for a long evaluation.
            return False
        progress.evaluated_step = progress.step
        weight = self.config.train.time_weight
        loss, plain_loss = result.loss(weight), plain.loss(weight)
        improved = progress.best_loss is None or loss < progress.best_loss
        if improved:
            progress.best_loss, progress.best_step, progress.stale = loss, progress.step, 0
        else:
            progress.stale += 1
        self.log.record(
            "validation", step=progress.step, loss=loss, accuracy=result.accuracy, best=improved,
            **({"type_loss": result.cross_entropy, "time_loss": result.time_nll} if self._joint else {}),
            **({} if result.survival is None else {"survival": result.survival}),
            **({} if self.averages is None else {"loss_without_average": plain_loss}),
        )  # fmt: skip
        averaged = "" if self.averages is None else f" with averaged weights ({plain_loss:.4f} without)"
        parts = f" (type {result.cross_entropy:.4f}, time {result.time_nll:.4f}" if self._joint else ""
        if parts:
            parts += ")" if result.survival is None else f", survival {result.survival:.4f})"
        mark = "  best so far" if improved else f"  best was {progress.best_loss:.4f} at step {progress.best_step}"
        self.log.line(
            f"---- step {progress.step}: validation {loss:.4f} nats{parts}{averaged}, "
            f"accuracy {100 * result.accuracy:.1f} %{mark}"
        )
        return improved

    def _stale(self) -> bool:
        patience = self.config.train.patience
        if not patience or self.progress.stale < patience:
            return False
        self.log.line(f"stopping early: no improvement in {patience} evaluations (train.patience)")
        return True

    def _save(self) -> None:
        self._read()
        progress = self.progress
        if self.checkpoints.copied_step == progress.step:
            return
        if not self.leads:
            self.optimizer.whole_state()
            self.checkpoints.saved_elsewhere(progress.step)
            return
        self.log.flush()
        self.checkpoints.save(
            self.config, progress.state(), self.optimizer, self.averages, keep_last=self.config.train.keep_last,
            best_step=progress.best_step,
        )  # fmt: skip

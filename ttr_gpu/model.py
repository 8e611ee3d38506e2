"""The time-aware Transformer: embedding with its time, blocks, final norm and heads, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ttr_kernels.common.arena import Arena
from ttr_kernels.common.arrays import Array, array_module, contiguous, empty
from ttr_kernels.cross_entropy import LinearCrossEntropySaved
from ttr_kernels.rms_norm import RmsNormSaved

from .backend import CPU, Backend, PackedTokens, censored_positions, to_host
from .config import ModelConfig
from .decoding import PREFILL_ROWS, ModelCache, decode_outputs, decode_step, prefill_outputs
from .model_size import step_flops
from .nn.dropout import DropoutKey
from .nn.embedding import TimedEmbedding, TimedEmbeddingSaved
from .nn.final_norm import FinalNorm
from .nn.gap_distribution import GapDistribution
from .nn.heads import TokenHead
from .nn.mup import scale_with_width
from .nn.parameter import Parameter, cast_together, flatten
from .nn.recompute import Dropped, Recompute, drop, restore
from .nn.sequences import Sequences
from .nn.time2vec import TimeEncoding, time_kinds
from .nn.time_head import TimeHead, TimeHeadSaved
from .nn.transformer_block import TransformerBlock, TransformerBlockSaved
from .precision import precision

KEEP_ALL = Recompute("none")


@dataclass(frozen=True)
class LossSaved:
    """What the forward keeps for the backward, which uses it up: a second backward needs a second forward.

    Attributes:
        type_loss, time_loss: the loss's parts, unweighted means in nats; on a GPU arrays of one number. time_loss is
            None without a time head.
        time_weight: of time_loss in the loss.
    """

    embedding: TimedEmbeddingSaved
    blocks: list[TransformerBlockSaved | Dropped]
    final_norm: RmsNormSaved
    head: LinearCrossEntropySaved
    time_head: TimeHeadSaved | None
    type_loss: Any
    time_loss: Any
    time_weight: float


class BatchScores(NamedTuple):
    """Figures of each position of a batch, NumPy arrays; what has no target has loss 0 and counts as wrong.

    Attributes:
        losses: (total,) −log P(next token) in nats.
        correct: (total,) whether the likeliest token was right.
        time_losses: (total,) −log p(gap to the next event) in nats per unit of time, where the target is CENSORED −log
            P(no event until the target's time); None without a time head.
    """

    losses: Array
    correct: Array
    time_losses: Array | None


class TransformerModel:
    """Distribution of the next token, and (with time_components) of the gap to it, over packed, timestamped sequences.

    Args:
        config: the architecture.
        seed: of the initial weights. They are drawn in float64: every precision starts from the same numbers.
        precision_name: overrides the configuration's, for tests in float64.
        backend: where it computes. Batches are NumPy arrays everywhere; they are copied to it.

    Attributes:
        parameters: every Parameter, its value and gradient views into `flat`.
        flat: all values and all gradients as two 1-D arrays.
        arena: memory for the arrays of a step: who repeats steps runs each in `with model.arena.step():`.
    """

    def __init__(
        self, config: ModelConfig, *, seed: int = 0, precision_name: str | None = None, backend: Backend = CPU
    ) -> None:
        self.config, self.backend = config, backend
        self.precision = precision(precision_name or config.precision)
        rng = np.random.default_rng(seed)
        time = None
        if time_kinds(config.time_features, config.time_pace):
            time = TimeEncoding(
                config.embed_dim, features=config.time_features, features_dim=config.time_features_dim,
                scale=config.time_scale, span=config.time_span, pace=config.time_pace, precision=self.precision,
                rng=rng, name="embedding.time",
            )  # fmt: skip
        self.embedding = TimedEmbedding(
            config.vocabulary_size, config.embed_dim, time=time, precision=self.precision, rng=rng,
            name="embedding.token",
        )  # fmt: skip
        self.blocks = [
            TransformerBlock(
                config.embed_dim, config.hidden_dim, config.num_heads, num_kv_heads=config.kv_heads,
                window=config.window, rope=config.rope, rope_base=config.rope_base, time_bias=config.time_bias,
                time_scale=config.time_scale, norm_eps=config.norm_eps, dropout=config.dropout,
                precision=self.precision, rng=rng, name=f"blocks.{index}", index=index,
                residual_layers=2 * config.num_layers,
                attention_features=config.attention_features if config.attention == "performer" else None,
            )
            for index in range(config.num_layers)
        ]  # fmt: skip
        self.final_norm = FinalNorm(config.embed_dim, eps=config.norm_eps, precision=self.precision)
        self.head = TokenHead(
            config.vocabulary_size, config.embed_dim, tied_to=self.embedding.table if config.tied_head else None,
            precision=self.precision, rng=rng, name="head",
        )  # fmt: skip
        self.time_head: TimeHead | None = None
        if config.time_components:
            self.time_head = TimeHead(
                config.embed_dim, config.time_components, log_mean=config.time_log_mean, log_std=config.time_log_std,
                min_sigma=config.time_min_sigma, zero_gap=config.time_zero_gap, precision=self.precision, rng=rng,
                name="time_head", types=config.vocabulary_size if config.time_given_type else None,
            )  # fmt: skip
        blocks = [p for block in self.blocks for p in block.parameters]
        ends = [self.final_norm.weight, *self.head.parameters]
        if self.time_head is not None:
            ends += self.time_head.parameters
        self.parameters: list[Parameter] = [*self.embedding.parameters, *blocks, *ends]
        if config.mup_base_width is not None:
            heads = [self.head.weight, *([] if self.time_head is None else [self.time_head.weight])]
            scale_with_width([p for p in blocks if p.decay], heads, config.mup_base_width / config.embed_dim)
        # The blocks' matrices lie together, which an optimizer may treat in its own way, and then what else a backward
        # is done with before them: gradients of ranks are summed in pieces of memory.
        self.flat = flatten([*blocks, *ends, *self.embedding.parameters], backend.xp)
        # Gradients that sum up in their array, and have to find zeros there: of vectors, and of tables that are read by
        # row, unless a head writes that first. All others are one product each.
        self._gathered = [self.flat.gradients[self.flat.decay_end :]]
        self._gathered += [] if config.tied_head else [self.embedding.table.gradient]
        if self.time_head is not None and self.time_head.table is not None:
            self._gathered.append(self.time_head.table.gradient)
        self.arena = Arena(backend.xp)

    def zero_gradients(self) -> None:
        """Set all gradients to zero: for who wants none of a backward's, which need not find zeros (`accumulate`)."""
        _set_to_zero(self.flat.gradients)

    def values_changed(self) -> None:
        """To be called after parameters were written to: layers then compute with their 16-bit copies made anew."""
        for p in self.parameters:
            p.changed()

    def loss_forward(
        self, batch: PackedTokens, dropout: DropoutKey | None = None, *, label_smoothing: float = 0.0,
        z_loss: float = 0.0, time_weight: float = 1.0, gradients: bool = True, gradient_scale: Any = 1.0,
        recompute: Recompute = KEEP_ALL,
    ) -> tuple[Any, LossSaved]:  # fmt: skip
        """Mean loss in nats over the targets that are tokens: of these, and time_weight times that of their gaps.

        Args:
            batch: packed tokens, times and targets. Where a target is CENSORED, the gap's loss has −log P(no event
                until the target's time) in its sum, too.
            dropout: draws the masks of this step; None: no dropout.
            label_smoothing, z_loss: see `ttr_kernels.cross_entropy`.
            time_weight: of the gap's loss, where there is a time head.
            gradients: False skips what only a backward needs.
            gradient_scale: about the dloss of the backward to come, of which the head computes its gradient already.
                Both are numbers, or on a GPU arrays of one number there.
            recompute: what of the blocks' forward is not kept, but run again in the backward.
        """
        censored = censored_positions(batch)
        batch = self.backend.place(batch)
        sequences = Sequences(batch.cu_seqlens, batch.times)
        x, embedding = self.embedding.forward(batch.tokens, sequences)
        rope = self.blocks[0].rope(sequences)
        blocks = []
        for index, block in enumerate(self.blocks):
            y, saved = block.forward(x, sequences, rope, dropout)
            if gradients:
                blocks.append(drop(recompute.of_block(index), x, saved, sequences, rope, dropout))
            x = y
            del saved  # or what was dropped would live on through the next block
        normed, norm = self.final_norm.forward(x)
        type_loss, head = self.head.loss_forward(
            normed, batch.targets if censored is None else self.backend.xp.maximum(batch.targets, -1),
            label_smoothing=label_smoothing, z_loss=z_loss, gradients=gradients, gradient_scale=gradient_scale,
        )  # fmt: skip
        loss, time_loss, time_head = type_loss, None, None
        if self.time_head is not None:
            xp, times, targets = self.backend.xp, batch.times, batch.targets
            gaps = xp.subtract(batch.target_times, times, out=empty(times.shape, times.dtype, times))
            scored = xp.greater_equal(targets, 0, out=empty(targets.shape, bool, targets))
            time_loss, time_head = self.time_head.loss_forward(normed, gaps, scored, targets, censored)
            loss = type_loss + time_weight * time_loss
        return loss, LossSaved(embedding, blocks, norm, head, time_head, type_loss, time_loss, time_weight)

    def loss_backward(
        self, dloss: Any, saved: LossSaved, block_done: Callable[[int], None] | None = None, *, accumulate: bool = True
    ) -> None:
        """Adds dloss times the loss's gradient to every parameter's gradient; `accumulate` False: it becomes that,
        whatever it was, in one pass over memory less than after `zero_gradients`.

        `block_done` is called with len(blocks) after the heads, and after each block, from the last to the first: their
        own gradients have then been added to (a tied head's only in the end).
        """
        if not accumulate:
            for gradient in self._gathered:
                _set_to_zero(gradient)
        dnormed = self.head.loss_backward(dloss, saved.head, accumulate)
        if self.time_head is not None and saved.time_head is not None:
            of_gaps = self.time_head.loss_backward(dloss * saved.time_weight, saved.time_head, accumulate)
            # What overflows in float16 is found by the gradient's norm, and the step skipped.
            with np.errstate(over="ignore", invalid="ignore"):
                dnormed += contiguous(of_gaps, dnormed.dtype)
            del of_gaps  # or it would stay to the end
        dx = self.final_norm.backward(dnormed, saved.final_norm)
        if block_done is not None:
            block_done(len(self.blocks))
        while saved.blocks:
            # Taken off the list, so that a block's activations are freed as soon as they have served.
            block = self.blocks[len(saved.blocks) - 1]
            dx = block.backward(dx, restore(block, saved.blocks.pop()), accumulate)
            if block_done is not None:
                block_done(len(saved.blocks))
        self.embedding.backward(dx, saved.embedding, accumulate)

    def evaluate_batch(self, batch: PackedTokens) -> BatchScores:
        """Score every position, without dropout."""
        _, saved = self.loss_forward(batch, gradients=False)
        time_losses = None if saved.time_head is None else to_host(saved.time_head.losses)
        return BatchScores(to_host(saved.head.losses), to_host(saved.head.best) == batch.targets, time_losses)

    def outputs(self, batch: PackedTokens) -> Array:
        """The last block's output (total, C) at every position, without dropout: what the answers below are given."""
        batch = self.backend.place(batch)
        sequences = Sequences(batch.cu_seqlens, batch.times)
        x, _ = self.embedding.forward(batch.tokens, sequences)
        rope = self.blocks[0].rope(sequences)
        for block in self.blocks:
            x, _ = block.forward(x, sequences, rope)
        return x

    @cached_property
    def cast_values(self) -> Array:
        """All values in the dtype of the computation, laid out like `flat.values`; `cast` of a parameter keeps its own
        up to date."""
        return cast_together(self.flat, self.parameters, self.precision.compute)

    def next_logits(self, outputs: Array) -> Array:
        """Outputs of the last block (rows, C) -> logits (rows, V) of the token after each."""
        return self.head.logits(self.final_norm(outputs))

    def next_gap(
        self, outputs: Array, types: Array | None = None, *, logits: Array | None = None
    ) -> GapDistribution:  # fmt: skip
        """Outputs of the last block (rows, C) -> distribution of the gap to the event after each.

        Args:
            types: (rows,) of those events, for a model with time_given_type (others do not look at them). None: they
                are not known, and the distribution is the mixture over the likeliest of them.
            logits: (rows, V), from `next_logits` of the same outputs, where the caller has them: only that mixture
                needs them, and computes them otherwise.

        Raises ValueError for a model without a time head.
        """
        if self.time_head is None:
            raise ValueError("model: has no time head (model.time_components is 0), and so no distribution of gaps")
        normed = self.final_norm(outputs)
        if self.time_head.types is None or types is not None:
            return self.time_head.distribution(normed, None if types is None else self.backend.put(types))
        return self.time_head.marginal(normed, to_host(self.head.logits(normed) if logits is None else logits))

    def logits(self, batch: PackedTokens, rows: Array | None = None) -> Array:
        """Logits of the next token (rows, V) after the given rows of the batch; default: after every row."""
        x = self.outputs(batch)
        return self.next_logits(x if rows is None else x[self.backend.put(rows)])

    def new_cache(self, sequences: int = 1, capacity: int | None = None) -> ModelCache:
        """An empty cache for decoding so many sequences; its capacity is the window, or what is given."""
        return ModelCache(self, sequences, capacity)

    def prefill(
        self, tokens: Array, times: Array, cu_seqlens: Array, cache: ModelCache, rings: Array | None = None,
        rows: int = PREFILL_ROWS,
    ) -> Array:  # fmt: skip
        """Read packed positions that continue sequences of a cache, and predict what follows the last of each.

        Args:
            tokens: (total,) int32; times: (total,) float64, not descending in a sequence.
            cu_seqlens: (N + 1,) int32, where the new positions of each sequence begin; at least one each.
            cache: from `new_cache`; it takes the positions.
            rings: (N,) int64, the sequences' rings in the cache, all different; default: all rings in order.
            rows: positions that are computed at a time: more are faster and need more memory; the result is the same
                to rounding.

        Returns:
            Logits (N, V).

        Raises:
            ValueError: a token or time that is none, a time that goes back, or more positions than the cache holds
                where there is no window.
        """
        return self.next_logits(self.prefill_outputs(tokens, times, cu_seqlens, cache, rings, rows))

    def decode_step(self, tokens: Array, times: Array, cache: ModelCache, rings: Array | None = None) -> Array:
        """One new position of each sequence, wherever each stands -> logits (B, V) of the token that follows it.

        Time and memory do not depend on the positions. tokens (B,) int32, times (B,) float64; the rest, and what is
        raised, as in `prefill`.
        """
        return decode_step(self, tokens, times, cache, rings)

    def prefill_outputs(
        self, tokens: Array, times: Array, cu_seqlens: Array, cache: ModelCache, rings: Array | None = None,
        rows: int = PREFILL_ROWS,
    ) -> Array:  # fmt: skip
        """`prefill`, but the last block's outputs (N, C), for `next_logits` and `next_gap`."""
        return prefill_outputs(self, tokens, times, cu_seqlens, cache, rings, rows)

    def decode_outputs(self, tokens: Array, times: Array, cache: ModelCache, rings: Array | None = None) -> Array:
        """`decode_step`, but the last block's outputs (B, C), for `next_logits` and `next_gap`."""
        return decode_outputs(self, tokens, times, cache, rings)

    def find_nonfinite(self, batch: PackedTokens, dropout: DropoutKey | None = None) -> str | None:
        """Name of the first parameter or layer whose values are not finite, in the order of the forward; or None."""
        for p in self.parameters:
            if not _finite(p.value):
                return f"parameter {p.name}"
        censored = censored_positions(batch)
        with np.errstate(all="ignore"):
            for name, x in self.activations(batch, dropout):
                if not _finite(x):
                    return name
            normed = self.final_norm(x)
            batch = self.backend.place(batch)
            loss, _ = self.head.loss_forward(normed, self.backend.xp.maximum(batch.targets, -1), gradients=False)
            if not np.isfinite(float(loss)):
                return "head"
            if self.time_head is not None:
                gaps = batch.target_times - batch.times
                loss, _ = self.time_head.loss_forward(normed, gaps, batch.targets >= 0, batch.targets, censored)
        return None if np.isfinite(float(loss)) else "time_head"

    def activations(self, batch: PackedTokens, dropout: DropoutKey | None = None) -> Iterator[tuple[str, Array]]:
        """(name, output) of each layer in the order of a forward, which is run for it; the last is the head's input.

        "….attention" is the heads' mixed values, "….attention.output" and "….feed_forward" the residual stream after
        each half of a block.
        """
        batch = self.backend.place(batch)
        sequences = Sequences(batch.cu_seqlens, batch.times)
        x, _ = self.embedding.forward(batch.tokens, sequences)
        yield "embedding", x
        rope = self.blocks[0].rope(sequences)
        for index, block in enumerate(self.blocks):
            x, saved = block.forward(x, sequences, rope, dropout)
            yield f"blocks.{index}.attention", saved.attention.output.x
            yield f"blocks.{index}.attention.output", saved.feed_forward_norm.x
            yield f"blocks.{index}.feed_forward", x

    def flops(self, batch: PackedTokens) -> float:
        """Floating-point operations of one forward and backward (see `model_size.step_flops`)."""
        return sum(step_flops(self.config, batch.cu_seqlens))


def _set_to_zero(array: Array) -> None:
    if isinstance(array, np.ndarray):
        # Loaded only here: it loads numba, which a GPU can do without.
        from ttr_kernels.common.conversion import set_to_zero

        set_to_zero(array)
    else:
        array.fill(0)


def _finite(array: Array) -> bool:
    return bool(array_module(array).isfinite(array.astype(np.float32, copy=False)).all())

"""The time-aware Transformer: embedding with its time, blocks, final norm and token head, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ttr_kernels.common.arrays import Array, array_module

from .backend import CPU, Backend, PackedTokens, to_host
from .config import ModelConfig
from .decoding import PREFILL_ROWS, ModelCache, decode_step, prefill
from .nn.dropout import DropoutKey
from .nn.embedding import TimedEmbedding, TimedEmbeddingSaved
from .nn.heads import TokenHead, TokenHeadSaved
from .nn.parameter import Parameter, flatten
from .nn.sequences import Sequences
from .nn.time2vec import TimeEncoding
from .nn.transformer_block import TransformerBlock, TransformerBlockSaved
from .precision import precision


@dataclass(frozen=True)
class LossSaved:
    """What the forward keeps for the backward, which uses it up: a second backward needs a second forward."""

    embedding: TimedEmbeddingSaved
    blocks: list[TransformerBlockSaved]
    head: TokenHeadSaved
    count: Any  # targets that are not −1; on a GPU an array of one number


class TransformerModel:
    """Next-token distribution over packed sequences of timestamped tokens.

    Args:
        config: the architecture.
        seed: of the initial weights. They are drawn in float64: every precision starts from the same numbers.
        precision_name: overrides the configuration's, for tests in float64.
        backend: where it computes. Batches are NumPy arrays everywhere; they are copied to it.

    Attributes:
        parameters: every Parameter, its value and gradient views into `flat`.
        flat: all values and all gradients as two 1-D arrays.
    """

    def __init__(
        self, config: ModelConfig, *, seed: int = 0, precision_name: str | None = None, backend: Backend = CPU
    ) -> None:
        self.config, self.backend = config, backend
        self.precision = precision(precision_name or config.precision)
        rng = np.random.default_rng(seed)
        time = None
        if config.time_features != "none":
            time = TimeEncoding(
                config.embed_dim, features=config.time_features, features_dim=config.time_features_dim,
                scale=config.time_scale, span=config.time_span, precision=self.precision, rng=rng,
                name="embedding.time",
            )  # fmt: skip
        self.embedding = TimedEmbedding(
            config.vocabulary_size, config.embed_dim, time=time, precision=self.precision, rng=rng,
            name="embedding.token",
        )  # fmt: skip
        self.blocks = [
            TransformerBlock(
                config.embed_dim, config.hidden_dim, config.num_heads, num_kv_heads=config.kv_heads,
                window=config.window, rope_base=config.rope_base, time_bias=config.time_bias,
                time_scale=config.time_scale, norm_eps=config.norm_eps, dropout=config.dropout,
                precision=self.precision, rng=rng, name=f"blocks.{index}", index=index,
                residual_layers=2 * config.num_layers,
                attention_features=config.attention_features if config.attention == "performer" else None,
            )
            for index in range(config.num_layers)
        ]  # fmt: skip
        self.head = TokenHead(
            config.vocabulary_size, config.embed_dim, tied_to=self.embedding.table if config.tied_head else None,
            norm_eps=config.norm_eps, precision=self.precision, rng=rng, name="head",
        )  # fmt: skip
        blocks = [p for block in self.blocks for p in block.parameters]
        self.parameters: list[Parameter] = [*self.embedding.parameters, *blocks, *self.head.parameters]
        self.flat = flatten(self.parameters, backend.xp)

    def zero_gradients(self) -> None:
        """Set all gradients to zero."""
        self.flat.gradients.fill(0)

    def loss_forward(
        self, batch: PackedTokens, dropout: DropoutKey | None = None, *, label_smoothing: float = 0.0,
        z_loss: float = 0.0, gradients: bool = True,
    ) -> tuple[Any, LossSaved]:  # fmt: skip
        """Mean loss in nats over the targets that are not −1.

        Args:
            batch: packed tokens, times and targets.
            dropout: draws the masks of this step; None: no dropout.
            label_smoothing, z_loss: see `ttr_kernels.cross_entropy`.
            gradients: False skips what only a backward needs.
        """
        batch = self.backend.place(batch)
        sequences = Sequences(batch.cu_seqlens, batch.times)
        x, embedding = self.embedding.forward(batch.tokens, sequences)
        rope = self.blocks[0].rope(sequences)
        blocks = []
        for block in self.blocks:
            x, saved = block.forward(x, sequences, rope, dropout)
            if gradients:
                blocks.append(saved)
        loss, head = self.head.loss_forward(
            x, batch.targets, label_smoothing=label_smoothing, z_loss=z_loss, gradients=gradients
        )
        return loss, LossSaved(embedding, blocks, head, head.loss.count)

    def loss_backward(self, dloss: float, saved: LossSaved) -> None:
        """Adds dloss times the loss's gradient to every parameter's gradient."""
        dx = self.head.loss_backward(dloss, saved.head)
        while saved.blocks:
            # Taken off the list, so that a block's activations are freed as soon as they have served.
            dx = self.blocks[len(saved.blocks) - 1].backward(dx, saved.blocks.pop())
        self.embedding.backward(dx, saved.embedding)

    def evaluate_batch(self, batch: PackedTokens) -> tuple[Array, Array]:
        """Per position, without dropout: loss in nats (total,), and whether the likeliest token was right (total,).

        Positions whose target is −1 have loss 0 and count as wrong. Both are NumPy arrays.
        """
        _, saved = self.loss_forward(batch, gradients=False)
        return to_host(saved.head.loss.losses), to_host(saved.head.loss.best) == batch.targets

    def logits(self, batch: PackedTokens, rows: Array | None = None) -> Array:
        """Logits of the next token (rows, V) after the given rows of the batch; default: after every row."""
        batch = self.backend.place(batch)
        sequences = Sequences(batch.cu_seqlens, batch.times)
        x, _ = self.embedding.forward(batch.tokens, sequences)
        rope = self.blocks[0].rope(sequences)
        for block in self.blocks:
            x, _ = block.forward(x, sequences, rope)
        return self.head.logits(x if rows is None else x[self.backend.put(rows)])

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
        return prefill(self, tokens, times, cu_seqlens, cache, rings, rows)

    def decode_step(self, tokens: Array, times: Array, cache: ModelCache, rings: Array | None = None) -> Array:
        """One new position of each sequence, wherever each stands -> logits (B, V) of the token that follows it.

        Time and memory do not depend on the positions. tokens (B,) int32, times (B,) float64; the rest, and what is
        raised, as in `prefill`.
        """
        return decode_step(self, tokens, times, cache, rings)

    def find_nonfinite(self, batch: PackedTokens, dropout: DropoutKey | None = None) -> str | None:
        """Name of the first parameter or layer whose values are not finite, in the order of the forward; or None."""
        for p in self.parameters:
            if not _finite(p.value):
                return f"parameter {p.name}"
        batch = self.backend.place(batch)
        sequences = Sequences(batch.cu_seqlens, batch.times)
        with np.errstate(all="ignore"):
            x, _ = self.embedding.forward(batch.tokens, sequences)
            if not _finite(x):
                return "embedding"
            rope = self.blocks[0].rope(sequences)
            for index, block in enumerate(self.blocks):
                x, saved = block.forward(x, sequences, rope, dropout)
                if not _finite(saved.attention.output.x):
                    return f"blocks.{index}.attention"
                if not _finite(saved.feed_forward_norm.x):
                    return f"blocks.{index}.attention (after its output projection)"
                if not _finite(x):
                    return f"blocks.{index}.feed_forward"
            loss, _ = self.head.loss_forward(x, batch.targets, gradients=False)
        return None if np.isfinite(float(loss)) else "head"

    def flops(self, batch: PackedTokens) -> float:
        """Floating-point operations of one forward and backward: 6 per matrix weight and token, and attention's."""
        config = self.config
        matrices = sum(p.value.size for p in self.parameters if p.decay and p is not self.embedding.table)
        matrices += self.embedding.table.value.size if config.tied_head else 0
        lengths = np.diff(batch.cu_seqlens).astype(np.float64)
        span = lengths if config.window is None else np.minimum(lengths, config.window)
        pairs = float((span * (span + 1) / 2 + (lengths - span) * span).sum())
        if config.attention == "performer":
            # A state of features in the place of the past's keys.
            pairs = float(lengths.sum()) * config.attention_features
        # Two products forward, five backward (the weights are recomputed), 2 D operations per pair and head each.
        attention = 14.0 * pairs * config.embed_dim * config.num_layers
        return 6.0 * matrices * len(batch.tokens) + attention

    def memory_estimate(self, tokens: int) -> dict[str, int]:
        """Bytes of a training step of so many tokens: parameters, gradients, optimizer, activations."""
        config, size = self.config, self.flat.values.nbytes
        kv = config.kv_heads * config.head_dim
        per_layer = 6 * config.embed_dim + 2 * kv + config.embed_dim + 3 * config.hidden_dim
        # Beyond the blocks: embedding, time features, final norm, its gradient; and a backward's largest moment.
        rest = 5 * config.embed_dim + 4 * config.time_features_dim + 5 * config.hidden_dim
        activations = (per_layer * config.num_layers + rest) * tokens * self.precision.compute.itemsize
        logits = max(16 * config.vocabulary_size, 1 << 20) * 4 + 2 * self.head.weight.value.nbytes
        return {
            "parameters": size, "gradients": size, "optimizer": 2 * size, "activations": activations + logits
        }  # fmt: skip


def _finite(array: Array) -> bool:
    return bool(array_module(array).isfinite(array.astype(np.float32, copy=False)).all())

"""Steps of a few sequences on a CPU, through the fused kernel: what its arrays are in a model and its cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ttr_kernels.common.arrays import Array
from ttr_kernels.decode_step import Architecture, FusedStep

from .nn.key_value_cache import KeyValueCache, lay_together
from .nn.linear_attention_cache import LinearAttentionCache
from .nn.multi_head_attention import decay_of
from .nn.parameter import Parameter

if TYPE_CHECKING:
    from .decoding import ModelCache
    from .model import TransformerModel

# Beyond so many rows the operations one by one, whose products are those of BLAS, are as fast.
ROWS = 256


class FusedDecoding:
    """The fused step of a model over a cache of its own. See `fused_decoding`, which makes it."""

    def __init__(self, model: TransformerModel, layers: list[KeyValueCache]) -> None:
        self.model = model
        config, flat = model.config, model.flat
        matrices = model.cast_values
        # 16-bit copies of matrices are made anew when `cast` is asked for them after a change.
        self._casts = [p for p in model.parameters if p.decay] if matrices is not flat.values else []
        shape = Architecture(
            embed_dim=config.embed_dim, hidden_dim=config.hidden_dim, heads=config.num_heads, kv_heads=config.kv_heads,
            dim=config.head_dim, blocks=config.num_layers, vocabulary=config.vocabulary_size,
            features=0 if model.embedding.time is None else config.time_features_dim, kinds=config.time_features,
            time_bias=config.time_bias, time_scale=config.time_scale, time_span=config.time_span,
            rope_base=config.rope_base, norm_eps=config.norm_eps,
        )  # fmt: skip
        named: dict[str, Parameter] = {
            "table": model.embedding.table, "final_norm": model.final_norm.weight, "head": model.head.weight
        }  # fmt: skip
        if (time := model.embedding.time) is not None:
            named["project"] = time.project
            for kind, frequency, phase in zip(time.kinds, time.frequency, time.phase, strict=True):
                named |= {f"{kind}.frequency": frequency, f"{kind}.phase": phase}
        blocks = [
            {
                "attention_norm": block.attention_norm, "qkv": block.attention.qkv, "output": block.attention.output,
                "feed_forward_norm": block.feed_forward_norm, "up": block.feed_forward.up,
                "down": block.feed_forward.down,
            }
            for block in model.blocks
        ]  # fmt: skip
        keys, values, times = lay_together(layers)
        self._step = FusedStep(
            shape, flat.values, matrices, {name: flat.offset(p) for name, p in named.items()},
            [{name: flat.offset(p) for name, p in block.items()} for block in blocks], keys, values, times,
            span=layers[0].capacity, rows=ROWS,
        )  # fmt: skip
        self._rates = [block.attention.rate.value for block in model.blocks if block.attention.rate is not None]
        self._taus = [block.attention.tau.value for block in model.blocks if block.attention.tau is not None]

    def step(
        self, tokens: Array, times: Array, cache: ModelCache, rings: Array, *, logits: bool
    ) -> tuple[Array, Array]:
        """One position of each sequence, checked already: what FusedStep gives, in the model's dtype.

        The cache's rings take the positions; its lengths and last times stay for the caller to set.
        """
        config, compute = self.model.config, self.model.precision.compute
        for p in self._casts:
            p.cast(compute)
        shape = config.num_layers, config.num_heads
        rate = tau = np.zeros(shape, np.float32)
        if self._rates:
            rate, tau = decay_of(np.concatenate(self._rates), np.concatenate(self._taus), config.time_scale)
        positions = cache.lengths[rings]
        gaps = np.where(positions > 0, times - cache.last_times[rings], 0.0)
        x, predicted = self._step(
            tokens, times, gaps, positions, rings, rate.reshape(shape), tau.reshape(shape), logits=logits
        )
        return x.astype(compute, copy=False), predicted.astype(compute, copy=False)


def fused_decoding(
    model: TransformerModel, caches: Sequence[KeyValueCache | LinearAttentionCache]
) -> FusedDecoding | None:
    """The fused step of this model with these empty caches of its layers.

    None where there is none: on a GPU, in float64, for linear attention, RoPE by time, a model that knows its pace.
    """
    layers = [layer for layer in caches if isinstance(layer, KeyValueCache)]
    on_cpu = isinstance(model.flat.values, np.ndarray)
    config = model.config
    fits = model.precision.compute != np.float64 and config.rope == "position" and not config.time_pace
    if not on_cpu or not fits or len(layers) != len(model.blocks):
        return None
    return FusedDecoding(model, layers)

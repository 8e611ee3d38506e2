"""A model's numbers of parameters and operations, from its configuration alone: a model too large for this machine can
be planned without its arrays."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ttr_kernels.common.arrays import Array

from .backend import CPU, Backend, PackedTokens
from .config import ModelConfig
from .nn.time2vec import time_kinds
from .precision import Precision, precision


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters.

    Attributes:
        total: all of them.
        block_matrices: of the matrices of one block.
        heads: of the heads' own matrices.
        matrices: of all matrices, which have copies in the dtype of the computation.
        table: of the embedding's matrix.
        multiplied: of the matrices that every token is multiplied by; a tied head's is the embedding's.
        largest: of the largest matrix.
    """

    total: int
    block_matrices: int
    heads: int
    matrices: int
    table: int
    multiplied: int
    largest: int


def model_size(config: ModelConfig) -> ModelSize:
    """The sizes of a `TransformerModel` of this configuration."""
    c, f, v, k = config.embed_dim, config.hidden_dim, config.vocabulary_size, config.time_components
    block = [c * (c + 2 * config.kv_heads * config.head_dim), c * c, c * 2 * f, f * c]
    kinds = len(time_kinds(config.time_features, config.time_pace))
    time_encoding = c * kinds * config.time_features_dim
    heads = [] if config.tied_head else [v * c]
    heads += [3 * k * c] if k else []
    heads += [2 * c * c, v * 2 * c] if k and config.time_given_type else []
    matrices = config.num_layers * sum(block) + v * c + time_encoding + sum(heads)
    decay = 2 * config.num_heads if config.time_bias != "none" else 0
    vectors = config.num_layers * (2 * c + decay) + 2 * kinds * config.time_features_dim + c + 3 * k
    return ModelSize(
        total=matrices + vectors, block_matrices=sum(block), heads=sum(heads), matrices=matrices, table=v * c,
        multiplied=matrices if config.tied_head else matrices - v * c,
        largest=max(*block, v * c, time_encoding, *heads),
    )  # fmt: skip


@dataclass(frozen=True)
class ModelOutline:
    """What planning asks of a model, for one that is not made: `TransformerModel` answers the same."""

    config: ModelConfig
    backend: Backend = CPU

    @property
    def precision(self) -> Precision:
        """What it computes in."""
        return precision(self.config.precision)

    def flops(self, batch: PackedTokens) -> float:
        """Floating-point operations of one forward and backward."""
        return sum(step_flops(self.config, batch.cu_seqlens))


def step_flops(config: ModelConfig, cu_seqlens: Array) -> tuple[float, float]:
    """Floating-point operations of one forward and backward: in products with matrices (6 per element and token), and
    in attention (two products forward, five backward, since the weights are recomputed; 2 D per pair and head each)."""
    attention = 14.0 * attention_pairs(cu_seqlens, config) * config.embed_dim * config.num_layers
    return 6.0 * model_size(config).multiplied * float(cu_seqlens[-1]), attention


def attention_pairs(cu_seqlens: Array, config: ModelConfig) -> float:
    """Pairs of a query and a key that it sees, in all sequences together; with random features, of a query and one."""
    ends = cu_seqlens.tolist()
    if config.attention == "performer":
        return float(ends[-1]) * config.attention_features
    pairs = 0
    for begin, end in pairwise(ends):
        span = end - begin if config.window is None else min(end - begin, config.window)
        pairs += span * (span + 1) // 2 + (end - begin - span) * span
    return float(pairs)

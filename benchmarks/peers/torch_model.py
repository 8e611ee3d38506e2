"""The time-aware Transformer in PyTorch: the peer of `benchmarks step`, and the twin that tests/pytorch compares with.

Eager or compiled, float32 or under autocast; written independently of ttr_gpu.nn. Only the names of the parameters are
the same, so that `load_weights` can take ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ttr_gpu.backend import PackedTokens
from ttr_gpu.config import ModelConfig
from ttr_gpu.model import TransformerModel

Given = TypeVar("Given")  # what a model's forward reads


class Batch(NamedTuple):
    """Sequences in rows of equal length."""

    tokens: Tensor  # (B, T) int64
    times: Tensor  # (B, T) float64
    targets: Tensor  # (B, T) int64, −1 for none
    document: Tensor | None  # (B, T) int64: which sequence of its row a position belongs to; None: a row is one


class Context(NamedTuple):
    """What the blocks of one forward share."""

    cos: Tensor  # (T, 1, D / 2)
    sin: Tensor
    mask: Tensor | None  # (B or 1, 1, T, T): 0 where the key is visible, −inf elsewhere; None: causal and nothing else
    age: Tensor  # (B, 1, T, T): time from key to query, not below 0


class Time2Vec(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.empty(features))
        self.phase = nn.Parameter(torch.empty(features))

    def forward(self, times: Tensor) -> Tensor:
        """(B, T) float64 -> (B, T, features) float32."""
        angle = times[..., None] * self.frequency.double() + self.phase.double()
        return torch.cat((angle[..., :1], angle[..., 1:].sin()), dim=-1).float()


class TimeEncoding(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.scale, self.span = config.time_scale, max(config.time_span, config.time_scale)
        self.kinds = ["absolute", "gap"] if config.time_features == "both" else [config.time_features]
        for kind in self.kinds:
            self.add_module(kind, Time2Vec(config.time_features_dim))
        self.weight = nn.Parameter(torch.empty(config.embed_dim, config.time_features_dim * len(self.kinds)))

    def forward(self, times: Tensor, first: Tensor) -> Tensor:
        gaps = times.diff(dim=-1, prepend=times[..., :1]).masked_fill(first, 0.0)
        inputs = {"absolute": times / self.span, "gap": torch.log1p(gaps / self.scale)}
        features = [self.get_submodule(kind)(inputs[kind]) for kind in self.kinds]
        return F.linear(torch.cat(features, dim=-1).to(self.weight.dtype), self.weight)


class TimeBias(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind, self.scale = config.time_bias, config.time_scale
        self.rate = nn.Parameter(torch.empty(config.num_heads))
        self.tau = nn.Parameter(torch.empty(config.num_heads))

    def forward(self, age: Tensor, mask: Tensor) -> Tensor:
        """The additive mask (B, H, T, T)."""
        rate = F.softplus(self.rate)[:, None, None]
        tau = self.scale * F.softplus(self.tau)[:, None, None]
        u = age * tau.reciprocal()
        return torch.addcmul(mask, rate, u.log1p() if self.kind == "log" else u, value=-1.0)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = config.num_heads, config.kv_heads, config.head_dim
        rows = (self.heads + 2 * self.kv_heads) * self.dim
        self.qkv = nn.Linear(config.embed_dim, rows, bias=False)
        self.time_bias = None if config.time_bias == "none" else TimeBias(config)
        self.output = nn.Linear(self.heads * self.dim, config.embed_dim, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        batch, length, _ = x.shape
        rows = self.qkv(x).view(batch, length, self.heads + 2 * self.kv_heads, self.dim)
        rotating, v = rows.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
        q, k = rotate(rotating, context.cos, context.sin).split((self.heads, self.kv_heads), dim=2)
        mask = context.mask if self.time_bias is None else self.time_bias(context.age, context.mask)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=mask is None,
            enable_gqa=self.kv_heads != self.heads,
        )  # fmt: skip
        return self.output(y.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.embed_dim, 2 * config.hidden_dim, bias=False)
        self.down = nn.Linear(config.hidden_dim, config.embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.gelu(gate, approximate="tanh") * value)


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.embed_dim, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.embed_dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.attention(self.attention_norm(x), context)
        return x + self.feed_forward(self.feed_forward_norm(x))


class TimedEmbedding(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocabulary_size, config.embed_dim)
        self.time = None if config.time_features == "none" else TimeEncoding(config)

    def forward(self, tokens: Tensor, times: Tensor, first: Tensor) -> Tensor:
        x = self.token(tokens)
        return x if self.time is None else x + self.time(times, first)


class TorchModel(nn.Module):
    """Without dropout; weights are not drawn but loaded. With `recompute`, blocks keep no activations."""

    def __init__(self, config: ModelConfig, *, recompute: bool = False) -> None:
        super().__init__()
        self.config, self.recompute = config, recompute
        self.embedding = TimedEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.RMSNorm(config.embed_dim, config.norm_eps)
        self.head = None if config.tied_head else nn.Linear(config.embed_dim, config.vocabulary_size, bias=False)

    def forward(self, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """Mean loss in nats."""
        return self.token_loss(self.hidden(batch), batch, label_smoothing)

    def hidden(self, batch: Batch) -> Tensor:
        """What the heads read (B, T, C)."""
        first, context = self._context(batch)
        x = self.embedding(batch.tokens, batch.times, first)
        for block in self.blocks:
            # The additive mask of all heads, T × T, would not fit for every block.
            x = checkpoint(block, x, context, use_reentrant=False) if self.recompute else block(x, context)
        return self.final_norm(x)

    def token_loss(self, hidden: Tensor, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy of the next token in nats."""
        weight = self.embedding.token.weight if self.head is None else self.head.weight
        logits = F.linear(hidden, weight).flatten(0, 1)
        return F.cross_entropy(logits, batch.targets.flatten(), ignore_index=-1, label_smoothing=label_smoothing)

    def _context(self, batch: Batch) -> tuple[Tensor, Context]:
        config, length = self.config, batch.tokens.shape[1]
        index = torch.arange(length)
        first = (index == 0)[None]
        distance = index[:, None] - index
        visible = (distance >= 0)[None]
        if config.window is not None:
            visible = visible & (distance < config.window)
        if batch.document is not None:
            first = batch.document.diff(dim=1, prepend=batch.document[:, :1] - 1) != 0
            visible = visible & (batch.document[:, :, None] == batch.document[:, None])
        half = config.head_dim // 2
        # Only differences of positions matter to a rotation: the index in the row will do for every document.
        angle = index[:, None].double() * config.rope_base ** (-torch.arange(half).double() / half)
        mask = None
        if config.time_bias != "none" or config.window is not None or batch.document is not None:
            mask = torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)[:, None]
        age = (batch.times[:, :, None] - batch.times[:, None]).float().clamp_(min=0.0)[:, None]
        return first, Context(angle.cos().float()[:, None], angle.sin().float()[:, None], mask, age)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (B, T, H, D), pairs (j, j + D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def load_weights(model: TorchModel, ours: TransformerModel) -> None:
    """Copy our weights into the twin, by name; every name must be known to both."""
    model.load_state_dict({p.name: torch.from_numpy(np.array(p.value)) for p in ours.parameters})


def to_torch(packed: PackedTokens) -> Batch:
    """A packed batch of ours: one row per sequence if all are equally long, otherwise one row of all of them."""
    lengths = np.diff(packed.cu_seqlens)
    equal = len(set(lengths.tolist())) == 1
    shape = (len(lengths), -1) if equal else (1, -1)
    document = None if equal else torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).view(shape)
    tokens, times, targets = (
        torch.from_numpy(np.array(array)).view(shape) for array in (packed.tokens, packed.times, packed.targets)
    )
    return Batch(tokens.long(), times, targets.long(), document)


def padded(packed: PackedTokens) -> Batch:
    """A packed batch of ours as rows as long as the longest sequence; what is added has no target."""
    lengths = np.diff(packed.cu_seqlens)
    inside = np.arange(lengths.max()) < lengths[:, None]
    tokens, times, targets = (np.zeros(inside.shape, array.dtype) for array in (packed.tokens, packed.times, lengths))
    tokens[inside], times[inside], targets[...] = packed.tokens, packed.times, -1
    targets[inside] = packed.targets
    ends = packed.times[packed.cu_seqlens[1:] - 1]
    times = np.where(inside, times, ends[:, None])
    return Batch(torch.from_numpy(tokens).long(), torch.from_numpy(times), torch.from_numpy(targets).long(), None)


def make_optimizer(
    model: TorchModel, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW, fused, which decays matrices alone."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def training_step(
    model: TorchModel, optimizer: torch.optim.Optimizer, batch: Given, max_norm: float, *,
    loss: Callable[[Given], Tensor] | None = None, bfloat16: bool = False,
) -> float:  # fmt: skip
    """Forward, backward, clipping, update; the loss before it. `loss` is the model compiled, `bfloat16` autocast."""
    optimizer.zero_grad(set_to_none=True)
    compute = model if loss is None else loss
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        value = compute(batch)
    value.backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    before: float = value.item()
    return before

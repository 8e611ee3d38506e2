"""Operations of ttr_kernels as PyTorch's users write them, on the same cases: the peers of `benchmarks kernels`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, **bias: Any) -> Tensor:
    mask = None
    if bias:
        age = (bias["times"][:, :, None] - bias["key_times"][:, None]).float().clamp_(min=0.0)[:, None]
        visible = torch.ones(age.shape[-2:], dtype=torch.bool).tril_()
        hidden = torch.zeros(age.shape[-2:]).masked_fill_(~visible, -math.inf)
        rate, u = bias["rate"][:, None, None], age / bias["tau"][:, None, None]
        mask = torch.addcmul(hidden, rate, u.log1p() if bias["kind"] == "log" else u, value=-1.0)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=mask is None
    )
    return y.transpose(1, 2)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), targets)


def geglu(x: Tensor, approximate: str) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate=approximate) * value


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    return F.rms_norm(x if residual is None else x + residual, weight.shape, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    c, s = cos[:, None], sin[:, None]
    if interleaved:
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack((a * c - b * s, a * s + b * c), dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * c - b * s, a * s + b * c), dim=-1)


def time2vec(times: Tensor, frequency: Tensor, phase: Tensor) -> Tensor:
    angle = times[..., None] * frequency.double() + phase.double()
    return torch.cat((angle[..., :1], angle[..., 1:].sin()), dim=-1).float()


def embedding(indices: Tensor, table: Tensor) -> Tensor:
    return F.embedding(indices, table)


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        attention, cross_entropy, linear_cross_entropy, geglu, rms_norm, layer_norm, rope, time2vec, embedding,
        matmul,
    )
}  # fmt: skip

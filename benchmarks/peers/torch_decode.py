"""Decoding with a key/value cache in PyTorch: the peer of `benchmarks decode`, on the modules of torch_model.

Static buffers of the window's size, written in place at position mod window; one `scaled_dot_product_attention` over
all slots, with the time bias as its additive mask. In bfloat16, matrices, activations and buffers are; what times go
through, the angles and the mask stay float32, which SDPA reads as fast as one in bfloat16, within 3 %.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .torch_model import Attention, Time2Vec, TimeBias, TorchModel, rotate


class Decoder:
    """Decodes `batch` sequences at one position each, all the same.

    Args:
        model: with a window and a time bias.
        batch: number of sequences.
        bfloat16: whether the model, which is converted in place, is to decode in bfloat16.
    """

    def __init__(self, model: TorchModel, batch: int, *, bfloat16: bool = False) -> None:
        config = model.config
        assert config.window is not None
        if bfloat16:
            for module in model.modules():
                if not isinstance(module, Time2Vec | TimeBias):
                    for parameter in module.parameters(recurse=False):
                        parameter.data = parameter.data.bfloat16()
        self.dtype = torch.bfloat16 if bfloat16 else torch.float32
        self.model, self.window, self.position = model, config.window, 0
        shape = (config.num_layers, batch, config.kv_heads, self.window, config.head_dim)
        self.keys, self.values = torch.zeros((2, *shape), dtype=self.dtype)
        self.times = torch.zeros(batch, self.window, dtype=torch.float64)
        # −inf in slots that hold no position yet.
        self.mask = torch.full((1, 1, 1, self.window), -torch.inf)
        half = config.head_dim // 2
        self.frequency = config.rope_base ** (-torch.arange(half).double() / half)

    @torch.inference_mode()
    def step(self, tokens: Tensor, times: Tensor) -> Tensor:
        """tokens (B,) int64, times (B,) float64 -> logits (B, V) of what follows."""
        model, slot = self.model, self.position % self.window
        before = self.times[:, slot - 1] if self.position else times
        self.times[:, slot] = times
        self.mask[..., slot] = 0.0
        age = (times[:, None] - self.times).float().clamp_(min=0.0)[:, None, None]
        angle = self.position * self.frequency
        cos, sin = angle.cos().to(self.dtype), angle.sin().to(self.dtype)

        x = model.embedding.token(tokens)[:, None]
        if model.embedding.time is not None:
            first = torch.zeros(1, 2, dtype=torch.bool)
            x = x + model.embedding.time(torch.stack((before, times), dim=1), first)[:, 1:]
        for layer, block in enumerate(model.blocks):
            x = x + self._attend(layer, block.attention, block.attention_norm(x), slot, cos, sin, age)
            x = x + block.feed_forward(block.feed_forward_norm(x))
        self.position += 1
        weight = model.embedding.token.weight if model.head is None else model.head.weight
        return F.linear(model.final_norm(x[:, 0]), weight)

    def _attend(
        self, layer: int, attention: Attention, x: Tensor, slot: int, cos: Tensor, sin: Tensor, age: Tensor
    ) -> Tensor:
        heads, kv_heads = attention.heads, attention.kv_heads
        rows = attention.qkv(x).view(len(x), 1, heads + 2 * kv_heads, attention.dim)
        rotating, v = rows.split((heads + kv_heads, kv_heads), dim=2)
        q, k = rotate(rotating, cos, sin).split((heads, kv_heads), dim=2)
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, slot], values[:, :, slot] = k[:, 0], v[:, 0]
        mask = self.mask if attention.time_bias is None else attention.time_bias(age, self.mask)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=kv_heads != heads
        )
        return attention.output(y.transpose(1, 2).reshape(len(x), 1, -1))

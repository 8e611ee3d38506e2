"""The model of types and gaps in PyTorch, on padded batches: the peer of `benchmarks events`.

As it is usually written: sequences of a batch are padded to the longest of them, every layer computes the padding too,
and the loss leaves it out. Padding is on the right, so a causal mask already keeps it from what comes before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ttr_gpu.config import ModelConfig

from .torch_model import Batch, TorchModel


class EventBatch(NamedTuple):
    """A padded batch, and the gap from each position to the next, 1 where there is none."""

    batch: Batch
    gaps: Tensor  # (B, T) float64


class TimeHead(nn.Module):
    """Mixture of log-normals in the data's unit; see ttr_gpu.nn.time_head for the parametrisation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.components = config.time_components
        self.log_mean, self.log_std = config.time_log_mean, config.time_log_std
        self.log_floor = math.log(config.time_min_sigma)
        self.weight = nn.Parameter(torch.empty(3 * config.time_components, config.embed_dim))
        self.bias = nn.Parameter(torch.empty(3 * config.time_components))

    def forward(self, hidden: Tensor, gaps: Tensor, scored: Tensor) -> Tensor:
        """Mean −log p(gap) in nats over what is scored."""
        logits, means, scales = F.linear(hidden, self.weight, self.bias).chunk(3, dim=-1)
        log_sigma = torch.logaddexp(scales + math.log(self.log_std), torch.full_like(scales, self.log_floor))
        log_gaps = gaps.log()
        z = ((log_gaps - self.log_mean).float()[..., None] - means * self.log_std) * torch.exp(-log_sigma)
        joint = F.log_softmax(logits, dim=-1) - 0.5 * z * z - log_sigma - 0.5 * math.log(2 * math.pi)
        nll = log_gaps.float() - torch.logsumexp(joint, dim=-1)
        return nll[scored].mean()


class TorchEventModel(TorchModel):
    """Next type and the gap to it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.time_head = TimeHead(config)

    def forward(self, given: EventBatch) -> Tensor:  # type: ignore[override]
        """Mean loss of the type and of the gap, in nats."""
        hidden = self.hidden(given.batch)
        return self.token_loss(hidden, given.batch) + self.time_head(hidden, given.gaps, given.batch.targets >= 0)


def padded(tokens: Sequence[np.ndarray[Any, Any]], times: Sequence[np.ndarray[Any, Any]]) -> EventBatch:
    """Whole sequences, each at least two events, padded to the longest."""
    kinds = [torch.from_numpy(each.astype(np.int64)) for each in tokens]
    moments = [torch.from_numpy(each) for each in times]
    targets = pad_sequence([each[1:] for each in kinds], batch_first=True, padding_value=-1)
    gaps = pad_sequence([each.diff() for each in moments], batch_first=True, padding_value=1.0)
    inputs = pad_sequence([each[:-1] for each in kinds], batch_first=True)
    # Padding happens at the time of the last event: its gaps are zero.
    length = inputs.shape[1]
    at = torch.stack([F.pad(each[:-1], (0, length - len(each) + 1), value=float(each[-1])) for each in moments])
    return EventBatch(Batch(inputs, at, targets, None), gaps)

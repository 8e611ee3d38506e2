"""Layers: parameters with a forward and a written-out backward, built only on ttr_kernels.

Every layer has `forward(x, …) -> (y, saved)` and `backward(dy, saved) -> dx`, and lists its `parameters`. Arrays are
packed: `(total, C)` rows of all sequences end to end, with a `Sequences` that says where each begins and when each
position happened.
"""

from ..config import DropoutConfig
from .dropout import DropoutKey
from .feed_forward_geglu import FeedForwardGeGLU
from .multi_head_attention import MultiHeadAttention
from .parameter import Parameter
from .sequences import Sequences
from .time2vec import TimeEncoding
from .transformer_block import TransformerBlock

__all__ = [
    "DropoutConfig",
    "DropoutKey",
    "FeedForwardGeGLU",
    "MultiHeadAttention",
    "Parameter",
    "Sequences",
    "TimeEncoding",
    "TransformerBlock",
]

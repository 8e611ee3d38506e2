"""Layers: parameters with a forward and a written-out backward, built only on ttr_kernels.

Every layer has `forward(x, …) -> (y, saved)` and `backward(dy, saved) -> dx`, and lists its `parameters`. Arrays are
packed: `(total, C)` rows of all sequences end to end, with a `Sequences` that says where each begins and when each
position happened.
"""

from ..config import DropoutConfig
from .continuation import Continuation
from .dropout import DropoutKey
from .feed_forward_geglu import FeedForwardGeGLU
from .key_value_cache import KeyValueCache
from .linear_attention_cache import LinearAttentionCache
from .multi_head_attention import MultiHeadAttention
from .parameter import Parameter
from .sequences import Sequences
from .time2vec import TimeEncoding
from .transformer_block import TransformerBlock

__all__ = [
    "Continuation",
    "DropoutConfig",
    "DropoutKey",
    "FeedForwardGeGLU",
    "KeyValueCache",
    "LinearAttentionCache",
    "MultiHeadAttention",
    "Parameter",
    "Sequences",
    "TimeEncoding",
    "TransformerBlock",
]

"""One new position of a few sequences through a whole Transformer, in one compiled call per thread.

The formula is that of the operations it fuses, in the order of a pre-norm model: embedding plus the projected Time2Vec
features of time and gap; per block RMS norm, queries, keys and values, RoPE, a write to the ring, decode_attention, its
projection, RMS norm, GeGLU feed-forward, each half added to what entered it; a final norm and the head's logits. What
the operations compute one by one is its oracle (tests/ttr_gpu/test_decoding.py).

For a few rows these operations take microseconds each, less than it costs to call them: here threads share the units of
one phase after another without returning to Python (common.team), and each weight is read once. Activations are float32
from end to end. A sequence's result does not depend, to the bit, on what is beside it or on the number of threads.

On CPUs. Weights and rings may be float32, bfloat16 or float16.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..common.arrays import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INT32,
    INT64,
    Array,
    check,
    check_same_dtype,
    kernel_view,
)

# Columns of `FusedStep.blocks` and entries of `FusedStep.model`: where each weight begins.
BLOCK_WEIGHTS = ("attention_norm", "qkv", "output", "feed_forward_norm", "up", "down")
MODEL_WEIGHTS = (
    "table", "absolute.frequency", "absolute.phase", "gap.frequency", "gap.phase", "project", "final_norm", "head",
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """Sizes and constants of the model.

    Attributes:
        embed_dim: C; hidden_dim: F; heads: H; kv_heads: H_kv; dim: D, even; blocks: L; vocabulary: V.
        features: Time2Vec features of each kind; kinds: "none", "absolute", "gap" or "both".
        time_bias: "none", "linear" or "log".
        time_scale, time_span: what gaps and times are divided by before Time2Vec.
        rope_base, norm_eps: see `rope_cos_sin` and `rms_norm_forward`.
    """

    embed_dim: int
    hidden_dim: int
    heads: int
    kv_heads: int
    dim: int
    blocks: int
    vocabulary: int
    features: int
    kinds: str
    time_bias: str
    time_scale: float
    time_span: float
    rope_base: float
    norm_eps: float


class FusedStep:
    """The step of one model over its rings.

    Args:
        shape: the architecture.
        vectors: 1-D float32, holds the embedding's table, norms, frequencies and phases.
        matrices: 1-D float32, bfloat16 or float16, holds the matrices, each row-major as `linear` takes them (qkv with
            queries, keys and values in this order; up with gate and value).
        model: where each of MODEL_WEIGHTS begins in its array, by name; kinds of features that there are not are left
            out.
        blocks: one such dictionary of BLOCK_WEIGHTS per block.
        keys, values: (L, R, capacity, H_kv, D) rings in the dtype of the matrices; times (L, R, capacity) float64.
        span: newest positions that attention sees, at most the capacity.
        rows: sequences of a step, at most.

    The arrays are read and written in place, call by call: they must stay where they are.

    Raises:
        TypeError, ValueError: an array of another kind, dtype or shape.
    """

    def __init__(
        self, shape: Architecture, vectors: Array, matrices: Array, model: dict[str, int],
        blocks: list[dict[str, int]], keys: Array, values: Array, times: Array, *, span: int, rows: int = 256,
    ) -> None:  # fmt: skip
        from .cpu import Workspace

        check(
            vectors=(vectors, "n", [FLOAT32]), matrices=(matrices, "m", [FLOAT32, BFLOAT16, FLOAT16]),
            keys=(keys, "L R capacity H_kv D"), values=(values, "L R capacity H_kv D"),
            times=(times, "L R capacity", [FLOAT64]),
        )  # fmt: skip
        check_same_dtype(matrices=matrices, keys=keys, values=values)
        expected = (shape.blocks, *keys.shape[1:3], shape.kv_heads, shape.dim)
        if keys.shape != expected:
            raise ValueError(f"keys: got shape {keys.shape}, expected {expected}")
        for name, array in (("matrices", matrices), ("keys", keys), ("values", values), ("times", times)):
            if not isinstance(array, np.ndarray) or not array.flags.c_contiguous:
                raise ValueError(f"{name}: expected a C-contiguous NumPy array, since it is used where it lies")
        self.shape, self.rows, self.span, self.capacity = shape, rows, span, keys.shape[2]
        self.vectors, self.matrices = vectors, kernel_view(matrices)
        self.model = np.array([model.get(name, 0) for name in MODEL_WEIGHTS], np.int64)
        self.blocks = np.array([[block[name] for name in BLOCK_WEIGHTS] for block in blocks], np.int64)
        layers = shape.blocks
        self.keys, self.values = kernel_view(keys).reshape(layers, -1), kernel_view(values).reshape(layers, -1)
        self.times = times.reshape(layers, -1)
        self._workspace = Workspace(self)

    def __call__(
        self, tokens: Array, times: Array, gaps: Array, positions: Array, rings: Array, rate: Array, tau: Array, *,
        logits: bool = True,
    ) -> tuple[Array, Array]:  # fmt: skip
        """One position of each sequence; its keys, values and times are written to the rings.

        Args:
            tokens: (B,) int32, below V; times, gaps: (B,) float64; positions: (B,) int64, of the new position, from 0;
                rings: (B,) int64, different from each other. Checked by the caller, who knows the sequences.
            rate, tau: (L, H) float32 of the time bias; anything where there is none.
            logits: whether they are wanted.

        Returns:
            The last block's output (B, C) and the logits (B, V), or (B, 0) where none are wanted; new arrays, float32.
        """
        from .cpu import step

        batch = len(tokens)
        if not 1 <= batch <= self.rows:
            raise ValueError(f"tokens: got {batch}, expected 1 .. {self.rows}, the rows this step was made for")
        check(
            tokens=(tokens, "B", [INT32]), times=(times, "B", [FLOAT64]), gaps=(gaps, "B", [FLOAT64]),
            positions=(positions, "B", [INT64]), rings=(rings, "B", [INT64]), rate=(rate, "L H", [FLOAT32]),
            tau=(tau, "L H", [FLOAT32]),
        )  # fmt: skip
        out = np.empty((batch, self.shape.vocabulary if logits else 0), np.float32)
        x = step(self, self._workspace, tokens, times, gaps, positions, rings, rate, tau, out)
        return x, out

"""The fused step on CPU cores: memory that is made once, and one call per thread."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..attention.cpu_tile import LINEAR, LOG, NO_BIAS
from ..common.arrays import Array
from ..common.parallel import get_threads, parallel_for
from ..common.team import new_control
from ..decode_attention.cpu_pieces import KEYS
from .cpu_phases import PHASES_OF_A_BLOCK, Sizes, step_phases

if TYPE_CHECKING:
    from . import FusedStep

_BIASES = {"none": NO_BIAS, "linear": LINEAR, "log": LOG}


class Workspace:
    """What a step writes to on its way, for at most `fused.rows` sequences."""

    def __init__(self, fused: FusedStep) -> None:
        shape, rows = fused.shape, fused.rows
        width, pieces = shape.heads * shape.dim, _pieces(fused.span)
        self.x = np.empty(rows * shape.embed_dim, np.float32)
        self.queries = np.empty(rows * width, np.float32)
        self.hidden = np.empty(rows * shape.hidden_dim, np.float32)
        self.partial = np.empty(rows * pieces * width, np.float32)
        self.statistics = np.empty((2, rows * pieces * shape.heads), np.float32)
        self.control = new_control(2 + PHASES_OF_A_BLOCK * shape.blocks)


def _pieces(span: int) -> int:
    # One more than the keys fill: the newest positions may go around the end of the ring.
    return -(-span // KEYS) + 1


def step(
    fused: FusedStep, workspace: Workspace, tokens: Array, times: Array, gaps: Array, positions: Array, rings: Array,
    rate: Array, tau: Array, logits: Array,
) -> Array:  # fmt: skip
    shape = fused.shape
    sizes = Sizes(
        len(tokens), _pieces(min(fused.span, int(positions.max()) + 1)), shape.embed_dim, shape.hidden_dim, shape.heads,
        shape.kv_heads, shape.dim, shape.blocks, logits.shape[1], shape.features, shape.kinds in ("absolute", "both"),
        shape.kinds in ("gap", "both"), fused.capacity, fused.span, _BIASES[shape.time_bias], shape.time_scale,
        max(shape.time_span, shape.time_scale), shape.rope_base, np.float32(shape.norm_eps),
    )  # fmt: skip
    workspace.control.fill(0)
    # Ranges only tell how many threads take part: units are handed out inside.
    parallel_for(
        step_phases, get_threads(), sizes, fused.model, fused.blocks, fused.vectors, fused.matrices, fused.keys,
        fused.values, fused.times, tokens, times, gaps, positions, rings, rate, tau, workspace.x, workspace.queries,
        workspace.hidden, workspace.partial, workspace.statistics, workspace.control.reshape(-1), logits.reshape(-1),
    )  # fmt: skip
    size = len(tokens) * shape.embed_dim
    return workspace.x[:size].reshape(len(tokens), -1).copy()

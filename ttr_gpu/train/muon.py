"""Muon: momentum, made orthogonal, for the matrices between activations (Jordan et al. 2024, *Muon: An optimizer for
hidden layers in neural networks*, https://kellerjordan.github.io/posts/muon/).

m ← β m + (1 − β) g        u = β m + (1 − β) g                                  (Nesterov's momentum)
X ← u / ‖u‖, then five times  A = X Xᵀ,  X ← a X + (b A + c A²) X               (Newton–Schulz, a quintic)
W ← W − lr · (0.2 √max(rows, columns) · X + weight_decay · W)

The iteration takes all singular values of X to about 1 in matrix products alone. The factor before X (Liu et al. 2025,
*Muon is Scalable for LLM Training*, §2.2) gives a step the size of AdamW's, so that one learning rate and one decay
serve both.
"""

from __future__ import annotations

import math

from ttr_kernels.common.arrays import Array, array_module, empty
from ttr_kernels.matmul import matmul

from ..model import TransformerModel
from ..nn.parameter import Parameter

# The quintic of the source: steep at 0, so that small singular values grow fast; values end within about 0.7 .. 1.2.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5


def muon(
    parameter: Array, gradient: Array, momentum: Array, *, learning_rate: float, beta: float, weight_decay: float,
    gradient_scale: float = 1.0,
) -> None:  # fmt: skip
    """One update of one matrix, in place.

    Args:
        parameter, momentum: (rows, columns) float32; changed.
        gradient: likewise; multiplied by `gradient_scale`.
    """
    number, xp = parameter.dtype.type, array_module(parameter)
    share, mixed = (empty(parameter.shape, parameter.dtype, parameter) for _ in range(2))
    xp.multiply(gradient, number((1.0 - beta) * gradient_scale), out=share)
    momentum *= number(beta)
    momentum += share
    xp.multiply(momentum, number(beta), out=mixed)
    mixed += share
    direction = orthogonal(mixed)
    direction *= number(learning_rate * 0.2 * math.sqrt(max(parameter.shape)))
    parameter *= number(1.0 - learning_rate * weight_decay)
    parameter -= direction


def orthogonal(matrix: Array) -> Array:
    """About U Vᵀ of the singular value decomposition U S Vᵀ of a matrix (rows, columns)."""
    number, xp = matrix.dtype.type, array_module(matrix)
    scaled = empty(matrix.shape, matrix.dtype, matrix)
    norm = xp.sqrt(xp.multiply(matrix, matrix, out=scaled).sum())
    xp.divide(matrix, norm + number(1e-7), out=scaled)
    x: Array = scaled.T if matrix.shape[0] > matrix.shape[1] else scaled
    for _ in range(_ITERATIONS):
        a = matmul(x, x.T)
        square = matmul(a, a)
        a *= number(_B)
        square *= number(_C)
        a += square
        product = matmul(a, x)
        x *= number(_A)
        product += x
        x = product
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def hidden_matrices(model: TransformerModel) -> list[tuple[Parameter, list[slice]]]:
    """The matrices that Muon is for, and the rows of what each holds one above the other: queries, keys and values, or
    gate and value. Embedding, time features and head are no maps between activations; they stay with AdamW."""
    found = []
    for block in model.blocks:
        attention, feed_forward = block.attention, block.feed_forward
        queries, keys = attention.heads * attention.dim, attention.kv_heads * attention.dim
        hidden = feed_forward.down.value.shape[1]
        found += [
            (attention.qkv, [slice(0, queries), slice(queries, queries + keys), slice(queries + keys, None)]),
            (attention.output, [slice(None)]),
            (feed_forward.up, [slice(0, hidden), slice(hidden, None)]),
            (feed_forward.down, [slice(None)]),
        ]
    return found

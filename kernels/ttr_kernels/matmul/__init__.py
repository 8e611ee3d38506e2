"""Matrix products, and the linear layer built on them:  y = x Wᵀ + b."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.arrays import (
    FLOAT32,
    FLOAT64,
    Array,
    check,
    check_out,
    check_parameter,
    check_parameter_gradient,
    check_same_dtype,
    implementation,
    takes_cuda_arrays,
)


@dataclass(frozen=True)
class LinearSaved:
    """What the forward keeps for the backward."""

    x: Array  # (..., C_in)
    weight: Array  # (C_out, C_in)
    has_bias: bool


@takes_cuda_arrays
def matmul(a: Array, b: Array, *, out: Array | None = None, accumulate: bool = False) -> Array:
    """out = a b, or out += a b.

    Products of 16-bit floats are summed in float32 and rounded once, when they are stored.

    Args:
        a: (M, K) float32, bfloat16, float16 or float64. Transposed views and row slices are read without a copy.
        b: (K, N), of the same dtype.
        out: (M, N) of the dtype of a, or float32 for 16-bit operands. Must not overlap a or b.
        accumulate: add to out, which must be given.

    Raises:
        TypeError, ValueError: an array of the wrong kind, shape or dtype; the message names the argument.
    """
    sizes = check(a=(a, "M K"), b=(b, "K N"))
    dtype = check_same_dtype(a=a, b=b)
    if out is None and accumulate:
        raise ValueError("out: got None, expected an array to accumulate into")
    shape = sizes["M"], sizes["N"]
    mixed = out is not None and out.dtype == FLOAT32 and dtype != FLOAT64
    out = check_out("out", out, shape, FLOAT32 if mixed else dtype, a)
    implementation(a, __package__).product(a, b, out, accumulate)
    return out


@takes_cuda_arrays
def linear_forward(
    x: Array, weight: Array, bias: Array | None = None, *, out: Array | None = None
) -> tuple[Array, LinearSaved]:
    """y = x Wᵀ + b over the last dimension.

    Args:
        x: (..., C_in) float32, bfloat16 or float16 (float64 runs the reference). Copied if rows are not contiguous.
        weight: (C_out, C_in), of the dtype of x, or float32.
        bias: (C_out,) float32, or of the dtype of x.
        out: (..., C_out) like x.

    Raises:
        TypeError, ValueError: an array of the wrong kind, shape or dtype; the message names the argument.
    """
    sizes = check(x=(x, "... C_in"), weight=(weight, "C_out C_in"), bias=(bias, "C_out"))
    check_parameter("weight", weight, x.dtype)
    if bias is not None:
        check_parameter("bias", bias, x.dtype)
    out = check_out("out", out, (*x.shape[:-1], sizes["C_out"]), x.dtype, x)
    implementation(x, __package__).forward(x, weight, bias, out)
    return out, LinearSaved(x, weight, bias is not None)


def linear(x: Array, weight: Array, bias: Array | None = None, *, out: Array | None = None) -> Array:
    """`linear_forward` with nothing saved."""
    return linear_forward(x, weight, bias, out=out)[0]


@takes_cuda_arrays
def linear_backward(
    dy: Array,
    saved: LinearSaved,
    *,
    dx: Array | None = None,
    dweight: Array | None = None,
    dbias: Array | None = None,
    accumulate: bool = True,
) -> tuple[Array, Array, Array | None]:
    """Gradients of `linear_forward`:  dx = dy W    dW += dyᵀ x    db += Σ_rows dy.

    Args:
        dy: (..., C_out).
        saved: from the forward.
        dx: like x, is *written*; must not overlap dy.
        dweight, dbias: float32 (float64 for the reference), are *accumulated* into; zeros if not given.
        accumulate: False *writes* dweight and dbias, whatever they hold: a first gradient needs no zeros.

    Returns:
        (dx, dweight, dbias or None)
    """
    check(dy=(dy, "... C_out"))
    check_same_dtype(x=saved.x, dy=dy)
    expected = (*saved.x.shape[:-1], saved.weight.shape[0])
    if dy.shape != expected:
        raise ValueError(f"dy: got shape {dy.shape}, expected {expected} like y")
    dx = check_out("dx", dx, saved.x.shape, dy.dtype, dy)
    dweight = check_parameter_gradient("dweight", dweight, saved.weight.shape, dy.dtype, dy)
    if saved.has_bias:
        dbias = check_parameter_gradient("dbias", dbias, (saved.weight.shape[0],), dy.dtype, dy)
    implementation(dy, __package__).backward(dy, saved, dx, dweight, dbias if saved.has_bias else None, accumulate)
    return dx, dweight, dbias if saved.has_bias else None

"""Root-mean-square normalisation (Zhang & Sennrich 2019, eq. 4):  y = x / sqrt(mean(x²) + eps) · weight."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.arrays import (
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
class RmsNormSaved:
    """What the forward keeps for the backward."""

    x: Array  # (..., C): the input, or the sum of input and residual
    weight: Array  # (C,)
    inverse_rms: Array  # (rows,) float32: 1 / sqrt(mean(x²) + eps)


@takes_cuda_arrays
def rms_norm_forward(
    x: Array,
    weight: Array,
    *,
    residual: Array | None = None,
    eps: float = 1e-6,
    out: Array | None = None,
    sum_out: Array | None = None,
) -> tuple[Array, RmsNormSaved]:
    """y = s / sqrt(mean(s²) + eps) · weight, where s = x + residual (or x); mean over the last dimension.

    Args:
        x: (..., C) float32, bfloat16 or float16 (float64 runs the reference). Copied if its rows are not contiguous.
        weight: (C,) float32, or the dtype of x.
        residual: like x; the sum is then computed in the same pass and is `saved.x`.
        eps: added to the mean square.
        out: like x, receives y; may be x itself when there is a residual.
        sum_out: like x, receives x + residual; may be x or residual.

    Returns:
        (y, saved); `saved.x` is the sum, the new residual stream.

    Raises:
        TypeError, ValueError: an array of the wrong kind, shape or dtype; the message names the argument.
    """
    check(x=(x, "... C"), weight=(weight, "C"), residual=(residual, "... C"))
    dtype = check_same_dtype(x=x, residual=residual)
    check_parameter("weight", weight, dtype)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual: got shape {residual.shape}, expected {x.shape} like x")
    out = check_out("out", out, x.shape, dtype, x)
    if residual is not None:
        sum_out = check_out("sum_out", sum_out, x.shape, dtype, x)
    inverse_rms = implementation(x, __package__).forward(x, weight, residual, eps, out, sum_out)
    return out, RmsNormSaved(x if sum_out is None else sum_out, weight, inverse_rms)


def rms_norm(x: Array, weight: Array, *, eps: float = 1e-6, out: Array | None = None) -> Array:
    """`rms_norm_forward` without a residual and with nothing saved."""
    return rms_norm_forward(x, weight, eps=eps, out=out)[0]


@takes_cuda_arrays
def rms_norm_backward(
    dy: Array,
    saved: RmsNormSaved,
    *,
    dsum: Array | None = None,
    dx: Array | None = None,
    dweight: Array | None = None,
) -> tuple[Array, Array]:
    """Gradients of `rms_norm_forward`, with r = inverse_rms and n = s·r:

        dx = r · (dy·weight − n · mean(dy·weight·n)) + dsum        dweight += Σ_rows dy·n

    Args:
        dy: (..., C), the gradient of y.
        saved: from the forward.
        dsum: like dy, the gradient that reaches the sum `saved.x` along the residual path; added in the same pass.
        dx: like dy, is *written*: the gradient of x, and of residual where there was one. May be dy or dsum.
        dweight: (C,) float32 (float64 for the reference), is *accumulated* into; zeros if not given.

    Returns:
        (dx, dweight)
    """
    check(dy=(dy, "... C"), dsum=(dsum, "... C"), dweight=(dweight, "C"))
    dtype = check_same_dtype(x=saved.x, dy=dy, dsum=dsum)
    for name, array in (("dy", dy), ("dsum", dsum)):
        if array is not None and array.shape != saved.x.shape:
            raise ValueError(f"{name}: got shape {array.shape}, expected {saved.x.shape} like x")
    dx = check_out("dx", dx, dy.shape, dtype, dy)
    dweight = check_parameter_gradient("dweight", dweight, saved.weight.shape, dtype, dy)
    implementation(dy, __package__).backward(dy, saved, dsum, dx, dweight)
    return dx, dweight

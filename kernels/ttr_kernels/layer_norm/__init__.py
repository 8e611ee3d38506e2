"""Layer normalisation (Ba et al. 2016, eq. 4):  y = (x − mean) / sqrt(var + eps) · weight + bias."""

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
class LayerNormSaved:
    """What the forward keeps for the backward."""

    x: Array  # (..., C): the input, or the sum of input and residual
    weight: Array  # (C,)
    has_bias: bool
    mean: Array  # (rows,) float32
    inverse_deviation: Array  # (rows,) float32: 1 / sqrt(var + eps)


@takes_cuda_arrays
def layer_norm_forward(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    residual: Array | None = None,
    eps: float = 1e-5,
    out: Array | None = None,
    sum_out: Array | None = None,
) -> tuple[Array, LayerNormSaved]:
    """y = (s − mean(s)) / sqrt(var(s) + eps) · weight + bias, where s = x + residual (or x), over the last dimension.

    Args:
        x: (..., C) float32, bfloat16 or float16 (float64 runs the reference). Copied if its rows are not contiguous.
        weight, bias: (C,) float32, or the dtype of x.
        residual: like x; the sum is then computed in the same pass and is `saved.x`.
        eps: added to the variance (the mean of squared deviations).
        out: like x, receives y; may be x itself when there is a residual.
        sum_out: like x, receives x + residual; may be x or residual.

    Returns:
        (y, saved); `saved.x` is the sum, the new residual stream.

    Raises:
        TypeError, ValueError: an array of the wrong kind, shape or dtype; the message names the argument.
    """
    check(x=(x, "... C"), weight=(weight, "C"), bias=(bias, "C"), residual=(residual, "... C"))
    dtype = check_same_dtype(x=x, residual=residual)
    check_parameter("weight", weight, dtype)
    if bias is not None:
        check_parameter("bias", bias, dtype)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual: got shape {residual.shape}, expected {x.shape} like x")
    out = check_out("out", out, x.shape, dtype, x)
    if residual is not None:
        sum_out = check_out("sum_out", sum_out, x.shape, dtype, x)
    mean, inverse = implementation(x, __package__).forward(x, weight, bias, residual, eps, out, sum_out)
    return out, LayerNormSaved(
        x if residual is None or sum_out is None else sum_out, weight, bias is not None, mean, inverse
    )


def layer_norm(
    x: Array, weight: Array, bias: Array | None = None, *, eps: float = 1e-5, out: Array | None = None
) -> Array:
    """`layer_norm_forward` without a residual and with nothing saved."""
    return layer_norm_forward(x, weight, bias, eps=eps, out=out)[0]


@takes_cuda_arrays
def layer_norm_backward(
    dy: Array,
    saved: LayerNormSaved,
    *,
    dsum: Array | None = None,
    dx: Array | None = None,
    dweight: Array | None = None,
    dbias: Array | None = None,
) -> tuple[Array, Array, Array | None]:
    """Gradients of `layer_norm_forward`, with r = inverse_deviation, n = (s − mean) · r and g = dy · weight:

        dx = r · (g − mean(g) − n · mean(g·n)) + dsum    dweight += Σ_rows dy·n    dbias += Σ_rows dy

    Args:
        dy: (..., C), the gradient of y.
        saved: from the forward.
        dsum: like dy, the gradient that reaches the sum `saved.x` along the residual path; added in the same pass.
        dx: like dy, is *written*: the gradient of x, and of residual where there was one. May be dy or dsum.
        dweight, dbias: (C,) float32 (float64 for the reference), are *accumulated* into; zeros if not given.

    Returns:
        (dx, dweight, dbias or None)
    """
    check(dy=(dy, "... C"), dsum=(dsum, "... C"))
    dtype = check_same_dtype(x=saved.x, dy=dy, dsum=dsum)
    for name, array in (("dy", dy), ("dsum", dsum)):
        if array is not None and array.shape != saved.x.shape:
            raise ValueError(f"{name}: got shape {array.shape}, expected {saved.x.shape} like x")
    dx = check_out("dx", dx, dy.shape, dtype, dy)
    dweight = check_parameter_gradient("dweight", dweight, saved.weight.shape, dtype, dy)
    dbias = check_parameter_gradient("dbias", dbias, saved.weight.shape, dtype, dy) if saved.has_bias else None
    implementation(dy, __package__).backward(dy, saved, dsum, dx, dweight, dbias)
    return dx, dweight, dbias

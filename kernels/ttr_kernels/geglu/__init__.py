"""GeGLU (Shazeer 2020, *GLU variants improve Transformer*, eq. 6):  y = gelu(gate) · value.

gelu(x) = x Φ(x) (Hendrycks & Gimpel 2016), exactly through erf or by their tanh formula
½ x (1 + tanh(√(2/π) (x + 0.044715 x³))).
"""

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
class GegluSaved:
    """What the forward keeps for the backward: its input alone; the rest is computed again."""

    x: Array  # (..., 2F)
    bias: Array | None  # (2F,)
    approximate: str


@takes_cuda_arrays
def geglu_forward(
    x: Array, bias: Array | None = None, *, approximate: str = "tanh", out: Array | None = None
) -> tuple[Array, GegluSaved]:
    """y = gelu(x[..., :F] + bias[:F]) · (x[..., F:] + bias[F:]).

    Args:
        x: (..., 2F), gate and value side by side, as one matrix product makes them. float32, bfloat16 or float16
            (float64 runs the reference).
        bias: (2F,) float32, or of the dtype of x.
        approximate: "tanh" or "none" (erf), as in torch.nn.functional.gelu.
        out: (..., F) like x.

    Raises:
        TypeError, ValueError: an array of the wrong kind, shape or dtype; the message names the argument.
    """
    check(x=(x, "... 2F"), bias=(bias, "2F"))
    if x.shape[-1] % 2:
        raise ValueError(f"x: got {x.shape[-1]} features, expected an even number (gate and value)")
    if bias is not None:
        check_parameter("bias", bias, x.dtype)
    if approximate not in ("tanh", "none"):
        raise ValueError(f"approximate: got {approximate!r}, expected 'tanh' or 'none'")
    out = check_out("out", out, (*x.shape[:-1], x.shape[-1] // 2), x.dtype, x)
    implementation(x, __package__).forward(x, bias, approximate, out)
    return out, GegluSaved(x, bias, approximate)


def geglu(x: Array, bias: Array | None = None, *, approximate: str = "tanh", out: Array | None = None) -> Array:
    """`geglu_forward` with nothing saved."""
    return geglu_forward(x, bias, approximate=approximate, out=out)[0]


@takes_cuda_arrays
def geglu_backward(
    dy: Array, saved: GegluSaved, *, dx: Array | None = None, dbias: Array | None = None
) -> tuple[Array, Array | None]:
    """Gradients:  dgate = dy · value · gelu'(gate)    dvalue = dy · gelu(gate)    dbias += Σ_rows (dgate, dvalue).

    Args:
        dy: (..., F).
        saved: from the forward.
        dx: like x, is *written*; may be `saved.x`, which is then gone.
        dbias: (2F,) float32 (float64 for the reference), is *accumulated* into; zeros if not given.

    Returns:
        (dx, dbias or None)
    """
    check(dy=(dy, "... F"))
    dtype = check_same_dtype(x=saved.x, dy=dy)
    expected = (*saved.x.shape[:-1], saved.x.shape[-1] // 2)
    if dy.shape != expected:
        raise ValueError(f"dy: got shape {dy.shape}, expected {expected} like y")
    dx = check_out("dx", dx, saved.x.shape, dtype, dy)
    if saved.bias is not None:
        dbias = check_parameter_gradient("dbias", dbias, saved.bias.shape, dtype, dy)
    implementation(dy, __package__).backward(dy, saved, dx, None if saved.bias is None else dbias)
    return dx, None if saved.bias is None else dbias

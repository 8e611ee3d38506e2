"""exp, log, sin and cos of float32 in plain arithmetic, so that loops which call them become vector code.

numba without SVML turns `math.exp` into one library call per element. These have no branches (selections only) and no
calls; each is within 2 units in the last place over the range its docstring states (tests/kernels/common). Coefficients
come from scripts/fit_vector_math.py; the ways of reducing the argument are the classic ones (Cody & Waite 1980,
*Software Manual for the Elementary Functions*).

For compiled kernels; called from Python they take and return one float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .compilation import jit_exact
from .storage import bits_to_float32

_f = np.float32

LOG2_E = _f(1.4426950408889634)
LN2 = _f(0.6931471805599453)
# ln 2 in two parts: the first has few enough bits that n * LN2_HIGH is exact.
LN2_HIGH = _f(0.693145751953125)
LN2_LOW = _f(1.42860677e-06)
ONE = _f(1.0)
HALF = _f(0.5)


def _rounding_intrinsic(result: Any, bits: int, float_type: Any) -> Any:
    def typing(context: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            llvm_float = context.get_value_type(float_type)
            function = builder.module.declare_intrinsic("llvm.rint", [llvm_float])
            return builder.fptosi(builder.call(function, arguments), ir.IntType(bits))

        return result(float_type), generate

    return typing


@intrinsic
def round_to_int32(context: Any, value: Any) -> Any:
    """The nearest int32 of a float32, ties to even."""
    return _rounding_intrinsic(types.int32, 32, types.float32)(context, value)


@intrinsic
def round_to_int64(context: Any, value: Any) -> Any:
    """The nearest int64 of a float64, ties to even."""
    return _rounding_intrinsic(types.int64, 64, types.float64)(context, value)


@jit_exact
def exp(x: Any) -> Any:
    """e^x for x in [-87.3, 88.7]; 0 below, infinity above, NaN for NaN."""
    bounded = _f(-87.33654) if x < _f(-87.33654) else x
    bounded = _f(88.72283) if bounded > _f(88.72283) else bounded
    n = round_to_int32(bounded * LOG2_E)
    k = _f(n)
    r = (bounded - k * LN2_HIGH) - k * LN2_LOW
    p = _f(1.3814613307e-03)
    p = p * r + _f(8.3687099879e-03)
    p = p * r + _f(4.1668387373e-02)
    p = p * r + _f(1.6666520688e-01)
    p = p * r + _f(4.9999993452e-01)
    p = p * r * r + r + ONE
    # 2^n in two factors, since n reaches 128 where one factor would overflow.
    half = n >> np.int32(1)
    rest = n - half
    scaled = p * bits_to_float32((half + np.int32(127)) << np.int32(23))
    scaled = scaled * bits_to_float32((rest + np.int32(127)) << np.int32(23))
    scaled = _f(0.0) if x < _f(-87.33654) else scaled
    return _f(np.inf) if x > _f(88.72283) else scaled


@jit_exact
def exp_of_nonpositive(x: Any) -> Any:
    """e^x for x <= 0, 0 below -87.3: the exponential of a softmax, with half the selections of `exp`."""
    bounded = _f(-87.33654) if x < _f(-87.33654) else x
    n = round_to_int32(bounded * LOG2_E)
    k = _f(n)
    r = (bounded - k * LN2_HIGH) - k * LN2_LOW
    p = _f(1.3814613307e-03)
    p = p * r + _f(8.3687099879e-03)
    p = p * r + _f(4.1668387373e-02)
    p = p * r + _f(1.6666520688e-01)
    p = p * r + _f(4.9999993452e-01)
    p = p * r * r + r + ONE
    scaled = p * bits_to_float32((n + np.int32(127)) << np.int32(23))
    return _f(0.0) if x < _f(-87.33654) else scaled


@intrinsic
def _exponent_and_mantissa(context: Any, x: Any) -> Any:
    """(e, m) as float32 with x = 2^e m, m in [√½, √2). In 32 bits throughout: numba's own integers widen to 64, which
    halves the lanes of a vector."""
    pair = types.UniTuple(types.float32, 2)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word, floating = ir.IntType(32), ir.FloatType()
        root_half = word(0x3F3504F3)
        shifted = builder.sub(builder.bitcast(arguments[0], word), root_half)
        exponent = builder.sitofp(builder.ashr(shifted, word(23)), floating)
        mantissa = builder.bitcast(builder.add(builder.and_(shifted, word(0x007FFFFF)), root_half), floating)
        return context.make_tuple(builder, signature.return_type, [exponent, mantissa])

    return pair(types.float32), generate


@jit_exact
def _log_plus(x: Any, small: Any) -> Any:
    # ln x + small, for normal x > 0, with the mantissa centred on 1.
    k, m = _exponent_and_mantissa(x)
    f = m - ONE
    # Pairs of coefficients side by side (Estrin 1960): where a loop's body is long, its longest chain sets the pace.
    f2 = f * f
    f4 = f2 * f2
    low = (_f(-1.6667995897e-01) * f + _f(2.0002118679e-01)) * f2 + (_f(-2.5000009599e-01) * f + _f(3.3333312604e-01))
    high = (_f(-1.1675660116e-01) * f + _f(1.1888164521e-01)) * f2 + (_f(-1.2405587804e-01) * f + _f(1.4219551938e-01))
    p = (_f(6.7466456119e-02) * f4 + high) * f4 + low
    tail = p * (f2 * f) + (k * LN2_LOW + small)
    tail = tail - HALF * f2
    return k * LN2_HIGH + (tail + f)


@jit_exact
def log(x: Any) -> Any:
    """ln x for normal x > 0; -infinity for 0 and subnormal numbers, NaN for negative ones and NaN."""
    y = _log_plus(x, _f(0.0))
    y = _f(-np.inf) if x < _f(1.1754944e-38) else y
    y = _f(np.inf) if x == _f(np.inf) else y
    return y if x >= _f(0.0) else _f(np.nan)


@jit_exact
def log1p_of_nonnegative(u: Any) -> Any:
    """ln(1 + u) for u >= 0."""
    return log1p_and_reciprocal(u)[0]


@jit_exact
def log1p_and_reciprocal(u: Any) -> Any:
    """(ln(1 + u), 1 / (1 + u)) for u >= 0, of one division."""
    w = ONE + u
    reciprocal = ONE / w
    # What rounding 1 + u lost; beyond 2^24 it no longer matters (and w - 1 would not be exact).
    lost = (u - (w - ONE)) * reciprocal if u < _f(16777216.0) else _f(0.0)
    y = _log_plus(w, lost)
    # Infinity and NaN stay what they are.
    return (y if u < _f(np.inf) else u), reciprocal


@jit_exact
def sincos_of_phase(phase: Any) -> Any:
    """(sin, cos) as float32 of a float64 phase in radians, |phase| < 1e12: reduced in float64, evaluated in float32.

    The absolute error is 2^-23 plus that of the float64 phase itself.
    """
    quarter = round_to_int64(phase * 0.6366197723675814)
    k = np.float64(quarter)
    # π/2 in two float64 parts.
    r = _f((phase - k * 1.5707963267948966) - k * 6.123233995736766e-17)
    s = r * r
    p = _f(2.7181215489e-06)
    p = p * s + _f(-1.9839312261e-04)
    p = p * s + _f(8.3333293048e-03)
    p = p * s + _f(-1.6666666641e-01)
    sine = p * s * r + r
    c = _f(2.4433156243e-05)
    c = c * s + _f(-1.3887316247e-03)
    c = c * s + _f(4.1666645683e-02)
    cosine = c * s * s + (ONE - HALF * s)
    swap = (quarter & 1) != 0
    sin_value = cosine if swap else sine
    cos_value = sine if swap else cosine
    sin_value = -sin_value if (quarter & 2) != 0 else sin_value
    cos_value = -cos_value if ((quarter + 1) & 2) != 0 else cos_value
    return sin_value, cos_value

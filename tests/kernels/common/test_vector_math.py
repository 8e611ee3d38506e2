"""The mathematics of vector_math.py: two units in the last place, special values, and loops that become vector code."""

import math
import platform
import re

import llvmlite.binding
import numba
import numpy as np
import pytest
from numpy import float32 as f

from ttr_kernels.attention.cpu_forward import _softmax_row
from ttr_kernels.common import vector_math
from ttr_kernels.common.arrays import BFLOAT16, FLOAT16, FLOAT32, kernel_view
from ttr_kernels.common.compilation import jit
from ttr_kernels.geglu import cpu as geglu_cpu
from ttr_kernels.rms_norm import cpu as rms_norm_cpu

# Below are loops over whole arrays, spelled out one by one: numba keeps no function on disk that closes over another.


@jit
def _exp(x, y):
    for i in range(x.shape[0]):
        y[np.uintp(i)] = vector_math.exp(x[np.uintp(i)])


@jit
def _exp_of_nonpositive(x, y):
    for i in range(x.shape[0]):
        y[np.uintp(i)] = vector_math.exp_of_nonpositive(x[np.uintp(i)])


@jit
def _log(x, y):
    for i in range(x.shape[0]):
        y[np.uintp(i)] = vector_math.log(x[np.uintp(i)])


@jit
def _log1p(x, y):
    for i in range(x.shape[0]):
        y[np.uintp(i)] = vector_math.log1p_of_nonnegative(x[np.uintp(i)])


@jit
def _sincos(phase, sine, cosine):
    for i in range(phase.shape[0]):
        s, c = vector_math.sincos_of_phase(phase[i])
        sine[i] = s
        cosine[i] = c


@jit
def _library_exp(x, y):
    for i in range(x.shape[0]):
        y[np.uintp(i)] = math.exp(x[np.uintp(i)])


def apply(loop, x):
    y = np.empty_like(x)
    loop(x, y)
    return y


def floats(low, high, step):
    """Every step-th non-negative float32 from low to high, by bit pattern, and high itself."""
    first, last = (int(np.array(v, f).view(np.int32)) for v in (low, high))
    return np.append(np.arange(first, last, step), last).astype(np.int32).view(f)


def both_signs(x):
    return np.concatenate([-x, x])


def ulps(got, exact):
    """|got - exact| in units in the last place of the float32 nearest to exact."""
    _, exponent = np.frexp(np.abs(exact))
    return np.abs(got.astype(np.float64) - exact) / np.ldexp(1.0, np.maximum(exponent - 24, -149))


SUBNORMALS = floats(1e-45, 1.1754942e-38, 99991)
NORMALS = floats(1.1754944e-38, 3.4028235e38, 1009)

ACCURACY = {
    "exp": (_exp, np.exp, np.concatenate([-floats(0, 87.33654, 1009), floats(0, 88.72283, 1009)])),
    "exp, small and subnormal": (_exp, np.exp, both_signs(SUBNORMALS)),
    "exp_of_nonpositive": (_exp_of_nonpositive, np.exp, -floats(0, 87.33654, 1009)),
    "log": (_log, np.log, NORMALS),
    "log near 1": (_log, np.log, floats(0.5, 2.0, 31)),
    "log1p": (_log1p, np.log1p, np.concatenate([SUBNORMALS, NORMALS])),
    "log1p around its seams": (_log1p, np.log1p, floats(0.25, 4.0, 101)),
}


@pytest.mark.parametrize("name", list(ACCURACY))
def test_within_two_units_in_the_last_place(name):
    loop, exact, x = ACCURACY[name]
    got, want = apply(loop, x), exact(x.astype(np.float64))
    error = ulps(got, want)
    worst = int(error.argmax())
    assert error[worst] <= 2.0, f"{error[worst]:.2f} ulp at {x[worst]!r}: {got[worst]!r}, exactly {want[worst]!r}"


@pytest.mark.parametrize(
    "phase",
    [
        pytest.param(np.linspace(-10.0, 10.0, 200_001), id="small"),
        pytest.param(np.arange(-50_000, 50_000) * (np.pi / 2), id="next to the zeros"),
        pytest.param(np.random.default_rng(0).uniform(-1e6, 1e6, 200_000), id="1e6"),
        pytest.param(np.random.default_rng(0).uniform(-1e12, 1e12, 200_000), id="1e12"),
    ],
)
def test_sine_and_cosine_of_a_float64_phase(phase):
    sine, cosine = np.empty(len(phase), f), np.empty(len(phase), f)
    _sincos(phase, sine, cosine)
    # Without fused multiply-add, reducing the phase costs as much as its own rounding.
    rounding = np.spacing(np.abs(phase))
    for got, want in ((sine, np.sin(phase)), (cosine, np.cos(phase))):
        assert np.abs(got - want).max() <= 2.0**-23 + rounding.max()
        assert (ulps(got, want)[np.abs(want) > 1e-3 + 1e7 * rounding] <= 2.0).all()


INFINITY, NAN = float("inf"), float("nan")
SPECIAL = [
    (_exp, [(-INFINITY, 0.0), (-1e30, 0.0), (-87.5, 0.0), (0.0, 1.0), (-0.0, 1.0), (88.8, INFINITY), (INFINITY,) * 2]),
    (_exp_of_nonpositive, [(-INFINITY, 0.0), (-1e30, 0.0), (-0.0, 1.0), (0.0, 1.0)]),
    (_log, [(0.0, -INFINITY), (1e-40, -INFINITY), (1.0, 0.0), (INFINITY, INFINITY), (-1.0, NAN), (-INFINITY, NAN)]),
    (_log1p, [(0.0, 0.0), (INFINITY, INFINITY)]),
]


@pytest.mark.parametrize(("loop", "pairs"), SPECIAL, ids=[loop.__name__ for loop, _ in SPECIAL])
def test_special_values(loop, pairs):
    x, want = np.array([*pairs, (NAN, NAN)], f).T
    # Repeated, so that the vector loop sees them and not only the loop over what remains of it.
    np.testing.assert_array_equal(apply(loop, np.repeat(x, 37)), np.repeat(want, 37))


# What the compiler made of the loops.

FEATURES = llvmlite.binding.get_host_cpu_features() if platform.machine() in ("x86_64", "AMD64") else {}
vector_machine = pytest.mark.skipif(not FEATURES.get("avx2"), reason="reads the assembly of x86 machines with AVX2")
PACKED = re.compile(r"\bv(?:f[a-z]+\d*|mul|add|sub|max|div)ps\s.*%[yz]mm")
# numba's code loads the address of a function, then calls it.
CALLS = re.compile(r"\$(?:exp|log|log1p|tanh|erf|sin|cos|__\w*hf\w*)f?\b")


def assembly(dispatcher, *arguments):
    """What a kernel compiles to for such arguments. Anew, with its own options: numba shows none of its kept code."""
    options = {name: value for name, value in dispatcher.targetoptions.items() if name != "nopython"}
    fresh = numba.njit(**options)(getattr(dispatcher, "kernel", dispatcher.py_func))
    fresh.compile(tuple(numba.typeof(argument) for argument in arguments))
    (text,) = fresh.inspect_asm().values()
    return text


def packed_instructions(text):
    """Lines of arithmetic on whole vectors of float32; there must be no call into the library of C beside them."""
    assert not CALLS.search(text)
    return len(PACKED.findall(text))


X, AT, ONE = np.ones(64, f), 0, f(1)


@vector_machine
@pytest.mark.parametrize("loop", [_exp, _exp_of_nonpositive, _log, _log1p])
def test_functions_become_vector_code(loop):
    assert packed_instructions(assembly(loop, X, X)) >= 8


@vector_machine
def test_a_call_into_the_library_would_be_noticed():
    text = assembly(_library_exp, X, X)
    assert CALLS.search(text)
    assert not PACKED.search(text)


@vector_machine
def test_row_of_a_softmax_becomes_vector_code():
    assert packed_instructions(assembly(_softmax_row, X, AT, 32, 32, 33, 34, 16)) >= 16


@vector_machine
def test_geglu_becomes_vector_code():
    assert packed_instructions(assembly(geglu_cpu._forward, X, AT, X, True, X, AT, 32, 0, 1)) >= 32


@vector_machine
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16], ids=str)
def test_rms_norm_becomes_vector_code(dtype):
    x = kernel_view(np.ones(64, dtype))
    assert packed_instructions(assembly(rms_norm_cpu._forward, x, AT, X, ONE, x, AT, X, 0, 1)) >= 3


def test_row_of_an_online_softmax():
    # Logits, then the largest, the total and the result of the row, as the attention kernel lays them out.
    logits = np.linspace(-3, 3, 64, dtype=f)
    buffer = np.concatenate([logits, np.array([-np.inf, 0], f), np.zeros(16, f)])
    for at in (0, 32):
        _softmax_row(buffer, at, 32, 64, 65, 66, 16)
        buffer[66:] += buffer[at : at + 32].sum()
    assert buffer[64] == 3
    exact = np.exp(logits.astype(np.float64) - 3).sum()
    np.testing.assert_allclose(buffer[65:], exact, rtol=3e-7)

"""Print the polynomial coefficients of ttr_kernels/common/vector_math.py: where its numbers come from.

Each is a minimax fit of the *relative* error of the whole function (Lawson's reweighted least squares in float64 on a
Chebyshev grid); the leading terms are fixed, so that the function is exact near its zero.
"""

import math

import numpy as np


def fit(name, function, basis, low, high, relative_to, iterations=400):
    """Coefficients c that minimise max |(Σ c_k basis_k(x) - function(x)) / relative_to(x)| over [low, high]."""
    nodes = np.cos(np.linspace(0, np.pi, 2001))
    x = (low + high) / 2 + (high - low) / 2 * nodes
    scale = 1 / np.array([relative_to(v) for v in x])
    matrix = np.array([[b(v) for b in basis] for v in x]) * scale[:, None]
    wanted = np.array([function(v) for v in x]) * scale
    weights = np.full(len(x), 1.0)
    best, best_error = None, np.inf
    for _ in range(iterations):
        root = np.sqrt(weights)[:, None]
        coefficients = np.linalg.lstsq(matrix * root, wanted * root[:, 0], rcond=None)[0]
        error = np.abs(matrix @ coefficients - wanted)
        if error.max() < best_error:
            best, best_error = coefficients, error.max()
        weights *= error / error.max() + 1e-12
        weights /= weights.mean()
    print(f"{name}: relative error {best_error:.2e}\n  " + ", ".join(f"{c:.10e}" for c in best))


def powers(first, last, step=1):
    return [lambda x, k=k: x**k for k in range(first, last + 1, step)]


half_ln2 = math.log(2) / 2
# exp(r) = 1 + r + r² P(r)
fit("exp", lambda r: math.expm1(r) - r, powers(2, 6), -half_ln2, half_ln2 + 1e-9, math.exp)
# log(1 + f) = f - f²/2 + f³ P(f)
low, high = math.sqrt(0.5) - 1, math.sqrt(2) - 1
fit("log1p", lambda f: math.log1p(f) - f + f * f / 2, powers(3, 11), low, high, lambda f: abs(math.log1p(f)) + 1e-9)
# tanh(x) = x + x³ P(x²)
fit("tanh", lambda x: math.tanh(x) - x, powers(3, 13, 2), 1e-3, 0.625, math.tanh)
# erf(x) = x + x P(x²)
fit("erf, |x| < 1", lambda x: math.erf(x) - x, powers(1, 13, 2), 1e-3, 1.0, math.erf)
# erf(x) = 1 - exp(-Q(x)): an error e of Q moves erf by e · erfc(x)
fit(
    "erf, |x| >= 1",
    lambda x: -math.log(math.erfc(x)),
    powers(0, 7),
    1.0,
    4.0,
    lambda x: math.erf(x) / math.erfc(x),
)
# sin(r) = r + r³ P(r²); cos(r) = 1 - r²/2 + r⁴ P(r²)
quarter = math.pi / 4
fit("sin", lambda r: math.sin(r) - r, powers(3, 9, 2), 1e-3, quarter, math.sin)
fit("cos", lambda r: math.cos(r) - 1 + r * r / 2, powers(4, 8, 2), 1e-3, quarter, math.cos)

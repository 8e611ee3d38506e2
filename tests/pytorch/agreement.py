"""What it means to agree with PyTorch."""

import numpy as np


def assert_close(name, got, expected, allowed):
    """Agreement in norm with a tensor: ‖got − expected‖ <= allowed · ‖expected‖."""
    got, expected = np.asarray(got, np.float64), expected.detach().double().numpy()
    assert got.shape == expected.shape, f"{name}: shape {got.shape}, expected {expected.shape}"
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert error <= allowed, f"{name}: relative error {error:.1e}, allowed {allowed:.0e}"

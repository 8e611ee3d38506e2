"""The roofline picture, whatever was timed."""

import pytest

from ttr_gpu.roofline import draw_roofline
from ttr_kernels.benchmark import Timing


def test_a_limit_is_what_takes_longer():
    timing = Timing("matmul", "a", "forward", 1.0, 1000, 0.25, 50.0)
    assert timing.limit_seconds(100.0) == 0.5
    assert timing.limit_seconds(1000.0) == 0.25


@pytest.mark.parametrize(
    "timings",
    [
        [],
        [Timing("embedding", "a", "forward", 1e-3, 1 << 20, 1e-4, 0.0)],
        [Timing("rope", "a", part, 1e-3, 1 << 12, 1e-4, 10.0) for part in ("forward", "backward")],
        [Timing("adamw", "a", "update", 1e-3, 1 << 24, 1e-4, 1e6)],
    ],
)
def test_it_can_be_drawn(tmp_path, timings):
    path = draw_roofline(tmp_path / "new" / "roof.png", timings, peak=1e11, title="here")
    assert path.read_bytes().startswith(b"\x89PNG")

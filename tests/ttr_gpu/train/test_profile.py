"""`train --profile`: every operation of a step, its arithmetic counted, its time its own."""

import json
import time

import numpy as np
import pytest

from ttr_gpu.backend import CPU
from ttr_gpu.train.profile import StepProfile
from ttr_kernels.attention import attention_backward, attention_forward
from ttr_kernels.common.profiling import profiled
from ttr_kernels.cross_entropy import linear_cross_entropy_forward
from ttr_kernels.matmul import linear_backward, linear_forward, matmul


def step():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((6, 8)).astype(np.float32), rng.standard_normal((4, 8)).astype(np.float32)
    y, saved = linear_forward(x, w)
    linear_backward(y, saved)
    q, k, v = rng.standard_normal((3, 1, 5, 2, 8)).astype(np.float32)
    out, kept = attention_forward(q, k, v, window=3)
    attention_backward(out, kept)
    matmul(x, w.T)


def test_operations_of_a_step(tmp_path):
    said = []
    profile = StepProfile(tmp_path, CPU, 1e9, said.append)
    for _ in range(10):
        with profile.step():
            step()
    rows = {row.name: row for row in profile.operations()}
    # Queries see 1, 2, 3, 3, 3 keys, in 2 heads.
    pairs = 12 * 2
    assert {name: row.flops for name, row in rows.items() if row.flops} == pytest.approx(
        {
            "linear_forward": 2 * 6 * 8 * 4, "linear_backward": 4 * 6 * 8 * 4, "matmul": 2 * 6 * 8 * 4,
            "attention_forward": 4 * pairs * 8, "attention_backward": 10 * pairs * 8,
        }
    )  # fmt: skip
    assert all(row.calls == 1 for name, row in rows.items() if name != "outside of operations")
    assert rows["matmul"].bytes == 4 * (6 * 8 + 8 * 4 + 6 * 4)
    total = sum(row.seconds for row in rows.values())
    assert total == pytest.approx(profile.step_seconds())
    assert any("attention_backward" in line for line in said)
    assert (tmp_path / "profile" / "operations.txt").read_text().splitlines() == said[:-1]
    events = json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    assert [event["name"] for event in events].count("step") == 5
    assert [event["name"] for event in events].count("matmul") == 5


def test_a_short_run_is_profiled_as_far_as_it_went(tmp_path):
    for steps, expected in ((3, "profile     none: the run ended before step 4"), (5, "2 steps of")):
        said = []
        profile = StepProfile(tmp_path, CPU, 1e9, said.append)
        for _ in range(steps):
            with profile.step():
                step()
        profile.finish()
        assert said[0].startswith(expected)


def test_time_of_nested_operations_is_counted_once():
    x, weight = np.ones((4, 8), np.float32), np.ones((3, 8), np.float32)
    with profiled() as profiler:
        begin = time.perf_counter()
        linear_cross_entropy_forward(x, weight, np.array([0, 1, 2, -1]))
        seconds = time.perf_counter() - begin
    *inner, outer = profiler.calls
    assert [(call.name, call.depth) for call in inner] == [("linear_forward", 1), ("matmul", 1), ("matmul", 1)]
    assert (outer.name, outer.depth) == ("linear_cross_entropy_forward", 0)
    assert outer.own_seconds == pytest.approx(outer.seconds - sum(call.seconds for call in inner))
    assert sum(call.own_seconds for call in profiler.calls) <= seconds


def test_a_failing_operation_leaves_the_profile_usable():
    x = np.ones((4, 8), np.float32)
    with profiled() as profiler:
        with pytest.raises(ValueError, match="b: got shape"):
            matmul(x, x)
        matmul(x, x.T)
    assert [call.name for call in profiler.calls] == ["matmul"]
    assert profiler.calls[0].depth == 0

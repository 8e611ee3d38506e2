"""The benchmarks' own machinery: turns, failures of a contender, the check that both sides compute the same."""

import ast
import importlib
import json
import os
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import kernels, scaling, startup
from benchmarks.__main__ import main
from benchmarks.harness import Call, Contender, Spread, ratio, report, take_turns
from benchmarks.kernel_sides import COPY, LEAST, NUMPY, _timings, cases
from benchmarks.peers.numpy_operations import OPERATIONS
from benchmarks.step import check_agreement, plan_turns
from benchmarks.step_shapes import SHAPES, shape
from benchmarks.step_sides import OURS, Side


def make_counter(start):
    count = start

    def step():
        nonlocal count
        count += 1
        return count

    return step


def make_failure():
    return lambda: 1 / 0


def make_exit():
    return lambda: os._exit(7)


def test_turns_alternate_and_leave_out_their_first_call():
    with Contender("a", make_counter, 0) as a, Contender("b", make_counter, 100) as b:
        results = take_turns([a, b], turns=2, calls=2)
    assert [[[call.value for call in turn] for turn in turns] for turns in results] == [
        [[2, 3], [5, 6]], [[102, 103], [105, 106]],
    ]  # fmt: skip
    assert all(call.seconds > 0 for turns in results for turn in turns for call in turn)


def test_a_failure_is_reported_with_its_cause():
    with Contender("a", make_failure) as a, pytest.raises(RuntimeError, match=r"(?s)^a:.*ZeroDivisionError"):
        a.call(1)


def test_an_end_is_reported_with_its_code():
    with Contender("a", make_exit) as a, pytest.raises(RuntimeError, match=r"^a: its process ended with code 7"):
        a.call(1)


@pytest.mark.parametrize(
    ("one_of_each", "turns", "calls", "planned"),
    [(1.0, 8, 3, (8, 3, 1)), (6.0, 8, 3, (6, 3, 1)), (15.0, 8, 3, (4, 1, 1)), (20.0, 8, 3, (4, 1, 0)),
     (50.0, 8, 3, (3, 1, 0)), (1000.0, 8, 3, (2, 1, 0)), (1000.0, 1, 1, (1, 1, 0)), (1.0, 1, 2, (1, 2, 1))],
)  # fmt: skip
def test_slow_steps_are_timed_in_fewer_turns(one_of_each, turns, calls, planned):
    assert tuple(plan_turns(one_of_each, turns, calls, 150.0).values()) == planned


def test_a_slow_operation_is_timed_in_few_calls():
    calls = {"slow": 0, "quick": 0}

    def counting(name):
        calls[name] += 1
        return np.ones(2)

    # 2 parts share a budget that one call of either exceeds, or that nothing reaches.
    for budget, timed in ((0.0, LEAST + 1), (1e9, LEAST + 3)):
        calls["slow"] = calls["quick"] = 0
        time_all = _timings(
            {"a": {"forward": lambda: counting("slow")}, "b": {"forward": lambda: counting("quick")}}, np.asarray,
            budget, repeats=1,
        )  # fmt: skip
        found = [time_all()["a"] for _ in range(LEAST + 3)]
        assert [seconds["forward"] is not None for seconds, _ in found] == [n < timed for n in range(LEAST + 3)]
        assert all(numbers == [1.0, 1.0] for _, numbers in found)
        assert calls == {"slow": timed, "quick": timed}


def test_ratio_compares_neighbouring_turns():
    # The machine is ten times slower in the second turn, for both.
    slower, faster = ([[Call(s, 0.0, None)] for s in seconds] for seconds in ([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]))
    assert ratio(slower, faster) == Spread(2.0, 2.0, 2.0)


FLOAT32, BFLOAT16 = Side("PyTorch", "float32"), Side("PyTorch", "bfloat16")


@pytest.mark.parametrize(("side", "loss"), [(FLOAT32, 2.0001), (BFLOAT16, 2.005)])
def test_agreement(side, loss):
    check_agreement([Side("ttr-gpu", "float32"), side], [2.0, loss])


@pytest.mark.parametrize(
    ("side", "losses"),
    [
        (FLOAT32, [2.0, 2.001]), (BFLOAT16, [2.0, 2.05]), (FLOAT32, [float("nan"), 2.0]),
        (FLOAT32, [2.0, float("nan")]), (BFLOAT16, [float("nan"), float("nan")]),
    ],
)  # fmt: skip
def test_disagreement_stops_the_benchmark(side, losses):
    with pytest.raises(click.ClickException, match="losses of the first step differ"):
        check_agreement([Side("ttr-gpu", "float32"), side], losses)


def _result(**medians):
    spreads = {name: {"seconds": {"median": m, "lower": 0.9 * m, "upper": 1.1 * m}} for name, m in medians.items()}
    return {"benchmark": "step", "date": "2026-01-01", "machine": {"cpu": "a processor"}, "sides": spreads}


def test_compare_tells_what_became_slower(tmp_path, capsys):
    (tmp_path / "old.json").write_text(json.dumps(_result(a=1.0, b=1.0, c=1.0, gone=1.0)))
    new = _result(a=2.0, b=1.05, c=0.5, added=1.0)
    report(tmp_path / "new.json", "step", new, tmp_path / "old.json")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-3:]] == ["a", "b", "c"]
    assert [line.rsplit("  ", 1)[1] for line in lines[-3:]] == ["slower", "within the spread", "faster"]


def test_compare_refuses_another_benchmarks_result(tmp_path):
    (tmp_path / "old.json").write_text(json.dumps({"benchmark": "decode"}))
    with pytest.raises(click.ClickException, match="got a result of 'decode', not 'step'"):
        report(tmp_path / "new.json", "step", _result(a=1.0), tmp_path / "old.json")


@pytest.mark.parametrize(("key", "value"), [("threads", 2), ("shape", "long")])
def test_compare_refuses_other_work(tmp_path, key, value):
    (tmp_path / "old.json").write_text(json.dumps({**_result(a=1.0), "threads": 1, "shape": "reference"}))
    new = {**_result(a=1.0), "threads": 1, "shape": "reference", key: value}
    with pytest.raises(click.ClickException, match=f"{key} .* expected {value!r}"):
        report(tmp_path / "new.json", "step", new, tmp_path / "old.json")
    assert (tmp_path / "new.json").exists()


def test_shapes_have_what_they_say():
    for name in SHAPES:
        worked_on = shape(name, "bfloat16")
        batch = worked_on.batch()
        assert worked_on.model.precision == "bfloat16"
        assert len(batch.tokens) == len(batch.times) == len(batch.targets) == sum(worked_on.lengths)
        assert np.array_equal(np.diff(batch.cu_seqlens), worked_on.lengths)
        # Within a sequence the target is the token that follows, and time does not run backwards.
        first = slice(0, worked_on.lengths[0])
        assert np.array_equal(batch.targets[first][:-1], batch.tokens[first][1:])
        assert (np.diff(batch.times[first]) >= 0).all()
    assert len(set(shape("events").lengths)) > 5


def test_every_benchmark_is_known():
    """One that cannot be imported would take all others with it."""
    assert {"step", "kernels", "scaling", "startup", "decode", "prefill", "serve", "training", "data"} <= set(
        main.commands
    )


def test_kernels_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.kernels.find_packages", list)
    output = tmp_path / "kernels.json"
    options = ["--only", "time2vec", "--only", "adamw", "--turns", "1", "--threads", "1", "--output", str(output)]
    run = CliRunner().invoke(main, ["kernels", *options])
    assert run.exit_code == 0, run.output
    sides = json.loads(output.read_text())["sides"]
    parts = ["forward", "forward and backward", "update"]
    assert [(s["part"], s["side"]) for s in sides.values()] == [(p, s) for p in parts for s in (OURS, COPY, NUMPY)]
    assert all(side["seconds"]["median"] > 0 for side in sides.values())
    assert [side["over_ours"]["median"] for side in sides.values()][::3] == [1.0] * 3
    assert output.with_suffix(".png").exists()


@pytest.mark.parametrize("name", OPERATIONS)
def test_numpy_computes_what_the_kernels_compute(name):
    for case, operation, inputs in cases((name,)):
        if name == "attention":
            inputs = {key: value[:1, :80] if np.ndim(value) > 1 else value for key, value in inputs.items()}
        y, saved = operation.forward(**inputs)
        dy = np.random.default_rng(1).standard_normal(np.shape(y)).astype(np.float32) if np.ndim(y) else 1.0
        z, backward = OPERATIONS[name](**inputs)
        ours, theirs = (
            (x, *_tuple(gradients)) for x, gradients in ((y, operation.backward(dy, saved)), (z, backward(dy)))
        )
        for a, b in zip((a for a in ours if a is not None), theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max(), err_msg=case)


def _tuple(gradients):
    return gradients if isinstance(gradients, tuple) else (gradients,)


def test_kernels_that_compute_something_else_stop_the_benchmark():
    found = {"ttr-gpu": {"rope": ({}, [1.0, 2.0])}, "PyTorch": {"rope": ({}, [1.0, 2.1])}}
    with pytest.raises(click.ClickException, match=r"rope: the results of ttr-gpu and PyTorch differ by 1\.0e-01"):
        kernels.check_agreement(found)


def test_scaling_varies_one_thing_at_a_time():
    reference = shape("reference").model
    for point in scaling.points(threads=2):
        changed = {name for name, value in point.shape.model if value != getattr(reference, name)}
        if point.axis == "width":
            assert changed <= {"embed_dim", "hidden_dim", "num_heads"}
        else:
            assert changed <= {{"layers": "num_layers"}.get(point.axis, "window" if "window 256" in point.axis else "")}
        tokens = scaling.TOKENS if point.axis.startswith("length") else 2048
        assert sum(point.shape.lengths) == tokens


def test_startup_shows_what_train_said_where_there_was_no_step(tmp_path):
    with pytest.raises(click.ClickException, match=r"(?s)train ended without a step:.*missing\.zarr"):
        startup.first_step(tmp_path / "missing.zarr", tmp_path / "runs", None)


@pytest.mark.parametrize("path", sorted(Path(kernels.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_what_functions_import_of_each_other_is_there(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module and "peers" not in node.module:
            module = importlib.import_module(f"benchmarks.{node.module}")
            for name in node.names:
                assert hasattr(module, name.name), f"{path.name}:{node.lineno}: {node.module} has no {name.name}"

"""`benchmarks point-processes`: figures beside floor and truth, and what is recorded is not run again."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import point_processes
from benchmarks.event_files import read_events
from benchmarks.generating_processes import log_normal_nll

TINY = [
    f"--set={key}" for key in (
        "train.steps=2", "model.embed_dim=8", "model.hidden_dim=8", "model.num_layers=1", "model.num_heads=2",
    )
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Fifteen sequences of a Poisson process."""
    times = np.cumsum(np.random.default_rng(0).exponential(1.0, (15, 40)), axis=1)
    np.savez(tmp_path / "poisson.npz", times=times.ravel(), offsets=40 * np.arange(16))
    return tmp_path


def call(folder, *options):
    arguments = ["--data", str(folder), "--files", "poisson", "--threads", "1", "--work", str(folder / "work")]
    output = folder / "out.json"
    result = CliRunner().invoke(point_processes.point_processes, [*arguments, "--output", str(output), *options])
    return result, json.loads(output.read_text()) if output.exists() else None


def test_references_alone(folder):
    result, found = call(folder, "--seeds", "0,1", "--references")
    assert result.exit_code == 0, result.output
    events = read_events(folder / "poisson.npz")
    parts = events.split(1)
    train = np.log(np.concatenate([np.diff(events.times[i]) for i in parts["train"]]))
    test = np.concatenate([np.diff(events.times[i]) for i in parts["test"]])
    figures = found["runs"]["poisson"]["1"]
    assert figures["floor"] == pytest.approx(log_normal_nll(test, train.mean(), train.std()).mean())
    assert figures["truth"] == pytest.approx(test.mean())
    assert "test" not in figures
    assert found["runs"]["poisson"]["0"]["truth"] != figures["truth"]


def test_a_finished_run_is_not_run_again(folder, monkeypatch):
    result, found = call(folder, "--seeds", "0", *TINY)
    assert result.exit_code == 0, result.output
    figures = found["runs"]["poisson"]["0"]
    assert {"floor", "truth", "validation", "test", "best_step", "cpu_seconds"} <= set(figures)
    assert np.isfinite(figures["test"])
    assert found["protocol"] == "chunks of 128 gaps"
    assert (folder / "out.png").read_bytes()[:4] == b"\x89PNG"
    assert "above truth" in result.output

    def fail(*arguments):
        raise AssertionError("trained again")

    monkeypatch.setattr(point_processes, "train_and_test", fail)
    again, same = call(folder, "--seeds", "0", *TINY)
    assert again.exit_code == 0, again.output
    assert same["runs"] == found["runs"]
    # Another seed is run, and other settings do not go into the same file.
    assert isinstance(call(folder, "--seeds", "0,1", *TINY)[0].exception, AssertionError)
    other, _ = call(folder, "--seeds", "0", "--set", "train.steps=3")
    assert other.exit_code == 1
    assert "choose another --output" in other.output


def test_seeds_that_are_none(folder):
    result, _ = call(folder, "--seeds", "0,x")
    assert result.exit_code == 2
    assert "--seeds" in result.output

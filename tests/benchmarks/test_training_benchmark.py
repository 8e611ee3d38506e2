"""The benchmark of the trainer, on a small model: every figure is there, and what is measured is what it says."""

import json

import click
import pytest

from benchmarks import training
from benchmarks.__main__ import main


def test_every_command_is_there():
    names = main.list_commands(click.Context(main))
    assert {"step", "decode", "training", "attention-memory"} <= set(names)
    assert all(main.get_command(click.Context(main), name).help for name in names)


def test_checkpoints_are_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "PRESET", "nano")
    monkeypatch.setattr(training, "STEPS", 2)
    found = training.make_checkpoints(1, 2)()
    assert set(found["seconds"]) == {"save", "load", "copy_synced", "copy"}
    assert all(spread["median"] > 0 for spread in found["seconds"].values())
    ratio = found["seconds"]["copy"]["median"] / found["seconds"]["load"]["median"]
    assert found["bandwidth_ratio"]["load_over_copy"]["median"] == pytest.approx(ratio, rel=2)
    # Weights and two moments of 0.6 million parameters in float32.
    assert found["bytes"] > 12 * 600_000
    assert 0 < found["pause_in_steps"] <= found["longest_pause_in_steps"]
    assert list(tmp_path.iterdir()) == [], "nothing is left"


def test_rows_of_steps_are_drawn(tmp_path):
    seconds = {"median": 0.1, "lower": 0.1, "upper": 0.2}
    rows = [
        {"precision": precision, "policy": policy, "seconds": seconds, "over_float32_none": seconds,
         "activation_bytes": 1 << 20, "resident_bytes": 1 << 28}
        for precision in training.PRECISIONS for policy in training.POLICIES
    ]  # fmt: skip
    saved = {
        "bytes": 1 << 28, "seconds": dict.fromkeys(("save", "load", "copy_synced", "copy"), seconds),
        "pause_in_steps": 0.1, "bandwidth_ratio": {}, "longest_pause_in_steps": 0.2,
    }  # fmt: skip
    result = json.loads(json.dumps({"threads": 2, "steps": rows, "checkpoints": saved, "preset": "small"}))
    training.draw(tmp_path / "x.png", result)
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"

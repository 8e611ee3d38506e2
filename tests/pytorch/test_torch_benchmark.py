"""`python -m benchmarks step` and `prefill` run, and both sides compute the same."""

import json

import pytest
from click.testing import CliRunner

pytest.importorskip("torch.nn.functional", reason="PyTorch is not installed: pip install torch==2.13.0")

from benchmarks.__main__ import main


def run(tmp_path, *options):
    output = tmp_path / "step.json"
    run = CliRunner().invoke(main, ["step", "--turns", "1", "--calls", "1", "--output", str(output), *options])
    assert run.exit_code == 0, run.output
    assert output.with_suffix(".png").stat().st_size > 0
    return json.loads(output.read_text())["sides"]


def test_step(tmp_path):
    sides = run(tmp_path, "--peer", "eager")
    # After four steps.
    ours, peer = sides["ttr-gpu float32"], sides["PyTorch float32"]
    assert ours["last_loss"] == pytest.approx(peer["last_loss"], rel=1e-4)
    assert ours["last_loss"] < ours["first_loss"]
    assert peer["over_ours"]["median"] > 0
    ours, peer = sides["ttr-gpu bfloat16"], sides["PyTorch bfloat16"]
    assert ours["last_loss"] == pytest.approx(peer["last_loss"], rel=1e-2)


def test_step_on_sequences_of_uneven_length(tmp_path):
    sides = run(tmp_path, "--peer", "eager", "--shape", "events", "--precision", "float32")
    assert sides["ttr-gpu float32"]["last_loss"] == pytest.approx(sides["PyTorch float32"]["last_loss"], rel=1e-4)


def test_prefill(tmp_path):
    """It stops by itself where the logits differ."""
    output = tmp_path / "prefill.json"
    done = CliRunner().invoke(main, ["prefill", "--turns", "1", "--calls", "1", "--output", str(output)])
    assert done.exit_code == 0, done.output
    described = json.loads(output.read_text())
    assert set(described["peer_over_ours"]) == {"1", "8"}
    assert [row["sequences"] for row in described["rows"]] == [1, 1, 8, 8]

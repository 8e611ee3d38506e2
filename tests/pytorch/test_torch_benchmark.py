"""`python -m benchmarks step` runs, and both sides of it compute the same."""

import json

import pytest
from click.testing import CliRunner

pytest.importorskip("torch.nn.functional", reason="PyTorch is not installed: pip install torch==2.13.0")

from benchmarks.__main__ import main


def test_step(tmp_path):
    output = tmp_path / "step.json"
    run = CliRunner().invoke(main, ["step", "--turns", "1", "--calls", "1", "--output", str(output)])
    assert run.exit_code == 0, run.output
    result = json.loads(output.read_text())
    ours, peer = result["sides"]["ttr-gpu"], result["sides"]["PyTorch"]
    # After four steps.
    assert ours["last_loss"] == pytest.approx(peer["last_loss"], rel=1e-4)
    assert ours["last_loss"] < ours["first_loss"]
    assert result["ratio"]["median"] > 0
    assert output.with_suffix(".png").stat().st_size > 0

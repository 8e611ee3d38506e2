"""--plan and --memory-limit: what is shown and chosen, and that a chosen policy changes no bit of the result."""

import re

import numpy as np
import pytest
from small_runs import SMALL, resume, run, weights

from ttr_gpu.errors import UserError
from ttr_gpu.train.checkpoint import find_checkpoint, open_checkpoint
from ttr_gpu.train.run import RunOptions, show_plan

WIDE = ("model.num_layers=4", "model.hidden_dim=512", "train.tokens_per_batch=512", "train.steps=2")


@pytest.fixture(autouse=True)
def program_of_one_size(monkeypatch):
    """That of the tests grows from one to the next by more than these models take."""
    for user in ("run", "trainer"):
        monkeypatch.setattr(f"ttr_gpu.train.{user}.loaded_program", lambda config, backend: 64 << 20)


def planned(data, out, *assignments, **options):
    said = []
    show_plan(RunOptions(data, "nano", out=out, assignments=(*SMALL, *WIDE, *assignments), **options), said.append)
    assert not out.exists(), "a plan leaves nothing"
    return said


def row(said, name):
    """(activations, all memory) in MiB, extra compute in per cent, seconds of a step."""
    (line,) = [line for line in said if re.match(rf"{re.escape(name)}  ", line)]
    numbers = re.search(r"([\d.]+) MiB +([\d.]+) MiB +([\d.]+) % +([\d.]+)", line)
    return tuple(float(number) for number in numbers.groups())


def test_plan_shows_what_each_policy_takes(data, tmp_path):
    said = planned(data, tmp_path / "runs", "train.recompute=feed_forward")
    none, block, half = row(said, "none"), row(said, "block"), row(said, "block, every 2. block")
    assert none[0] > half[0] > block[0]
    assert none[2] == 0 < half[2] < block[2] < 35
    assert none[3] < block[3]
    assert sum("<- this run" in line for line in said) == 1
    assert next(line for line in said if "<- this run" in line).startswith("feed_forward ")
    assert any("recomputing feed_forward" in line for line in said if line.startswith("memory"))
    assert not any("does not fit" in line for line in said)


def test_a_limit_chooses_the_cheapest_policy_that_fits(data, tmp_path):
    said = planned(data, tmp_path / "runs")
    none, block = row(said, "none")[1], row(said, "block")[1]
    limit = int((none + block) / 2 * 2**20)
    chosen = next(line for line in planned(data, tmp_path / "runs", memory_limit=limit) if "<- this run" in line)
    assert not chosen.startswith("none")
    run(data, tmp_path / "limited", *WIDE, memory_limit=limit)
    config = open_checkpoint(find_checkpoint(tmp_path / "limited" / "run")).config
    assert chosen.startswith(config.train.recompute)
    run(data, tmp_path / "free", *WIDE)
    np.testing.assert_array_equal(weights(tmp_path / "limited" / "run"), weights(tmp_path / "free" / "run"))


def test_a_limit_that_nothing_fits_says_what_would(data, tmp_path):
    with pytest.raises(UserError, match=r"--memory-limit: got 1.0 MiB, expected at least .* MiB, which .*block needs"):
        planned(data, tmp_path / "runs", memory_limit=1 << 20)


def test_another_policy_resumes_exactly(data, tmp_path):
    options = ("model.num_layers=2", "model.dropout.residual=0.2", "train.checkpoint_every=5", "train.keep_last=99")
    run(data, tmp_path / "whole", *options)
    half = tmp_path / "half" / "run"
    run(data, half.parent, *options)
    resume(data, half / "checkpoints" / "step-00000005", "train.recompute=block")
    np.testing.assert_array_equal(weights(half), weights(tmp_path / "whole" / "run"))

"""Two ranks on two hosts (network namespaces with names of their own): one model, and a common end."""

import re
import subprocess

import numpy as np
import pytest
from ranks import CHECK_ENDINGS, command
from small_runs import run
from test_data_parallel import DROPOUT, FOUR, arguments, steps

from benchmarks.namespaces import Hosts


@pytest.fixture
def hosts():
    command(2)  # or skip
    try:
        with Hosts() as found:
            yield found
    except RuntimeError as error:
        pytest.skip(f"no two hosts here: {error}")


def test_two_hosts_train_the_model_of_one_process(hosts, data, tmp_path):
    few = (*FOUR, DROPOUT, "train.steps=4")
    run(data, tmp_path / "1", *few)
    line = hosts.mpirun(*arguments(data, tmp_path / "2", *few))
    done = subprocess.run(line, capture_output=True, text=True, env=hosts.environment(), timeout=600)
    assert done.returncode == 0, done.stderr
    assert "processes  2 through MPI" in done.stdout
    np.testing.assert_allclose(steps(tmp_path / "2" / "run"), steps(tmp_path / "1" / "run"), rtol=2e-5)


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_dies_ends_that_of_the_other_host(hosts, who):
    line = hosts.mpirun(str(CHECK_ENDINGS), "kill", str(who), options=("-disable-auto-cleanup",))
    done = subprocess.run(line, capture_output=True, text=True, env=hosts.environment(), timeout=300)
    assert done.returncode != 0
    assert "finished" not in done.stdout
    said = re.findall(r"error: rank (\d) of 2 \(([^,]*), process \d+\): its process died", done.stderr)
    # Unless mpirun has noticed first, and ended all in its own words, for all that it was told.
    if said or "APPLICATION TERMINATED" not in done.stdout + done.stderr:
        assert said == [(str(who), hosts.names[who])], done.stderr

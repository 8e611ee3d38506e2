"""Each communicator gives what NumPy gives for all ranks' arrays together."""

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from ranks import environ, mpirun, said_by_ranks

from ttr_gpu.distributed.communicator import LOCAL, exchange
from ttr_gpu.distributed.launch import detect


@pytest.mark.parametrize("ranks", [2, 3])
def test_collectives_of_mpi(ranks):
    code, out, err = mpirun(Path(__file__).with_name("check_collectives.py"), str(ranks), ranks=ranks)
    assert code == 0, err
    assert said_by_ranks(out, "agrees") == list(range(ranks))


def test_one_process_needs_no_engine():
    array = np.arange(6.0).reshape(1, 6)
    LOCAL.all_reduce(array)
    LOCAL.start_all_reduce(array)
    LOCAL.broadcast(array)
    LOCAL.barrier()
    assert LOCAL.wait() == []
    np.testing.assert_array_equal(array, np.arange(6.0)[None])
    np.testing.assert_array_equal(LOCAL.all_gather(array), array[None])
    np.testing.assert_array_equal(LOCAL.reduce_scatter(array), array[0])
    assert exchange(LOCAL, ["x", 1]) == [["x", 1]]


@pytest.mark.parametrize(
    ("environment", "launcher", "figures"),
    [
        ({}, "the launcher", (1, 0, 1, 0)),
        (
            {"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1"},
            "mpirun of MPICH",
            (4, 3, 2, 1),
        ),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
             "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            "mpirun of Open MPI",
            (2, 1, 2, 1),
        ),
        (
            {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
             "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"},
            "srun",
            (8, 5, 4, 1),
        ),
        # The script of a batch job of 8 tasks is one process.
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, "the launcher", (1, 0, 1, 0)),
        ({"PMI_SIZE": "1", "PMI_RANK": "0"}, "the launcher", (1, 0, 1, 0)),
        ({"PMI_SIZE": "3", "PMI_RANK": "2"}, "the launcher", (3, 2, 1, 0)),
        # MPICH's mpirun in a job of two machines: a helper on each.
        (
            {"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1",
             "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"},
            "mpirun of MPICH",
            (4, 3, 2, 1),
        ),
    ],
)  # fmt: skip
def test_launchers_are_told_by_their_environment(environment, launcher, figures):
    found = detect(environment)
    assert (found.launcher, (found.size, found.rank, found.local_size, found.local_rank)) == (launcher, figures)


def test_info_says_what_would_be_used_and_why():
    def said(out):
        return {line.split()[0] + (" use" if line.startswith("would") else ""): line for line in out.splitlines()}

    alone = said(subprocess.run(
        [sys.executable, "-m", "ttr_cli.main", "info", "--distributed"], capture_output=True, text=True, check=True,
        env=environ(), timeout=60,
    ).stdout)  # fmt: skip
    assert "this is one process" in alone["launcher"]
    assert "one process" in alone["would use"]
    assert alone["mpi"].endswith("1 process") or "none" in alone["mpi"]
    code, out, err = mpirun("-m", "ttr_cli.main", "info", "--distributed")
    assert code == 0, err
    # One of them speaks for all.
    both = said(out)
    assert "mpirun of MPICH, 2 processes" in both["launcher"]
    assert both["ranks"].startswith("ranks 0-1")
    assert both["would use"].split()[2:] == ["MPI"]
    assert len(both) == len(out.splitlines())
    apart = said(subprocess.run(
        [sys.executable, "-m", "ttr_cli.main", "info", "--distributed"], capture_output=True, text=True, check=True,
        env=environ(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_LOCAL_SIZE="2",
                    OMPI_COMM_WORLD_LOCAL_RANK="1"), timeout=60,
    ).stdout)  # fmt: skip
    assert "process 1 of 2" in apart["launcher"]
    assert "train would refuse to start, since for MPI this is one of 1" in apart["would use"]


def test_one_rank_of_a_machine_says_that_it_compiles(tmp_path):
    # Each for a cache of its own, or whoever comes late would have nothing to compile.
    script = tmp_path / "compile.py"
    script.write_text(
        textwrap.dedent("""
        import os
        os.environ["TTR_CACHE_DIR"] += "/" + os.environ["PMI_RANK"]
        import numpy as np
        from ttr_gpu.distributed.session import session
        from ttr_kernels.common.reductions import _add
        with session("cpu"):
            _add(np.ones((2, 4), np.float32), np.ones(4, np.float32))
    """)
    )
    code, _, err = mpirun(script, TTR_CACHE_DIR=str(tmp_path))
    assert code == 0, err
    assert err.count("compiling kernels for this CPU") == 1
    assert f"kept in {tmp_path}/0/" in err
    assert {path.parents[2].name for path in tmp_path.rglob("*.nbc")} == {"0", "1"}

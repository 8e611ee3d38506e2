"""How this process was started: alone, or as one of several by mpirun or srun. Read from what they leave in the
environment, so that a run that cannot use them says so instead of training n times."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """What a launcher says of this process.

    Attributes:
        launcher: of people's names for it.
        size, rank: processes of the run, and which this is; local_size, local_rank: those on this machine.
    """

    launcher: str
    size: int = 1
    rank: int = 0
    local_size: int = 1
    local_rank: int = 0


# Names of size, rank, local size, local rank. Slurm's are those of a step that srun started: the script of a batch job,
# which runs once, has SLURM_NTASKS too.
_LAUNCHERS = {
    "mpirun of Open MPI": (
        "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
    ),
    "mpirun of MPICH": ("PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_LOCALID"),
}  # fmt: skip


def detect(environment: Mapping[str, str] = os.environ) -> Launch:
    """The launcher of this process; one process if there is none."""
    for launcher, (size, rank, local_size, local_rank) in _LAUNCHERS.items():
        # In a job of Slurm, mpirun starts its own helpers through srun: its variables are the ones that count.
        if _number(environment, size, 1) > 1 and local_size in environment:
            return Launch(
                launcher, _number(environment, size, 1), _number(environment, rank, 0),
                _number(environment, local_size, 1), _number(environment, local_rank, 0),
            )  # fmt: skip
    # Some launcher that speaks the same protocol.
    return Launch("the launcher", max(1, _number(environment, "PMI_SIZE", 1)), _number(environment, "PMI_RANK", 0))


def cores_of_process(usable: int) -> int:
    """How many of the cores that this process may use are its own, of several on one machine.

    Open MPI and Slurm may bind each process to cores of its own, which are then all that it can use; MPICH's mpirun
    binds none.
    """
    launch = detect()
    bound = launch.launcher != "mpirun of MPICH" and usable < (os.cpu_count() or 1)
    return usable if bound else max(1, usable // launch.local_size)


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    """Slurm counts tasks per node as "2(x3),1": the first number is near enough to divide cores by."""
    digits = environment.get(name, "").split(",")[0].split("(")[0]
    return int(digits) if digits.isdigit() else default

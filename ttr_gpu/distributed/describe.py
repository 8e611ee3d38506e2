"""`ttr-gpu info --distributed`: what several processes would train together with, and why."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

from ..backend import choose_backend
from ..errors import UserError
from .launch import detect


def describe() -> Iterator[tuple[str, str]]:
    """Lines (what, how it is): launcher, MPI, NCCL, Slurm, and what `ttr-gpu train` would do."""
    launch = detect()
    started = launch.launcher if launch.size > 1 else "none: this is one process"
    if launch.size > 1:
        started += f", process {launch.rank} of {launch.size} ({launch.local_rank} of {launch.local_size} here)"
    yield "launcher", started
    mpi = _mpi()
    yield "mpi", mpi or "none: mpi4py is not installed (pip install 'ttr-gpu[mpi]')"
    backend = choose_backend()
    nccl = None
    if backend.name == "gpu":
        try:
            from .nccl import version

            nccl = f"{version(backend.xp)}, {backend.xp.cuda.runtime.getDeviceCount()} GPUs visible"
        except UserError as error:
            nccl = f"none: {error}"
    yield "nccl", nccl or f"none: {backend.device}"
    job = os.environ.get("SLURM_JOB_ID")
    yield "slurm", f"job {job}" if job else "none: not inside a job"
    if launch.size == 1:
        yield "would use", "one process; start several with mpirun -n N or srun --ntasks N"
    elif backend.name == "gpu":
        where = "MPI" if mpi else f"TTR_MASTER ({os.environ.get('TTR_MASTER', 'which is not set')})"
        yield "would use", f"NCCL among GPUs, which find each other through {where}"
    else:
        yield "would use", "MPI" if mpi else "nothing: train would refuse to start"


def _mpi() -> str | None:
    """mpi4py and its library; None without mpi4py. Importing it joins the run of a launcher, if there is one."""
    if importlib.util.find_spec("mpi4py") is None:
        return None
    import mpi4py

    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        return f"mpi4py {mpi4py.__version__}, but no MPI library: {str(error).splitlines()[0][:120]}"
    from .mpi import library_name

    threads = "" if MPI.Query_thread() >= MPI.THREAD_SERIALIZED else ", sums cannot overlap with computing"
    return f"{library_name(MPI)} (mpi4py {mpi4py.__version__}), {MPI.COMM_WORLD.Get_size()} processes{threads}"

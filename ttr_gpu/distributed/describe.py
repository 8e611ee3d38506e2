"""`ttr-gpu info --distributed`: what several processes would train together with, and why."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from collections.abc import Iterator
from itertools import groupby

from ..backend import Backend, choose_backend
from ..errors import UserError
from .communicator import exchange
from .launch import Launch, detect


def describe() -> Iterator[tuple[str, str]]:
    """Lines (what, how it is): launcher, MPI, NCCL, Slurm, and what `ttr-gpu train` would do. Of processes that find
    each other the first speaks for all."""
    launch = detect()
    mpi, size = _mpi()
    backend = choose_backend("auto", launch.local_rank)
    together = launch.size > 1 and size == launch.size
    places = _places(backend) if together else []
    if together and launch.rank > 0:
        return
    started = launch.launcher if launch.size > 1 else "none: this is one process"
    if together:
        started += f", {launch.size} processes"
    elif launch.size > 1:
        started += f", process {launch.rank} of {launch.size} ({launch.local_rank} of {launch.local_size} here)"
    yield "launcher", started
    yield from places
    yield "mpi", mpi or "none: mpi4py is not installed (pip install 'ttr-gpu[mpi]')"
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
    yield "would use", _would_use(launch, backend, size)


def _would_use(launch: Launch, backend: Backend, size: int) -> str:
    if launch.size == 1:
        return "one process; start several with mpirun -n N or srun --ntasks N"
    if size not in (0, launch.size):
        return (
            f"nothing: train would refuse to start, since for MPI this is one of {size}; use the mpirun that belongs "
            f"to mpi4py's library ({sys.prefix}/bin/mpirun), or srun --mpi=pmi2"
        )
    if backend.name == "gpu":
        where = "MPI" if size else f"TTR_MASTER ({os.environ.get('TTR_MASTER', 'which is not set')})"
        return f"NCCL among GPUs, which find each other through {where}"
    return "MPI" if size else "nothing: train would refuse to start"


def _places(backend: Backend) -> list[tuple[str, str]]:
    """Where ranks are, neighbours on one machine together. All ranks must call it."""
    from .mpi import MpiCommunicator

    communicator = MpiCommunicator()
    said = exchange(communicator, f"{socket.gethostname()}, {backend.device}")
    communicator.close()
    lines = []
    for place, found in groupby(enumerate(said), key=lambda pair: pair[1]):
        ranks = [rank for rank, _ in found]
        lines.append((f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}", str(place)))
    return lines


def _mpi() -> tuple[str | None, int]:
    """mpi4py and its library, and how many processes it has brought together; (None, 0) without mpi4py. Importing it
    joins the run of a launcher, if there is one."""
    if importlib.util.find_spec("mpi4py") is None:
        return None, 0
    import mpi4py

    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        return f"mpi4py {mpi4py.__version__}, but no MPI library: {str(error).splitlines()[0][:120]}", 0
    from .mpi import library_name

    threads = "" if MPI.Query_thread() >= MPI.THREAD_SERIALIZED else ", sums cannot overlap with computing"
    size = MPI.COMM_WORLD.Get_size()
    processes = "1 process" if size == 1 else f"{size} processes"
    return f"{library_name(MPI)} (mpi4py {mpi4py.__version__}), {processes}{threads}", size

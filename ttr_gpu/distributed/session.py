"""The processes of a run from their start to their common end."""

from __future__ import annotations

import importlib.util
import os
import secrets
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from ttr_kernels.common.announcement import leave_to_another

from ..backend import CPU, Backend, choose_backend
from ..errors import TrainingDiverged, UserError
from .communicator import LOCAL, Communicator, exchange
from .launch import Launch, detect
from .watch import PEER_FAILED, Watch, accept, connect, listen

Value = TypeVar("Value")


class AgreedError(UserError):
    """An error that every rank has, and so none needs to tell the others."""


class OtherRankFailed(Exception):
    """Another rank is about to say why no rank can go on."""


@dataclass(frozen=True)
class Session:
    """A run's processes.

    Attributes:
        communicator: for arrays.
        backend: where this rank computes.
        watch: of the others; None if there are none.
    """

    communicator: Communicator
    backend: Backend
    watch: Watch | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the process that prints and writes: rank 0."""
        return self.communicator.rank == 0

    def agree(self, name: str, value: Value) -> Value:
        """Every rank's value, which must be the same. AgreedError, naming a rank and what differs, if it is not."""
        said = exchange(self.communicator, value)
        for rank, other in enumerate(said):
            if other != said[0]:
                raise AgreedError(
                    f"{name}: differs between ranks: {_difference(said[0], other)} on rank 0 and on rank {rank}; start "
                    "all of them with one command, on the same data and release"
                )
        return value

    def together(self, work: Callable[[], Value]) -> Value:
        """What `work` returns; if it raises a UserError on any rank, all ranks raise AgreedError with its message."""
        if self.communicator.size == 1:
            return work()
        result, problem = None, None
        try:
            result = work()
        except UserError as error:
            problem = str(error)
        said = exchange(self.communicator, problem)
        for rank, message in enumerate(said):
            if message is not None:
                raise AgreedError(message if None not in said else f"rank {rank}: {message}")
        return cast(Value, result)

    def told_by_first(self, work: Callable[[], str]) -> str:
        """What `work` returns on rank 0, on all; of a UserError all are told likewise."""
        done = self.together(lambda: work() if self.leads else "")
        return str(exchange(self.communicator, done)[0])


def _difference(one: Any, other: Any, path: str = "") -> str:
    """The first entry in which two values differ: "train.lr is 0.1 and 0.2"."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            if one.get(key) != other.get(key):
                return _difference(one.get(key), other.get(key), f"{path}.{key}" if path else key)
    return f"{path or 'it'} is {one!r} and {other!r}"


@contextmanager
def session(device: str = "auto") -> Iterator[Session]:
    """All that the processes of a run do, from finding each other to their common end.

    An exception that leaves the block on one rank is printed by rank 0 with that rank's name, and ends all of them
    within seconds, with exit code 2 for a UserError and 1 for others; so does the death of a rank. An AgreedError ends
    each by itself, rank 0 with the message.

    Raises UserError if a launcher started several processes and they cannot work together.
    """
    launch = detect()
    if launch.size == 1:
        yield Session(LOCAL, choose_backend(device))
        return
    if launch.local_rank:
        leave_to_another()
    found = _silent_but_first(launch, device)
    try:
        yield found
    except AgreedError:
        found.communicator.barrier()
        _finish(found)
        if found.leads:
            raise
        sys.exit(2)
    except BaseException as error:
        assert found.watch is not None
        if isinstance(error, OtherRankFailed):
            found.watch.wait_for_end()
        found.watch.fail(*_explained(error))
    _finish(found)


def _explained(error: BaseException) -> tuple[str, int]:
    """What is said of an exception that ends a rank, and the exit code."""
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, TrainingDiverged):
        return str(error), PEER_FAILED
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}", PEER_FAILED


def _finish(found: Session) -> None:
    assert found.watch is not None
    found.watch.close()
    found.communicator.close()


def _silent_but_first(launch: Launch, device: str) -> Session:
    """The session; of an error that all ranks have only rank 0 speaks."""
    try:
        return _open(launch, device)
    except AgreedError:
        if launch.rank == 0:
            raise
        sys.exit(2)


def _open(launch: Launch, device: str) -> Session:
    if importlib.util.find_spec("mpi4py") is None:
        return _open_without_mpi(launch, device)
    from .mpi import MpiCommunicator

    try:
        mpi = MpiCommunicator()
    except (ImportError, RuntimeError) as error:
        raise AgreedError(
            f"{launch.launcher} started {launch.size} processes, but mpi4py finds no MPI library "
            f"({str(error).splitlines()[0][:120]}): pip install 'ttr-gpu[mpi]', or load your cluster's MPI module"
        ) from None
    if mpi.size != launch.size:
        raise AgreedError(
            f"{launch.launcher} started {launch.size} processes, but for mpi4py this is one of {mpi.size}: its "
            f"library, {mpi.name}, is not of the same MPI. Use the mpirun that belongs to it "
            f"({sys.prefix}/bin/mpirun), or srun --mpi=pmi2"
        )
    unwatched = Session(mpi, CPU)
    backend = unwatched.together(lambda: choose_backend(device, mpi.local_rank))
    unwatched.agree("--device", backend.name)
    watch = _watch_over(mpi)
    watch.leave = mpi.abort
    watch.start()
    if backend.name == "cpu":
        return Session(mpi, backend, watch)
    from .nccl import NcclCommunicator, new_identifier

    identifier = bytes.fromhex(exchange(mpi, new_identifier(backend.xp).hex() if mpi.rank == 0 else "")[0])
    nccl = NcclCommunicator(backend.xp, mpi.rank, mpi.size, mpi.local_rank, mpi.local_size, identifier)
    return Session(nccl, backend, watch)


def _watch_over(mpi: Communicator) -> Watch:
    """The watch of ranks that MPI has brought together."""
    host = socket.gethostname()
    one_machine = len(set(exchange(mpi, host))) == 1
    if mpi.rank == 0:
        server = listen("127.0.0.1" if one_machine else "")
        address = ["127.0.0.1" if one_machine else host, server.getsockname()[1], secrets.token_hex(16)]
        exchange(mpi, address)
        return accept(server, mpi.size, str(address[2]))
    host, port, token = exchange(mpi, None)[0]
    return connect(host, port, mpi.rank, mpi.size, token)[0]


def _open_without_mpi(launch: Launch, device: str) -> Session:
    """GPUs need MPI for nothing but to find each other: rank 0's address does, in TTR_MASTER=host:port."""
    host, _, port = os.environ.get("TTR_MASTER", "").rpartition(":")
    if not port.isdigit() or device == "cpu":
        raise AgreedError(
            f"{launch.launcher} started {launch.size} processes, but mpi4py, through which they would train together, "
            "is not installed: pip install 'ttr-gpu[mpi]'; or, on GPUs alone, set TTR_MASTER=host:port to a free port "
            "of rank 0's machine; or start one process"
        )
    backend = choose_backend("gpu", launch.local_rank)
    from .nccl import NcclCommunicator, new_identifier

    token = os.environ.get("TTR_TOKEN") or os.environ.get("SLURM_JOB_ID", "")
    if launch.rank == 0:
        server, identifier = listen("", int(port)), new_identifier(backend.xp)
        watch = accept(server, launch.size, token, {"nccl": identifier.hex()})
    else:
        watch, message = connect(host, int(port), launch.rank, launch.size, token)
        identifier = bytes.fromhex(message["nccl"])
    watch.start()
    nccl = NcclCommunicator(backend.xp, launch.rank, launch.size, launch.local_rank, launch.local_size, identifier)
    return Session(nccl, backend, watch)

"""Run by test_session.py on every rank: a session that ends in the way that is asked for."""

import os
import signal
import sys
import time

from ttr_gpu.distributed.session import AgreedError, session
from ttr_gpu.errors import TrainingDiverged, UserError


def work():
    if who in (rank, -1):
        raise UserError("data.zarr: no such data set")


how, who = sys.argv[1], int(sys.argv[2])
try:
    with session("cpu") as run:
        rank = run.communicator.rank
        run.communicator.barrier()
        if how == "agree":
            run.agree("configuration", {"model": {"width": 8}, "train": {"lr": 0.5 if rank == who else 0.25}})
        if how == "together":
            run.together(work)
        if rank == who:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "user":
                raise UserError("disk full")
            if how == "diverged":
                raise TrainingDiverged("the loss is nan")
            if how == "defect":
                raise ValueError("a defect")
            if how == "interrupt":
                raise KeyboardInterrupt
        if how != "finish":
            # As in a collective that can never end: neither MPI nor Python would wake this up. Longer than tests wait.
            time.sleep(600)
    print(f"rank {rank} finished")
except AgreedError as error:
    print(f"agreed: {error}", flush=True)
    sys.exit(2)

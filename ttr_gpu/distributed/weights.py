"""That all ranks have the same weights: made so at the start, and looked at now and then."""

from __future__ import annotations

import zlib

import numpy as np

from ..backend import to_host
from ..errors import TrainingDiverged
from ..model import TransformerModel
from .communicator import Communicator


def broadcast_weights(communicator: Communicator, model: TransformerModel) -> None:
    """Give every rank the weights of rank 0."""
    if communicator.size > 1:
        communicator.broadcast(model.flat.values)
        model.values_changed()


def check_equal(communicator: Communicator, model: TransformerModel, step: int) -> None:
    """TrainingDiverged, on all ranks, if one's weights are not to the bit those of rank 0: a fault of memory, of the
    network or of a library, after which the ranks would train different models."""
    if communicator.size == 1:
        return
    mine = zlib.crc32(to_host(model.flat.values).data)
    checksums = communicator.all_gather(np.array([mine], np.int64)).reshape(-1)
    different = np.flatnonzero(checksums != checksums[0])
    if len(different):
        raise TrainingDiverged(
            f"step {step}: the weights of rank {int(different[0])} are no longer those of rank 0 (checksums differ); "
            "that machine, its network or its libraries are at fault; go on without it from the last checkpoint"
        )

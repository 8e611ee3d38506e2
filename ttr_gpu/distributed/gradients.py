"""Gradients of all ranks, summed while the backward still runs (Li et al. 2020, *PyTorch Distributed: Experiences on
Accelerating Data Parallel Training*, §3.2): the blocks' matrices lie together in the order of the blocks, after them
those of the heads; so what the heads or the last blocks have finished is one piece of memory, sent off while the first
blocks still compute."""

from __future__ import annotations

from ..model import TransformerModel
from ..model_size import ModelSize, model_size
from .communicator import Communicator, Span

# Pieces of at least this size, and not many: each costs a message's delay.
_LEAST_BYTES, _MOST_PIECES = 1 << 20, 8


class GradientSum:
    """The sum over all ranks of `model.flat.gradients`, in place, in a few pieces.

    A step's last backward calls `block_done` after the heads and after each block, from the last to the first; `finish`
    sums what is left and waits. Every rank sums the same pieces in the same order, whether it has a batch or not.
    """

    def __init__(self, model: TransformerModel, communicator: Communicator) -> None:
        self._communicator, self._gradients = communicator, model.flat.gradients
        self._pieces = pieces(model)
        self._begun = 0

    def block_done(self, index: int) -> None:
        """The gradients of block `index`, of those above it and of the heads are complete."""
        while self._begun < len(self._pieces) and self._pieces[self._begun][0] >= index:
            self._communicator.start_all_reduce(self._gradients[self._pieces[self._begun][1]])
            self._begun += 1

    def finish(self) -> list[Span]:
        """All gradients are complete: sum what has not begun, wait; when each piece was summed, if that is known."""
        self.block_done(-1)
        self._begun = 0
        return self._communicator.wait()


def pieces(model: TransformerModel) -> list[tuple[int, slice]]:
    """(lowest block, part of the flat gradients) in the order in which a backward completes them: the matrices of heads
    of their own, with the number of blocks; those of the blocks; all the rest, with −1."""
    size, layers = model_size(model.config), model.config.num_layers
    blocks = layers * size.block_matrices
    found = []
    for lowest, count in divided(size, layers, model.flat.gradients.itemsize):
        start = blocks if lowest == layers else lowest * size.block_matrices if lowest >= 0 else size.total - count
        found.append((lowest, slice(start, start + count)))
    return found


def divided(size: ModelSize, layers: int, itemsize: int) -> list[tuple[int, int]]:
    """(lowest block, number of gradients) of each piece, as in `pieces`."""
    least = max(_LEAST_BYTES, size.total * itemsize // _MOST_PIECES)
    alone = size.heads if size.heads * itemsize >= least else 0
    found, high = [(layers, alone)] if alone else [], layers
    for index in range(layers - 1, -1, -1):
        count = (high - index) * size.block_matrices
        if index == 0 or count * itemsize >= least:
            found.append((index, count))
            high = index
    found.append((-1, size.total - layers * size.block_matrices - alone))
    return found

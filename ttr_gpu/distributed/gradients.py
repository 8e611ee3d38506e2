"""Gradients of all ranks, summed while the backward still runs (Li et al. 2020, *PyTorch Distributed: Experiences on
Accelerating Data Parallel Training*, §3.2): the blocks' matrices lie together in the order of the blocks, so what the
last blocks have finished is one piece of memory, sent off while the first ones still compute."""

from __future__ import annotations

from ..model import TransformerModel
from .communicator import Communicator, Span

# Pieces of at least this size, and not many: each costs a message's delay.
_LEAST_BYTES, _MOST_PIECES = 1 << 20, 8


class GradientSum:
    """The sum over all ranks of `model.flat.gradients`, in place, in a few pieces.

    A step's last backward calls `block_done` after each block, from the last to the first; `finish` sums what is left
    and waits. Every rank sums the same pieces in the same order, whether it has a batch or not.
    """

    def __init__(self, model: TransformerModel, communicator: Communicator) -> None:
        self._communicator, self._gradients = communicator, model.flat.gradients
        self._pieces = pieces(model)
        self._begun = 0

    def block_done(self, index: int) -> None:
        """The gradients of block `index` and of those above it are complete."""
        while self._begun < len(self._pieces) and self._pieces[self._begun][0] >= index:
            self._communicator.start_all_reduce(self._gradients[self._pieces[self._begun][1]])
            self._begun += 1

    def finish(self) -> list[Span]:
        """All gradients are complete: sum what has not begun, wait; when each piece was summed, if that is known."""
        self.block_done(-1)
        self._begun = 0
        return self._communicator.wait()


def pieces(model: TransformerModel) -> list[tuple[int, slice]]:
    """(lowest block, part of the flat gradients) in the order in which a backward completes them; the last piece is all
    that is not in the blocks' matrices, with −1."""
    flat, itemsize = model.flat, model.flat.gradients.itemsize
    least = max(_LEAST_BYTES, flat.gradients.nbytes // _MOST_PIECES)
    starts = [min(flat.offset(p) for p in block.parameters if p.decay) for block in model.blocks]
    end = starts[-1] + sum(p.value.size for p in model.blocks[-1].parameters if p.decay)
    found, high = [], end
    for index in range(len(starts) - 1, -1, -1):
        if index == 0 or (high - starts[index]) * itemsize >= least:
            found.append((index, slice(starts[index], high)))
            high = starts[index]
    found.append((-1, slice(end, len(flat.gradients))))
    return found

"""Checkpoints written while training goes on: a copy is taken between two steps, and a thread writes it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np

from ttr_kernels.common.arrays import Array

from ..backend import copy_to_host
from .averages import Averages
from .checkpoint import checkpoint_arrays, prune, write_checkpoint
from .config import RunConfig
from .optimizer import Optimizer
from .safetensors_file import Abandoned


class CheckpointWriter:
    """Saves a run's checkpoints, at most one at a time: what is due while one is being written waits for it.

    A step waits for the copy alone. The copy's memory is kept from one checkpoint to the next.

    Args:
        folder: of the checkpoints.
        data: what checkpoints say of the data set.
        step: of the checkpoint that the run goes on from, None for a new run.

    Attributes:
        copied_step: of the newest checkpoint that was begun; saved_step: of the newest that is whole.
    """

    def __init__(self, folder: Path, data: dict[str, Any], step: int | None = None) -> None:
        self.folder, self.data = folder, data
        self.copied_step = self.saved_step = step
        self._copies: dict[str, dict[str, Array]] = {}
        self._thread: threading.Thread | None = None
        self._abandon = threading.Event()
        self._error: Exception | None = None

    def save(
        self, config: RunConfig, state: dict[str, Any], optimizer: Optimizer, averages: Averages | None = None, *,
        keep_last: int, best_step: int | None,
    ) -> None:  # fmt: skip
        """Begin to save where the run stands; once that is done, checkpoints that are not to be kept are removed.

        Raises what made the checkpoint before fail.
        """
        self.wait()
        for file, arrays in checkpoint_arrays(optimizer, averages).items():
            copies = self._copies.setdefault(file, {})
            for name, array in arrays.items():
                if name not in copies:
                    copies[name] = np.empty(array.shape, array.dtype)
                copy_to_host(copies[name], array)
        step = self.copied_step = state["step"]

        def work() -> None:
            try:
                final = self.folder / f"step-{step:08d}"
                write_checkpoint(final, config, self.data, state, self._copies, self._abandon.is_set)
                self.saved_step = step
                prune(self.folder, step, keep_last, best_step)
            except Abandoned:
                return
            except Exception as error:
                self._error = error

        # A daemon: a second Ctrl-C ends the program, whatever a disk that hangs is doing.
        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    def saved_elsewhere(self, step: int) -> None:
        """Another process saves this step of the run."""
        self.copied_step = self.saved_step = step

    def check(self) -> None:
        """Raise what has made a checkpoint fail, such as UserError for a full disk; does not wait."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is whole; raises as `check` does."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def close(self, abandon: bool = False) -> None:
        """Wait as `wait` does, and raise nothing: for when another error has ended the run.

        With `abandon` a checkpoint that is not whole by then is given up, and nothing is left of it.
        """
        if abandon:
            self._abandon.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            # Forgotten before it is waited for, so that one more Ctrl-C does not wait again.
            thread.join()

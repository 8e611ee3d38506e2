"""Metrics to Weights & Biases or Trackio, for those who have them (extras `wandb` and `trackio` of the package)."""

from __future__ import annotations

import contextlib
import importlib
import os
import uuid
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError

TrackerName = Literal["wandb", "trackio"]


class Tracker:
    """Sends a run's scalars to one of the two. A resumed run goes on in the same run there.

    wandb reads its own environment (WANDB_PROJECT, WANDB_MODE=offline, …); its files lie in the run's folder.

    Args:
        name: "wandb" or "trackio".
        folder: of the run; its name is that of the run there.
        config: of the run, as nested dictionaries.
    """

    def __init__(self, name: str, folder: Path, config: dict[str, Any]) -> None:
        self.name = name
        try:
            self._module = importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"--tracker: {name} is not installed ({error}): pip install 'ttr-gpu[{name}]'") from None
        project = os.environ.get("WANDB_PROJECT" if name == "wandb" else "TRACKIO_PROJECT", "ttr-gpu")
        options: dict[str, Any] = {"project": project, "name": folder.name, "config": config, "resume": "allow"}
        if name == "wandb":
            options |= {"id": _identifier(folder / "wandb.id"), "dir": str(folder)}
        with self._explained("cannot begin a run"):
            self._run = self._module.init(**options)
            if name == "wandb":
                # Else wandb drops what a resumed run reports anew: its own count of steps never goes back.
                self._run.define_metric("*", step_metric="step")

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Report values by name, all of one step."""
        with self._explained("does not take a run's metrics"):
            if self.name == "wandb":
                self._module.log({**values, "step": step})
            else:
                self._module.log(values, step=step)

    def close(self) -> None:
        """The run has ended; what is under way is waited for."""
        with self._explained("cannot finish a run"):
            self._module.finish()

    @contextlib.contextmanager
    def _explained(self, what: str) -> Any:
        """Whatever the library raises, as one line."""
        try:
            yield
        except Exception as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"--tracker: {self.name} {what}: {first}; without --tracker, metrics.jsonl has all"
            ) from None


def _identifier(path: Path) -> str:
    """What the run is called in the tracker's database: drawn once, then read."""
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12] + "\n")
    return path.read_text().strip()

"""Runs of a model of some thousand parameters, whose steps take a millisecond."""

from __future__ import annotations

from pathlib import Path

from ttr_gpu.train.checkpoint import find_checkpoint, open_checkpoint
from ttr_gpu.train.metrics import read_metrics
from ttr_gpu.train.run import RunOptions, train
from ttr_gpu.train.trainer import Outcome

SMALL = (
    "model.embed_dim=16", "model.hidden_dim=32", "model.num_heads=2", "model.num_layers=1", "train.max_length=16",
    "train.tokens_per_batch=64", "train.steps=20",
)  # fmt: skip


def run(data: Path, out: Path, *assignments: str, **options: object) -> tuple[Outcome, list[str]]:
    """Train into out/run: how it ended, and every line that was printed."""
    said: list[str] = []
    options = {"preset": "nano", "name": "run", **options}
    outcome = train(RunOptions(data, out=out, assignments=(*SMALL, *assignments), **options), said.append)
    return outcome, said


def resume(data: Path, path: Path, *assignments: str, **options: object) -> tuple[Outcome, list[str]]:
    """Go on with a run (its folder, or a checkpoint)."""
    said: list[str] = []
    outcome = train(RunOptions(data, resume=str(path), assignments=assignments, **options), said.append)
    return outcome, said


def weights(path: Path):
    """All values of a run's last checkpoint."""
    return open_checkpoint(find_checkpoint(path)).load_model().flat.values


def records(folder: Path, kind: str = "step") -> list[dict[str, object]]:
    """Records of a run that must be the same bits whenever and however often it is run."""
    timed = ("time", "seconds", "wait_seconds", "memory")
    found = [record for record in read_metrics(folder) if record["kind"] == kind]
    return [{name: value for name, value in record.items() if name not in timed} for record in found]

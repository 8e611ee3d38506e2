"""Data to train on."""

from pathlib import Path

import numpy as np
import pytest

from ttr_gpu.data.options import PreprocessOptions
from ttr_gpu.data.preprocess import preprocess

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "data"


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Events whose next type is the one before plus one, now and then something else."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    rows = ["sequence,time,type"]
    for s in range(60):
        time, kind = 0.0, int(rng.integers(5))
        for _ in range(20):
            time += float(rng.exponential(2.0))
            rows.append(f"{s},{time!r},{kind}")
            kind = (kind + 1) % 5 if rng.random() < 0.9 else int(rng.integers(5))
    (folder / "in.csv").write_text("\n".join(rows))
    preprocess(PreprocessOptions([str(folder / "in.csv")], folder / "data.zarr"), lambda line: None)
    return folder / "data.zarr"


@pytest.fixture(scope="session")
def stackoverflow(tmp_path_factory):
    """The events shipped with the project."""
    out = tmp_path_factory.mktemp("stackoverflow") / "data.zarr"
    preprocess(PreprocessOptions([str(EXAMPLES / "stackoverflow.csv.gz")], out), lambda line: None)
    return out

"""The command line in this process, and data to call it on."""

import io
import shutil
import sys
from pathlib import Path

import pytest
from command_line import TINY, Result, event_rows, without_progress

from ttr_cli.main import main
from ttr_kernels.common.parallel import get_threads, set_threads


@pytest.fixture
def ttr(capsys, monkeypatch):
    """`ttr("preprocess", path, …)`: the command in this process."""

    def run(*arguments: object, stdin: bytes | None = None) -> Result:
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments]) or 0
        except SystemExit as ended:
            code = ended.code or 0
        captured = capsys.readouterr()
        return Result(code, captured.out, without_progress(captured.err))

    threads = get_threads()
    yield run
    set_threads(threads)


@pytest.fixture
def preprocess(ttr, tmp_path):
    """Write a file, preprocess it into tmp_path/data.zarr, and return the command's result."""

    def run(name, content, *options):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return ttr("preprocess", path, "-o", tmp_path / "data.zarr", *options)

    return run


def _preprocessed(folder: Path, name: str, content: str, *options: str) -> Path:
    source = folder / name
    source.write_text(content)
    main(["preprocess", str(source), "-o", str(folder / "data.zarr"), *options])
    return folder / "data.zarr"


@pytest.fixture(scope="session")
def events(tmp_path_factory):
    """A data set of events that must not be changed."""
    return _preprocessed(tmp_path_factory.mktemp("events"), "log.csv", event_rows())


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A data set of texts that must not be changed."""
    lines = "".join(f"line {i} says hello to {i % 7}\n" for i in range(60))
    return _preprocessed(tmp_path_factory.mktemp("texts"), "log.txt", lines, "--tokenizer", "bytes")


@pytest.fixture(scope="session")
def run(events, tmp_path_factory):
    """A finished run of three steps on `events`, which must not be changed."""
    out = tmp_path_factory.mktemp("runs")
    main(["train", str(events), *TINY, "--set", "train.steps=3", "--out", str(out), "--name", "run"])
    return out / "run"


@pytest.fixture
def copy(events, tmp_path):
    """A data set of events to damage."""
    return Path(shutil.copytree(events, tmp_path / "data.zarr"))

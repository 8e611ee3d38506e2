"""Data sets on disk: what is missing, damaged or foreign is refused in one line; large ones are whole."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ttr_gpu.data import sharded_array
from ttr_gpu.data.dataset import open_dataset, verify
from ttr_gpu.data.options import PreprocessOptions
from ttr_gpu.data.preprocess import preprocess
from ttr_gpu.data.tokenizer import byte_tokenizer, train_bpe
from ttr_gpu.errors import UserError


@pytest.fixture
def data(tmp_path):
    source = tmp_path / "in.csv"
    source.write_text("sequence,time,type\n" + "".join(f"{i // 5},{i},{i % 3}\n" for i in range(100)))
    preprocess(PreprocessOptions([str(source)], tmp_path / "data.zarr"), lambda line: None)
    return tmp_path / "data.zarr"


def shard_of(data: Path) -> Path:
    return next(p for p in (data / "train" / "tokens").rglob("*") if p.is_file() and p.name != "zarr.json")


def test_missing_data_set_suggests_a_name(data):
    with pytest.raises(UserError, match=r"did you mean .*data\.zarr"):
        open_dataset(data.with_name("dat.zarr"))


def test_a_text_file_is_no_data_set(data):
    with pytest.raises(UserError, match="ttr-gpu preprocess"):
        open_dataset(data.with_name("in.csv"))


def test_a_folder_without_metadata(tmp_path):
    with pytest.raises(UserError, match=r"no zarr\.json"):
        open_dataset(tmp_path)


def test_another_version(data):
    meta = json.loads((data / "zarr.json").read_text())
    meta["attributes"]["format_version"] = 99
    (data / "zarr.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="format version 99, this release reads 1"):
        open_dataset(data)


def test_a_lost_shard_is_an_error_and_not_zeros(data):
    shard_of(data).unlink()
    with pytest.raises(UserError, match="is missing"):
        open_dataset(data)


def test_a_truncated_shard(data):
    shard = shard_of(data)
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(UserError, match="cut short"):
        open_dataset(data)


def test_verify_names_a_changed_byte_and_a_foreign_file(data):
    shard = shard_of(data)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (data / "stray").write_text("x")
    bad = verify(data)
    assert len(bad) == 2
    assert str(shard) in bad[0]
    assert "wrong checksum" in bad[0]
    assert "does not belong" in bad[1]


def test_an_absent_split_names_those_there(data):
    with pytest.raises(UserError, match="it has train, validation, test"):
        open_dataset(data).split("dev")


def test_several_shards(data, tmp_path, monkeypatch):
    monkeypatch.setattr(sharded_array, "SHARD_BYTES", 8 << 10)
    monkeypatch.setattr(sharded_array, "CHUNK_BYTES", 1 << 10)
    source = tmp_path / "long.csv"
    times = np.cumsum(np.random.default_rng(0).exponential(1.0, 5000))
    source.write_text("sequence,time\n" + "".join(f"{i // 50},{t!r}\n" for i, t in enumerate(times.tolist())))
    preprocess(PreprocessOptions([str(source)], tmp_path / "long.zarr"), lambda line: None)
    dataset = open_dataset(tmp_path / "long.zarr")
    files = [p for p in (dataset.path / "train" / "times").rglob("*") if p.is_file() and p.name != "zarr.json"]
    assert len(files) == 4
    split = dataset.split("train")
    _, got = split.read(0, split.token_count)
    assert np.isin(got + dataset.origin, times).mean() > 0.99
    assert split.token_count == 4000


def test_byte_level_tokenizers_bring_back_any_text():
    from hypothesis import given, settings
    from hypothesis import strategies as st

    tokenizers = byte_tokenizer(), train_bpe(iter(["the cat sat on the mat"] * 5), 270)

    @settings(max_examples=60, deadline=None)
    @given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
    def check(text):
        for tokenizer in tokenizers:
            assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text

    check()


# Smaller shards than usual: what is held of them (a few, of 64 MiB) is a constant, which a small input would not show.
MEMORY_SCRIPT = """
import sys
from pathlib import Path
from ttr_gpu.data import sharded_array
from ttr_gpu.data.options import PreprocessOptions
from ttr_gpu.data.preprocess import preprocess
sharded_array.SHARD_BYTES = 8 << 20
tokenizer = 'bytes' if sys.argv[1].endswith('.txt') else 'bpe'
preprocess(PreprocessOptions([sys.argv[1]], Path(sys.argv[2]), tokenizer=tokenizer), lambda line: None)
"""


@pytest.mark.parametrize("kind", ["events", "text"])
def test_memory_does_not_grow_with_the_input(tmp_path, kind):
    """Under a limit on private memory (RLIMIT_DATA) that holds a small part of the input, and not all of it."""
    source = tmp_path / ("big.csv" if kind == "events" else "big.txt")
    with source.open("w") as file:
        if kind == "events":
            file.write("sequence,time,type\n")
            for i in range(600_000):
                file.write(f"user-{i % 1000},{1.7e9 + i * 1.5:.3f},type-{i % 11}\n")
        else:
            for i in range(40_000):
                file.write(f"document number {i} " + "with some words in it " * 30 + "\n")

    def limit():
        # The interpreter and its libraries take half of it. The text is 25 MiB, and 300 MiB as tokens with their times.
        resource.setrlimit(resource.RLIMIT_DATA, (300 << 20, 300 << 20))

    environment = {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "RAYON_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(source), str(tmp_path / "out.zarr")],
        preexec_fn=limit, capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert open_dataset(tmp_path / "out.zarr").split("train").token_count > 400_000

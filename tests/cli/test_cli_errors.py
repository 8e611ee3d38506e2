"""Bad input gets one line with the remedy and exit code 2, no traceback; --debug shows it."""

import json
import shutil

import pytest
from command_line import TINY


def shard(data, array="train/tokens"):
    return next(path for path in (data / array).rglob("*") if path.is_file() and path.name != "zarr.json")


def edit_attributes(data, **changes):
    described = json.loads((data / "zarr.json").read_text())
    described["attributes"].update(changes)
    (data / "zarr.json").write_text(json.dumps(described))


# --- commands, options and keys


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["trian", "data.zarr"], ["no such command 'trian'", "did you mean 'train'?"]),
        (["xyzzy"], ["no such command 'xyzzy'", "commands: preprocess, inspect, train, eval"]),
        (["train"], ["missing argument 'DATA'", "`ttr-gpu train --help`"]),
        (["preprocess", "in.csv"], ["missing option '-o' / '--output'", "`ttr-gpu preprocess --help`"]),
        (["train", "d", "--lr", "1"], ["no such option --lr", "--set train.lr=VALUE"]),
        (["train", "d", "--embed-dim", "8"], ["no such option --embed-dim", "--set model.embed_dim=VALUE"]),
        (["train", "d", "--naem", "x"], ["no such option --naem", "did you mean --name?"]),
        (["train", "d", "--threads", "0"], ["invalid value for '--threads'", "0 is not in the range"]),
        (["train", "d", "--threads", "x"], ["invalid value for '--threads'", "'x' is not a valid integer"]),
        (["train", "d", "--threads", "4096"], ["--threads: got 4096", "the cores usable here"]),
        (["eval", "r", "d", "--threads", "4096"], ["--threads: got 4096"]),
        (["bench", "--threads", "4096"], ["--threads: got 4096"]),
        (["bench", "kernels", "--only", "ropee"], ["--only: got 'ropee'", "attention", "rope"]),
        (["bench", "models"], ["'models' is not 'kernels'"]),
        (["inspect", "d", "--samples", "-1"], ["--samples", "-1 is not in the range"]),
    ],
)
def test_command_line(ttr, arguments, fragments):
    ttr(*arguments).error(*fragments)


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("{}", ["got something that is not a file of `ttr-gpu bench --output`", "'threads'", "write one anew"]),
        ("[1", ["not a file of `ttr-gpu bench --output`"]),
        ("[1]", ["not a file of `ttr-gpu bench --output`"]),
        (
            '{"device": "gpu", "threads": 1, "timings": []}',
            ["timings of the gpu, expected the cpu", "--device gpu"],
        ),
        ('{"threads": 2, "timings": [{"operation": "rope"}]}', ["not a file of `ttr-gpu bench --output`", "'case'"]),
        ('{"threads": 9, "timings": []}', ["got timings of 9 threads, expected 1; add --threads 9"]),
    ],
)
def test_what_bench_cannot_compare_with(ttr, tmp_path, text, fragments):
    (tmp_path / "old.json").write_text(text)
    ttr("bench", "--only", "rope", "--threads", "1", "--compare", tmp_path / "old.json").error(*fragments)
    ttr("bench", "--compare", tmp_path / "no.json").error("no.json: no such file", "bench --output")


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--set", "train.lrr=1"], ["unknown key 'train.lrr'", "did you mean train.lr?"]),
        (["--set", "lr=1"], ["unknown key 'lr'", "did you mean train.lr?"]),
        (["--set", "model.embed_dims=8"], ["did you mean model.embed_dim?"]),
        (["--set", "train.lr=fast"], ["train.lr: got 'fast'"]),
        (["--set", "train.lr"], ["expected key=value"]),
        (["--preset", "nanoo"], ["--preset: got 'nanoo'", "small, gpt2, gpt2-xl", "did you mean 'nano'?"]),
        (["--config", "missing.toml"], ["missing.toml: no such file"]),
        (["--device", "gpu"], ["got gpu", "use --device cpu"]),
        (["--device", "tpu"], ["got 'tpu'", "auto, cpu or gpu"]),
        (["--resume", "nothing"], ["nothing: no such folder", "expected a run folder"]),
        (["--resume", "auto", "--out", "nothing"], ["nothing holds no run"]),
        (["--resume", "x", "--preset", "nano"], ["--preset: cannot be combined with --resume"]),
        (["--resume", "x", "--name", "y"], ["--name: cannot be combined with --resume"]),
        (["--resume", "x", "--precision", "float16"], ["--precision: cannot be combined with --resume"]),
        (["--resume", "x", "--plan"], ["--plan: cannot be combined with --resume"]),
        (["--resume", "x", "--continue"], ["--continue: cannot be combined with --resume"]),
        (["--name", "x", "--continue", "--plan"], ["--continue: cannot be combined with --plan"]),
        (["--name", "x", "--continue", "--sweep", "y"], ["--sweep: cannot be combined with --continue"]),
        (["--continue"], ["--continue: expected the --name of the run"]),
        (["--precision", "float8"], ["--precision", "float8", "bfloat16"]),
        (["--memory-limit", "much"], ["--memory-limit: got 'much'", "a size such as 4GiB"]),
        (["--memory-limit", "1MiB", *TINY], ["--memory-limit: got 1.0 MiB, expected at least", "use a smaller model"]),
        (["--memory-limit", "1GiB", "--set", "train.recompute=block"],
         ["--memory-limit: cannot be combined with --set train.recompute"]),
        (["--preset", "nano", "--set", "train.tokens_per_batch=100000"],
         ["a batch of 100000 tokens is larger than the data", "try --set train.tokens_per_batch="]),
    ],
)  # fmt: skip
def test_train_options(ttr, events, tmp_path, monkeypatch, options, fragments):
    monkeypatch.chdir(tmp_path)
    ttr("train", events, *options).error(*fragments)
    assert not list(tmp_path.rglob("runs/*")), "a run that never began left something behind"


# --- plans for many machines


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--gpus", "8", "--ranks", "2"], ["--ranks: got it with --gpus", "expected one of the two"]),
        (["--gpus", "8", "--products", "0"], ["--products", "0.0 is not in the range x>0"]),
        (["--gpus", "8", "--link-bandwidth", "nan"], ["--link-bandwidth: got nan, expected a finite number"]),
        (["--gpus", "8", "--overlap", "1.5"], ["--overlap", "1.5 is not in the range"]),
        (["--gpus", "8", "--global-tokens", "100"], ["--global-tokens: got 100", "for each of 8 ranks"]),
        (["--no-measure"], ["--products: expected a rate with --no-measure"]),
        (["--preset", "gpt3"], ["--preset: got 'gpt3'", "did you mean 'gpt2'?"]),
        (["nowhere.zarr", "--gpus", "8"], ["nowhere.zarr: no such data set"]),
    ],
)
def test_plan_options(ttr, options, fragments):
    ttr("plan", *options).error(*fragments)


def test_a_plan_of_64_machines(ttr, tmp_path):
    out = ttr(
        "plan", "--nodes", "64", "--gpus", "8", "--preset", "gpt2-xl", "--precision", "bfloat16", "--output",
        tmp_path / "plan.json",
    ).ok("1,560,146,528 parameters", "assumed: 65 % of the 989 TFLOP/s in the data sheet of the H200")  # fmt: skip
    assert "measured" not in out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert [row["ranks"] for row in plan["rows"]] == [8, 16, 32, 64, 128, 256, 512]
    assert all(row["memory_bytes"] > row["memory_bytes_sharded"] > 12 * 1.5e9 for row in plan["rows"])


# --- data sets


@pytest.mark.parametrize("command", ["train", "inspect"])
def test_no_such_data_set(ttr, command, copy):
    ttr(command, copy.with_name("missing.zarr")).error("missing.zarr: no such data set", "ttr-gpu preprocess INPUT")
    ttr(command, copy.with_name("dat.zarr")).error("dat.zarr: no such data set", f"did you mean {copy}?")


@pytest.mark.parametrize("command", ["train", "inspect"])
def test_a_file_or_an_empty_folder_is_no_data_set(ttr, command, tmp_path):
    (tmp_path / "log.csv").write_text("a,b\n")
    ttr(command, tmp_path / "log.csv").error("is a file, expected a data set", "ttr-gpu preprocess")
    ttr(command, tmp_path).error("is no data set", "ttr-gpu preprocess INPUT -o data.zarr")


def test_a_truncated_and_a_deleted_shard(ttr, copy):
    path = shard(copy)
    path.write_bytes(path.read_bytes()[:-7])
    again = "copy the data set again or preprocess anew"
    for command in ("train", "inspect"):
        ttr(command, copy).error(str(path), "cut short", again)
    path.unlink()
    for command in ("train", "inspect"):
        ttr(command, copy).error(str(path), "is missing", again)


def test_another_format_version(ttr, copy):
    edit_attributes(copy, format_version=7)
    ttr("train", copy).error("has format version 7, this release reads 1", "preprocess the raw data anew")


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ("", "is damaged"),
        ('{"zarr_format": 3, "attr', "is damaged"),
        ("[]", "has no attributes"),
        ('{"attributes": 5}', "has no attributes"),
        ("\udcff", "is damaged"),
        ('{"attributes": {"spam": 1}}', "no ttr-gpu data set"),
    ],
)
def test_a_damaged_zarr_json(ttr, copy, content, fragment):
    (copy / "zarr.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    ttr("train", copy).error("data.zarr", fragment, "preprocess")


def test_zarr_json_of_something_else(ttr, copy):
    described = json.loads((copy / "zarr.json").read_text())
    described["node_type"] = "array"
    (copy / "zarr.json").write_text(json.dumps(described))
    ttr("train", copy).error("zarr.json: is damaged", "preprocess anew")


def test_an_edited_attribute_is_noticed(ttr, copy):
    edit_attributes(copy, origin=0.0)
    for command in ("train", "inspect"):
        ttr(command, copy).error("zarr.json: is damaged (wrong checksum", "copy the data set again")


def test_a_flipped_byte_is_found(ttr, copy):
    path = shard(copy, "train/times")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    result = ttr("inspect", "--verify", copy)
    assert result.code == 2
    assert f"error: {path}: has a wrong checksum" in result.err.splitlines()
    # Training reads it as well; the checksum of the chunk tells.
    ttr("train", copy, *TINY, "--out", copy.parent / "runs").error("a shard cannot be read", "inspect --verify")


def test_no_train_split(ttr, copy):
    shutil.rmtree(copy / "train")
    ttr("train", copy).error("train", "is missing")


# --- runs and checkpoints


def test_an_existing_run_is_not_overwritten(ttr, events, run):
    ttr("train", events, *TINY, "--out", run.parent, "--name", "run").error(
        "exists already", "choose another --name", f"--resume {run}"
    )


def test_a_run_that_cannot_be_created(ttr, events, tmp_path):
    (tmp_path / "file").write_text("")
    ttr("train", events, *TINY, "--out", tmp_path / "file").error("cannot be created: Not a directory")


def test_a_vocabulary_that_does_not_match(ttr, run, texts, tmp_path):
    source = tmp_path / "other.csv"
    source.write_text("sequence,time,type\n" + "".join(f"{i // 20},{i},{i % 3}\n" for i in range(400)))
    ttr("preprocess", source, "-o", tmp_path / "other.zarr").ok()
    for arguments in (["eval", run, tmp_path / "other.zarr"], ["train", tmp_path / "other.zarr", "--resume", run]):
        ttr(*arguments).error("got vocabulary size 3, expected 5", "use the data set it was trained on")
    for arguments in (["eval", run, texts], ["train", texts, "--resume", run]):
        ttr(*arguments).error("got kind text, expected events")


def test_other_content_with_the_same_vocabulary_can_be_evaluated_but_not_resumed(ttr, run, events, tmp_path):
    lines = (events.parent / "log.csv").read_text().splitlines(keepends=True)
    (tmp_path / "less.csv").write_text("".join(lines[:-60]))
    ttr("preprocess", tmp_path / "less.csv", "-o", tmp_path / "less.zarr").ok()
    ttr("train", tmp_path / "less.zarr", "--resume", run).error("its content is not what", "was trained on")
    ttr("eval", run, tmp_path / "less.zarr").ok("nats per event")


def test_eval_of_what_is_no_run(ttr, run, events, tmp_path):
    ttr("eval", events, events).error("is a data set, not a run", "expected a run folder")
    ttr("eval", tmp_path, events).error("holds no checkpoint", "expected a run folder")
    ttr("eval", run, run).error("is no data set")
    ttr("eval", run, events, "--split", "dev").error("has no split 'dev'", "it has train, validation, test")
    ttr("eval", run, events, "--stride", "17").error("--stride: got 17, expected at most", "16")


def test_a_damaged_checkpoint(ttr, run, events, tmp_path):
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    path = next(broken.glob("checkpoints/*/model.safetensors"))
    path.write_bytes(path.read_bytes()[:-4])
    for arguments in (["eval", broken, events], ["train", events, "--resume", broken]):
        ttr(*arguments).error("model.safetensors: is missing or damaged", "use another checkpoint")


# --- --debug


@pytest.mark.parametrize(
    "arguments", [["inspect", "missing.zarr"], ["train"], ["preprocess", "missing.csv", "-o", "d"]]
)
def test_debug_shows_the_traceback(ttr, arguments):
    quiet = ttr(*arguments).error()
    for position in (0, len(arguments)):
        loud = ttr(*arguments[:position], "--debug", *arguments[position:])
        assert loud.code == 2
        assert loud.err.startswith("Traceback (most recent call last)")
        assert loud.err.splitlines()[-1] == quiet


def test_a_defect_of_the_program_keeps_its_traceback(ttr, monkeypatch, events):
    def broken(*arguments, **options):
        raise RuntimeError("a defect")

    monkeypatch.setattr("ttr_gpu.data.inspection.inspect_dataset", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        ttr("inspect", events)


def test_out_of_memory_is_one_line(ttr, monkeypatch, events):
    def greedy(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr("ttr_gpu.data.inspection.inspect_dataset", greedy)
    ttr("inspect", events).error("out of memory", "try")

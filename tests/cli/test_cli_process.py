"""What only a process of its own shows: imports, signals, pipes, terminals, full disks."""

import json
import os
import pty
import resource
import signal
import subprocess
import sys
import threading

import pytest
from command_line import TINY, command, event_rows, finish, start

HEAVY = ("numpy", "numba", "zarr", "pydantic", "tokenizers", "rich", "matplotlib", "threadpoolctl", "asyncio")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"], ["trian"], ["train", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys\nfrom ttr_cli.main import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_console_script_is_installed():
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="ttr-gpu")
    assert script.value == "ttr_cli.main:main"


# --- preprocess, stopped


def begin_reading(output):
    """A preprocess that has read some rows and waits for more."""
    process = start("preprocess", "-", "-o", output, stdin=subprocess.PIPE)
    process.stdin.write(event_rows(400))
    process.stdin.flush()
    assert "<stdin>: events" in process.stdout.readline()
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_preprocess_leaves_nothing(tmp_path, number, code):
    process = begin_reading(tmp_path / "data.zarr")
    assert [path.suffix for path in tmp_path.iterdir()] == [f".partial-{process.pid}"]
    process.send_signal(number)
    # Its input stays open, as a pipe from a program that goes on writing would.
    process.wait(60)
    assert process.returncode == code
    assert process.stderr.read().strip() == {130: "interrupted", 143: "terminated"}[code]
    assert list(tmp_path.iterdir()) == []
    process.communicate()


def test_a_killed_preprocess_leaves_nothing_that_looks_whole(ttr, tmp_path):
    process = begin_reading(tmp_path / "data.zarr")
    process.kill()
    process.communicate()
    (left,) = tmp_path.iterdir()
    ttr("train", tmp_path / "data.zarr").error("no such data set")
    ttr("train", left).error("is no data set", "no zarr.json")
    (tmp_path / "log.csv").write_text(event_rows())
    ttr("preprocess", tmp_path / "log.csv", "-o", tmp_path / "data.zarr").ok(f"note: {left} was left by a run")


def test_ctrl_c_does_not_wait_for_the_tokenizer(tmp_path):
    (tmp_path / "long.txt").write_text("\n".join(f"{i * 7919 % 1000003} {i * 104729 % 999983}" for i in range(200_000)))
    process = start("preprocess", tmp_path / "long.txt", "-o", tmp_path / "data.zarr", "--vocab-size", 30000)
    while not list(tmp_path.glob("*.partial-*/spool/texts")):
        assert process.poll() is None
    # Reading takes about a second here, training many.
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)
    process.send_signal(signal.SIGINT)
    result = finish(process)
    assert (result.code, result.err.strip()) == (130, "interrupted")
    assert [path.name for path in tmp_path.iterdir()] == ["long.txt"]


LEFT_BEHIND = """
import os, signal, sys, time
from ttr_cli import main
from ttr_gpu.data.tokenizer import train_bpe

def texts():
    yield "a text"
    os.kill(os.getpid(), signal.{name})
    # Longer than an interrupted training is waited for, so that this thread asks for Python while Python ends.
    time.sleep(1)

class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(2)

sys.slow = Slow()
main.cli.main = lambda **options: train_bpe(texts(), 300)
main.main([])
"""


@pytest.mark.parametrize(("name", "code", "said"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_a_tokenizer_left_behind_does_not_abort(name, code, said):
    done = subprocess.run([sys.executable, "-c", LEFT_BEHIND.format(name=name)], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (code, said)


# --- train, stopped


def first_step(process):
    for line in process.stdout:
        if line.startswith("step"):
            return
    raise AssertionError(process.stderr.read())


def test_ctrl_c_in_a_long_evaluation_saves_and_resumes(ttr, tmp_path):
    (tmp_path / "log.csv").write_text(event_rows(sequences=200, length=60))
    data = tmp_path / "the data.zarr"
    ttr("preprocess", tmp_path / "log.csv", "-o", data, "--split", "0.1,0.8,0.1").ok()
    every = ("--set", "train.steps=1000", "--set", "train.evaluate_every=1", "--set", "train.patience=0")
    process = start("train", data, *TINY, *every, "--out", tmp_path, "--name", "run")
    first_step(process)
    process.send_signal(signal.SIGINT)
    result = finish(process)
    assert result.code == 130
    assert "stopping after this step; once more to stop at once" in result.err
    assert "Traceback" not in result.err
    assert "SIGINT: stopped after step" in result.out
    assert f"--resume {tmp_path / 'run'}" in result.out
    # Again as it says, for one step more.
    state = json.loads(max((tmp_path / "run").glob("checkpoints/*/state.json")).read_text())
    resumed = ttr("train", data, "--resume", tmp_path / "run", "--set", f"train.steps={state['step'] + 1}")
    resumed.ok(f"resuming {tmp_path / 'run'} after step {state['step']}", "plot", f"ttr-gpu eval {tmp_path / 'run'}")


def test_a_second_ctrl_c_stops_at_once(events, tmp_path):
    process = start("train", events, *TINY, "--set", "train.steps=1000000", "--out", tmp_path, "--name", "run")
    first_step(process)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
    result = finish(process)
    # The first alone where the second came too late to be seen.
    assert result.code == 130
    assert "Traceback" not in result.err


# --- pipes, terminals, full disks


def closed_pipe():
    """The end to write of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("arguments", [["info", "--keys"], ["inspect", "DATA"], ["inspect", "DATA", "--json"]])
def test_a_reader_that_has_gone_is_no_error(events, arguments):
    writer = closed_pipe()
    process = start(*[str(events) if a == "DATA" else a for a in arguments], stdout=writer)
    os.close(writer)
    result = finish(process)
    assert result.err == ""
    assert result.code in (1, 141)


def test_an_error_that_nobody_reads_keeps_its_exit_code():
    writer = closed_pipe()
    process = start("inspect", "missing.zarr", stderr=writer)
    os.close(writer)
    assert finish(process).code == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_output_to_a_full_disk_is_one_line(events):
    with open("/dev/full", "w") as full:
        finish(start("inspect", events, stdout=full)).error("No space left on device")


def limited(size):
    """Files of at most so many bytes: a write fails as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("size", [1 << 12, 1 << 16, 1 << 17])
@pytest.mark.parametrize("kind", ["events", "text"])
def test_a_full_disk_ends_preprocess_with_one_line(tmp_path, kind, size):
    source = tmp_path / ("log.csv" if kind == "events" else "log.txt")
    rows = event_rows(1000) if kind == "events" else "".join(f"{i} said {i * i}, {i**3}\n" for i in range(20_000))
    source.write_text(rows)
    options = ("--tokenizer", "bytes") if kind == "text" else ()
    process = start("preprocess", source, "-o", tmp_path / "data.zarr", *options, preexec_fn=limited(size))
    finish(process).error("data.zarr: cannot be written: File too large", "are free in")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("size", ["700k", "1000k", "1400k"])
def test_a_disk_that_fills_up_does_not_kill(tmp_path, size):
    """A real file system without space: a write to a mapped page would end the process by SIGBUS."""
    (tmp_path / "disk").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", tmp_path / "disk"], check=False)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        (tmp_path / "log.csv").write_text("sequence,time\n" + "".join(f"{i % 50},{i}\n" for i in range(30_000)))
        process = start("preprocess", tmp_path / "log.csv", "-o", tmp_path / "disk" / "data.zarr")
        finish(process).error("data.zarr: cannot be written: No space left on device")
        assert list((tmp_path / "disk").iterdir()) == []
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(tmp_path):
    (tmp_path / "log.csv").write_text(event_rows(300))
    arguments = ("preprocess", tmp_path / "log.csv", "-o", tmp_path / "data.zarr", "--overwrite")
    terminal, side = pty.openpty()
    seen = bytearray()

    def read():
        try:
            while part := os.read(terminal, 4096):
                seen.extend(part)
        except OSError:
            # The last writer has closed the terminal.
            return

    reader = threading.Thread(target=read)
    reader.start()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run(command(*arguments), stdout=subprocess.PIPE, stderr=side, env=environment, check=True)
    os.close(side)
    reader.join()
    os.close(terminal)
    assert b"\x1b[" in seen
    assert b"reading" in seen
    assert b"\x1b" not in done.stdout
    plain = finish(start(*arguments))
    plain.ok("wrote")
    assert "\x1b" not in plain.out

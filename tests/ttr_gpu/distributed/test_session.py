"""Ranks end together, whatever happens to one of them, and it is said which one and why."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from ranks import CHECK_ENDINGS, environ, mpirun, said_by_ranks

from ttr_gpu.distributed import watch as module
from ttr_gpu.distributed.watch import accept, connect, listen
from ttr_gpu.errors import UserError

CHECK_WATCH = Path(__file__).with_name("check_watch.py")


def test_a_session_that_ends_well():
    code, out, err = mpirun(CHECK_ENDINGS, "finish", "0")
    assert code == 0, err
    assert said_by_ranks(out, "finished") == [0, 1]


@pytest.mark.parametrize(
    ("how", "code", "reason"),
    [
        ("user", 2, "disk full"),
        ("diverged", 1, "the loss is nan"),
        ("defect", 1, "ValueError: a defect"),
        ("interrupt", 130, "interrupted"),
    ],
)
@pytest.mark.parametrize("who", [0, 1])
def test_an_exception_of_one_rank_ends_all(how, code, reason, who):
    got, out, err = mpirun(CHECK_ENDINGS, how, str(who), ranks=3)
    assert got == code, (out, err)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert lines == [f"error: rank {who} of 3 ({lines[0].split('(')[1].split(')')[0]}): {reason}"]
    assert ("Traceback" in err) == (how == "defect"), err
    assert "finished" not in out


@pytest.mark.parametrize("who", [0, 1])
def test_the_death_of_a_rank_ends_all(who):
    code, _, err = mpirun(CHECK_ENDINGS, "kill", str(who), ranks=3)
    assert code != 0
    assert "finished" not in err


def test_what_follows_a_message_is_for_the_watch():
    """A rank may die before a slow one has read that all are there: both lines lie in its socket then."""
    with listen("127.0.0.1") as server:
        there = socket.create_connection(server.getsockname())
        here, _ = server.accept()
    with here, there:
        there.sendall(b'{"where": "", "message": {}}\n{"failed": {"rank": 2}}\n')
        there.shutdown(socket.SHUT_WR)
        connection = module.Connection(here, "")
        assert connection.receive() == {"where": "", "message": {}}
        assert connection.received() == [{"failed": {"rank": 2}}]
        assert connection.received() == [None]
        with pytest.raises(ConnectionError):
            connection.receive()


@pytest.mark.parametrize("who", [0, 1, 2])
def test_it_is_said_who_died(who):
    # Without mpirun, which may end all before one of them has noticed, in its own words.
    def start(rank, port):
        line = [sys.executable, CHECK_WATCH, str(rank), str(who), port]
        return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ())

    ranks = [start(0, "0")]
    port = ranks[0].stdout.readline().strip()
    ranks += [start(rank, port) for rank in (1, 2)]
    said = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [-9 if rank == who else 1 for rank in range(3)], said
    speaker = 1 if who == 0 else 0
    dead = f"{socket.gethostname()}, process {ranks[who].pid}"
    assert said[speaker] == (
        f"error: rank {who} of 3 ({dead}): its process died without a word (killed, or its machine is gone)\n"
    )
    assert "".join(said) == said[speaker], "one line in all"


def test_what_differs_between_ranks_is_named_once():
    code, out, _ = mpirun(CHECK_ENDINGS, "agree", "2", ranks=3)
    assert code == 2
    assert out.splitlines() == [
        "agreed: configuration: differs between ranks: train.lr is 0.25 and 0.5 on rank 0 and on rank 2; start all of "
        "them with one command, on the same data and release"
    ]


@pytest.mark.parametrize(("who", "said"), [(1, "rank 1: data.zarr: no such"), (-1, "data.zarr: no such")])
def test_an_error_that_some_or_all_ranks_meet_is_said_once(who, said):
    code, out, _ = mpirun(CHECK_ENDINGS, "together", str(who))
    assert code == 2
    (line,) = out.splitlines()
    assert line.startswith(f"agreed: {said}")


def test_without_mpi4py_nothing_is_trained_n_times():
    program = (
        "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'mpi4py' else f(n, *a);"
        "from ttr_cli.main import main; main(['train', 'no.zarr'])"
    )
    code, _, err = mpirun("-c", program)
    assert code == 2
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, err
    assert "started 2 processes, but mpi4py" in errors[0]
    assert "pip install 'ttr-gpu[mpi]'" in errors[0]


def test_a_library_of_another_mpi_is_found_out():
    # As if Open MPI's mpirun had started two, each of which MPICH takes for the only one.
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "ttr_cli.main", "train", "no.zarr"], capture_output=True, text=True, timeout=60,
        env=environ(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_LOCAL_SIZE="2"),
    )  # fmt: skip
    assert done.returncode == 2
    assert "for mpi4py this is one of 1" in done.stderr


class Left(BaseException):
    """In place of os._exit."""


def left(code: int):
    raise Left(code)


def pair():
    """Rank 0's watch and rank 1's, which raise Left where they would end the process."""
    server = listen("127.0.0.1")
    port, made = server.getsockname()[1], []
    thread = threading.Thread(target=lambda: made.append(accept(server, 2, "t", {"hello": 1})))
    thread.start()
    other, message = connect("127.0.0.1", port, 1, 2, "t")
    thread.join(10)
    assert message == {"hello": 1}
    made[0].leave = other.leave = left
    return made[0], other


def left_with(watch):
    """The code with which a watch would have ended its process."""
    with pytest.raises(Left) as error:
        watch._work()
    return error.value.args[0]


def test_strangers_are_kept_out(monkeypatch):
    monkeypatch.setattr(module, "CONNECT_SECONDS", 1.0)
    server = listen("127.0.0.1")
    port = server.getsockname()[1]
    problems = []

    def stranger():
        try:
            connect("127.0.0.1", port, 1, 2, "another token")
        except UserError as error:
            problems.append(str(error))

    thread = threading.Thread(target=stranger)
    thread.start()
    with pytest.raises(UserError, match=r"ranks \[1\] of 2 have not connected"):
        accept(server, 2, "t")
    thread.join(10)
    assert "did not answer" in problems[0]


def test_a_rank_of_a_run_of_another_size_is_refused():
    server = listen("127.0.0.1")
    port, problems = server.getsockname()[1], []

    def other():
        try:
            connect("127.0.0.1", port, 2, 4, "t")
        except UserError as error:
            problems.append(str(error))

    thread = threading.Thread(target=other)
    thread.start()
    with pytest.raises(UserError, match="rank 2 of 4"):
        accept(server, 3, "t")
    thread.join(10)
    assert "came to a run of 3" in problems[0]


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port}: rank 0 cannot listen there .*TTR_MASTER"):
            listen("127.0.0.1", port)


def test_nobody_to_connect_to(monkeypatch):
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(UserError, match=f"rank 0 at 127.0.0.1:{port} cannot be reached"):
        connect("127.0.0.1", port, 1, 2, "t")


@pytest.mark.parametrize("dead", [0, 1])
def test_a_closed_connection_is_a_death(dead, capfd):
    watches = pair()
    watches[dead].peers[1 - dead].close()
    assert left_with(watches[1 - dead]) == module.PEER_FAILED
    said = capfd.readouterr().err
    assert f"error: rank {dead} of 2" in said
    assert "its process died" in said
    if dead == 1:
        assert f"({socket.gethostname()}, process {os.getpid()})" in said


def test_a_reason_comes_before_the_end_of_the_connection(capfd):
    first, other = pair()
    other.peers[0].send({"failed": {"rank": 1, "where": "there", "reason": "no disk", "code": 2}})
    other.peers[0].close()
    assert left_with(first) == 2
    assert capfd.readouterr().err == "error: rank 1 of 2 (there): no disk\n"


def test_ranks_that_finish_do_not_take_each_other_for_dead():
    watches = pair()
    threads = [threading.Thread(target=watch.close) for watch in watches]
    for watch, thread in zip(watches, threads, strict=True):
        watch.start()
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()

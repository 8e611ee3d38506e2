"""Batch scripts: sound shell, and on a Slurm of one machine a run that is stopped and goes on."""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import environ, mpirun

from ttr_gpu.distributed.slurm import Job, script
from ttr_gpu.errors import UserError
from ttr_gpu.train.metrics import read_metrics

SHIPPED = Path(__file__).resolve().parents[3] / "scripts" / "slurm"
JOBS = {
    "preprocess-array": Job("preprocess", ("log-2023.csv", "log-2024.csv", "log-2025.csv"), name="preprocess"),
    "one-gpu": Job("train", ("data.zarr",), gpus=1, name="one-gpu"),
    "one-node": Job("train", ("data.zarr",), gpus=8, name="one-node"),
    "many-nodes": Job("train", ("data.zarr",), nodes=4, gpus=8, name="many-nodes"),
    "many-nodes-cpu": Job("train", ("data.zarr",), nodes=4, ranks=2, cpus=16, name="many-nodes-cpu"),
    "sweep-array": Job("sweep", ("sweep.toml", "data.zarr"), gpus=1, name="sweep"),
}
ODD = Job("train", ("it's my data.zarr", "--set", "model.dropout={attention=0.1}"), nodes=2, memory="64G", time="1-12")


@pytest.fixture(autouse=True)
def beside_the_shipped_scripts(monkeypatch):
    """That of sweeps counts the trials of the file beside it."""
    monkeypatch.chdir(SHIPPED)


@pytest.mark.parametrize("name", sorted(JOBS))
def test_the_shipped_scripts_are_what_the_command_writes(name):
    assert (SHIPPED / f"{name}.sbatch").read_text() == script(JOBS[name])


@pytest.mark.parametrize("job", [*JOBS.values(), ODD], ids=lambda job: job.name)
def test_scripts_are_sound_shell(job, tmp_path):
    path = tmp_path / "job.sbatch"
    path.write_text(script(job))
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_what_is_asked_for_is_in_the_script():
    text = script(ODD)
    for line in ("--nodes=2", "--ntasks-per-node=1", "--mem=64G", "--time=1-12", "--signal=USR1@120", "--requeue"):
        assert f"#SBATCH {line}\n" in text
    assert "gpus" not in text.split("set -euo")[0]
    assert "ttr-gpu train 'it'\"'\"'s my data.zarr'" in text
    # Every start gets them: what is said of threads, devices and trackers holds after a requeue too.
    assert "--name \"$run\" --continue --set 'model.dropout={attention=0.1}' ||" in text
    sweep = script(Job("sweep", ("sweep.toml", "d", "--threads", "2")))
    assert "ttr-gpu train d --sweep sweep.toml --threads 2 ||" in sweep
    assert "#SBATCH --array=0-5\n" in sweep


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (Job("train", ()), "train: got no argument, expected a data set"),
        (Job("sweep", ("a.toml",)), "sweep: got one argument"),
        (Job("sweep", ("a.toml", "d")), "--sweep: a.toml: no such file"),
        (Job("sweep", ("a.toml", "d", "--continue")), "sweep: got --continue, expected none"),
        (Job("sweep", ("a.toml", "d"), gpus=2), "sweep: each trial runs as one process"),
        (Job("train", ("d",), time="soon"), "--time: got 'soon'"),
        (Job("train", ("d",), memory="lots"), "--memory: got 'lots'"),
        (Job("train", ("d",), partition="a b"), "--partition: got 'a b'"),
        (Job("preprocess", ("a",), nodes=2), "preprocess: runs as one process per input"),
        (Job("preprocess", ("2023/log.csv", "2024/log.csv")), "preprocess: several inputs would become log.zarr"),
        (Job("train", ("d", "--sweep=s.toml")), "train: got --sweep, expected none"),
        (Job("train", ("d", "--name", "mine")), "train: got --name, expected none"),
        (Job("train", ("d", "--continue")), "train: got --continue, expected none"),
    ],
)
def test_what_slurm_would_not_take_is_refused(job, message):
    with pytest.raises(UserError, match=re.escape(message)):
        script(job)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Slurm of this machine alone, on ports of its own; skipped where it is not installed, or not run by root."""
    for program in ("munged", "slurmctld", "slurmd", "sbatch"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons run as root")
    # Its daemons want short paths that others cannot write to.
    folder = Path(tmp_path_factory.mktemp("slurm"))
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "key").write_bytes(secrets.token_bytes(128))
    for path in (folder, folder / "key"):
        path.chmod(0o700 if path.is_dir() else 0o400)
    host = socket.gethostname()
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        ports = [server.getsockname()[1] for server in (one, other)]
    (folder / "slurm.conf").write_text(
        f"ClusterName=test\nSlurmctldHost={host}(127.0.0.1)\nSlurmctldPort={ports[0]}\nSlurmdPort={ports[1]}\n"
        f"AuthType=auth/munge\nAuthInfo=socket={folder}/munge.socket,cred_expire=5\nSlurmUser=root\nSlurmdUser=root\n"
        f"StateSaveLocation={folder}/state\nSlurmdSpoolDir={folder}/spool\nSlurmctldPidFile={folder}/slurmctld.pid\n"
        f"SlurmdPidFile={folder}/slurmd.pid\nSlurmctldLogFile={folder}/slurmctld.log\nSlurmdLogFile={folder}/slurmd.log\n"
        "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nSelectType=select/cons_tres\n"
        f"SelectTypeParameters=CR_Core\nReturnToService=2\nNodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} "
        "State=UNKNOWN\nPartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"
    )
    variables = {**environ(), "SLURM_CONF": str(folder / "slurm.conf")}
    variables["PATH"] = f"{folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"
    # The command, as of this working tree.
    command = folder / "ttr-gpu"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m ttr_cli.main "$@"\n')
    command.chmod(0o755)
    munged = ["munged", f"--key-file={folder}/key", f"--socket={folder}/munge.socket", f"--seed-file={folder}/seed",
              f"--pid-file={folder}/munge.pid", f"--log-file={folder}/m.log", "--foreground", "--force"]  # fmt: skip
    daemons = []
    try:
        for line in (munged, ["slurmctld", "-D"], ["slurmd", "-D"]):
            with (folder / "daemons.log").open("ab") as log:
                daemons.append(subprocess.Popen(line, env=variables, stdout=log, stderr=log))
            time.sleep(1)
        for _ in range(40):
            state = subprocess.run(["sinfo", "-h", "-o", "%T"], env=variables, capture_output=True, text=True).stdout
            if "idle" in state:
                break
            time.sleep(0.5)
        else:
            pytest.skip(f"Slurm does not come up here: {(folder / 'daemons.log').read_text()[-300:]}")
        yield variables
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()  # slurmd waits for what is left of a job
                daemon.wait()
        # Daemons that end before their jobs leave these running.
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if f"SLURM_CONF={folder}/".encode() in path.read_bytes():
                    os.kill(int(path.parent.name), signal.SIGKILL)


def call(cluster, *line, cwd=None):
    done = subprocess.run(line, env=cluster, capture_output=True, text=True, cwd=cwd, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for(path, pattern, seconds=300):
    """The text of a job's log once it has the pattern."""
    for _ in range(5 * seconds):
        text = path.read_text() if path.exists() else ""
        if re.search(pattern, text, re.DOTALL):
            return text
        time.sleep(0.2)
    raise AssertionError(f"no {pattern!r} in {text}")


def test_slurm_takes_the_shipped_scripts(cluster, tmp_path):
    for name in ("preprocess-array", "many-nodes-cpu"):
        text = (SHIPPED / f"{name}.sbatch").read_text()
        small = re.sub(r"--(nodes|cpus-per-task|ntasks-per-node)=\d+", r"--\1=1", text)
        (tmp_path / "job.sbatch").write_text(small)
        call(cluster, "sbatch", "--test-only", "job.sbatch", cwd=tmp_path)


def test_a_job_that_is_stopped_goes_on_in_the_queue(cluster, tmp_path):
    rows = "".join(f"s{n % 60},{n // 60},{'abc'[n % 3]}\n" for n in range(3000))
    (tmp_path / "log.csv").write_text("sequence,time,type\n" + rows)
    prepare = script(Job("preprocess", ("log.csv",), cpus=1, name="prepare"))
    (tmp_path / "prepare.sbatch").write_text(prepare)
    number = call(cluster, "sbatch", "--parsable", "prepare.sbatch", cwd=tmp_path).strip()
    small = ["model.embed_dim=16", "model.hidden_dim=32", "model.num_heads=2", "model.num_layers=1",
             "train.max_length=16", "train.tokens_per_batch=64", "train.accumulate=2", "train.checkpoint_every=100000",
             "train.evaluate_every=100000", "train.steps=250"]  # fmt: skip
    options = ["log.zarr", "--preset", "nano", *(part for each in small for part in ("--set", each))]
    wait_for(tmp_path / f"prepare-{number}_0.log", "wrote .*log.zarr")
    # What is to come out; it also compiles the kernels.
    through = ["-m", "ttr_cli.main", "train", tmp_path / "log.zarr", *options[1:], "--out", tmp_path / "through"]
    code, _, err = mpirun(*through, "--name", "run", timeout=600)
    assert code == 0, err
    job = Job("train", tuple(options), ranks=2, cpus=1, name="train")
    (tmp_path / "train.sbatch").write_text(script(job))
    number = call(cluster, "sbatch", "--parsable", "train.sbatch", cwd=tmp_path).strip()
    log = tmp_path / f"train-{number}.log"
    text = wait_for(log, r"\nstep +\d\d/")
    assert "processes  2 through MPI" in text
    assert "SLURM_STEP" not in text.split("ttr-gpu ")[0]
    assert f"SLURM_JOB_ID={number}" in text
    call(cluster, "scancel", "--signal=USR1", number)
    text = wait_for(log, "SIGUSR1: stopped after step")
    stopped = int(re.search(r"SIGUSR1: stopped after step (\d+)", text)[1])
    assert stopped < 250
    # Slurm lets it start again when what allowed its first start has expired (here 5 s, by default 2 minutes).
    wait_for(log, f"start 1, .*resuming runs/train-{number} after step {stopped}")
    wait_for(log, "trained 250 steps")
    # As if it had not been stopped, to the bit.
    assert losses(tmp_path / "runs" / f"train-{number}") == losses(tmp_path / "through" / "run")


def losses(folder):
    return [(r["step"], r["loss"], r["gradient_norm"]) for r in read_metrics(folder) if r["kind"] == "step"]

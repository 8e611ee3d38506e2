"""Two hosts on one machine: network namespaces with host names of their own, and a cable between them whose bandwidth
can be set. Needs Linux, root, and iproute2 (`ip`, `tc`)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Names of a namespace's /etc, which `ip netns exec` mounts over the machine's.
_ETC = Path("/etc/netns")
CABLE = "cable"


class Hosts:
    """Two hosts, for the time of a `with` block. RuntimeError, saying what was refused, if they cannot be made."""

    def __init__(self) -> None:
        self.names = tuple(f"ttr{os.getpid()}-{number}" for number in range(2))
        self._folder = tempfile.TemporaryDirectory(prefix="ttr-hosts-")

    def __enter__(self) -> Hosts:
        try:
            self._make()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _make(self) -> None:
        if os.geteuid() != 0:
            raise RuntimeError("network namespaces need root: run it with sudo")
        for program in ("ip", "tc", "unshare"):
            if shutil.which(program) is None:
                raise RuntimeError(f"there is no `{program}`: apt install iproute2 util-linux")
        addresses = [f"10.211.7.{number + 1}" for number in range(2)]
        names = "".join(f"{address} {name}\n" for address, name in zip(addresses, self.names, strict=True))
        for name in self.names:
            _run("ip", "netns", "add", name)
            folder = _ETC / name
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        one, other = self.names
        _run("ip", "link", "add", CABLE, "netns", one, "type", "veth", "peer", "name", CABLE, "netns", other)
        for address, name in zip(addresses, self.names, strict=True):
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", CABLE)
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _run("ip", "-n", name, "link", "set", CABLE, "up")
        # Until both ends have seen each other, libraries take the cable for one that is not plugged in.
        end = time.monotonic() + 10
        for name in self.names:
            while "state UP" not in _run("ip", "-n", name, "link", "show", CABLE):
                if time.monotonic() > end:
                    raise RuntimeError("the cable between the hosts does not come up")
                time.sleep(0.02)
        # In place of ssh: `launch [-x] host command`, the command quoted for a shell.
        launch = Path(self._folder.name) / "launch"
        launch.write_text(
            "#!/bin/sh\n[ \"$1\" = -x ] && shift\nhost=$1; shift\n"
            'exec ip netns exec "$host" unshare --uts sh -c "hostname $host; exec $*"\n'
        )  # fmt: skip
        launch.chmod(0o755)

    def remove(self) -> None:
        """Hosts and cable, and what of them is left where they could not be made."""
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
            shutil.rmtree(_ETC / name, ignore_errors=True)
        self._folder.cleanup()

    def mpirun(self, *arguments: str, options: tuple[str, ...] = ()) -> list[str]:
        """The command line of Python with these arguments on both hosts, a rank on each; options of mpirun's own."""
        found = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
        if found is None:
            raise RuntimeError("there is no mpirun: pip install 'ttr-gpu[mpi]'")
        launch, (first, _) = str(Path(self._folder.name) / "launch"), self.names
        return [
            "ip", "netns", "exec", first, "unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', first,
            found, "-localhost", first, "-hosts", ",".join(self.names), "-launcher", "ssh",
            "-launcher-exec", launch, *options, "-n", "2", sys.executable, *arguments,
        ]  # fmt: skip

    @staticmethod
    def environment() -> dict[str, str]:
        """That of ranks that talk through the cable alone: on one machine MPICH's UCX would find shared memory."""
        found = {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": CABLE, "FI_PROVIDER": "tcp", "FI_TCP_IFACE": CABLE}
        return {**os.environ, **found, "PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}


def limit_cable(megabits: int | None) -> None:
    """What this host sends each second from now on at most (a token bucket, tc-tbf); None: as fast as it goes."""
    if megabits is None:
        subprocess.run(["tc", "qdisc", "delete", "dev", CABLE, "root"], capture_output=True, check=False)
        return
    # The bucket must hold what is sent in a tick of the timer.
    _run(
        "tc", "qdisc", "replace", "dev", CABLE, "root", "tbf", "rate", f"{megabits}mbit", "burst",
        str(max(65536, megabits * 500)), "latency", "50ms",
    )  # fmt: skip


def _run(*line: str) -> str:
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(line)}` failed: {done.stderr.strip() or done.returncode}")
    return done.stdout

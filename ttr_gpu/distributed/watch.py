"""Ranks that watch each other: when one fails or dies, the others end at once and say which one, and why.

Each rank holds a TCP connection to rank 0. A rank that fails says so there; of one that dies the kernel closes the
connection; of a machine that vanishes keep-alive probes are missed. MPI and NCCL alone would wait for ever.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from ..errors import UserError

# Seconds until ranks have found each other; a vanished machine is noticed; a last message has come; it has been read.
CONNECT_SECONDS, VANISHED_SECONDS, LAST_SECONDS, READ_SECONDS = 60.0, 30, 8.0, 3.0
PEER_FAILED = 1


class Watch:
    """The connections of one rank: rank 0 to all others, others to rank 0. JSON lines travel on them.

    Made by `accept` and `connect`; `start` begins the watch, `close` ends it on all ranks.

    Attributes:
        peers: rank at the other end -> its connection.
        leave: ends the process with an exit code, whatever its other threads do.
    """

    def __init__(self, rank: int, size: int, peers: dict[int, Connection]) -> None:
        self.rank, self.size, self.peers = rank, size, peers
        self.leave: Callable[[int], NoReturn] = os._exit
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="watch", daemon=True)
        self._said_bye: set[int] = set()

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def fail(self, reason: str, code: int) -> NoReturn:
        """This rank cannot go on: have rank 0 say why, and every rank end with `code`."""
        if self.rank == 0:
            self._end({"rank": 0, "where": where(), "reason": reason, "code": code})
        self.peers[0].send({"failed": {"rank": self.rank, "where": where(), "reason": reason, "code": code}})
        # Rank 0's answer ends this process; if it has none, it is gone too.
        time.sleep(LAST_SECONDS)
        _say(f"error: rank {self.rank} ({where()}): {reason}")
        self.leave(code)

    def wait_for_end(self) -> NoReturn:
        """Another rank has failed and is about to say so."""
        time.sleep(LAST_SECONDS)
        self.fail("another rank failed without saying why", PEER_FAILED)

    def close(self) -> None:
        """This rank has finished. Waits until all have, so that none is taken for dead."""
        for peer in self.peers.values():
            peer.send({"bye": self.rank})
        self._thread.join()
        for peer in self.peers.values():
            peer.close()

    def _work(self) -> None:
        """Until every peer has said bye."""
        with selectors.DefaultSelector() as selector:
            for rank, peer in self.peers.items():
                selector.register(peer.socket, selectors.EVENT_READ, rank)
            while len(self._said_bye) < len(self.peers):
                for key, _ in selector.select():
                    rank = key.data
                    for message in self.peers[rank].received():
                        if message is None:
                            selector.unregister(key.fileobj)
                            if rank not in self._said_bye:
                                self._died(rank)
                        elif "bye" in message:
                            self._said_bye.add(rank)
                        elif "failed" in message:
                            self._end(message["failed"])

    def _died(self, rank: int) -> None:
        reason = "its process died without a word (killed, or its machine is gone)"
        self._end(
            {"rank": rank, "where": self.peers[rank].where, "reason": reason, "code": PEER_FAILED, "mute": rank == 0}
        )

    def _end(self, failed: dict[str, Any]) -> NoReturn:
        """Print it once, tell the others, and end this process."""
        with self._lock:
            try:
                # Rank 0 has said what it tells; if it died, rank 1 says so.
                if self.rank == 0 or (self.rank == 1 and failed.get("mute")):
                    _say(f"error: rank {failed['rank']} of {self.size} ({failed['where']}): {failed['reason']}")
                elif failed.get("mute"):
                    # Rank 1 ends all, however slow it is to notice on a busy machine; or it died too.
                    time.sleep(LAST_SECONDS)
                if self.rank == 0:
                    for peer in self.peers.values():
                        peer.send({"failed": failed})
                    # Some launchers kill what is left when the first process ends: let the others read why first.
                    time.sleep(0.5)
            finally:
                self.leave(int(failed["code"]))


class Connection:
    """JSON lines over a socket.

    Attributes:
        where: the peer's machine and process, for people.
    """

    def __init__(self, connected: socket.socket, where: str) -> None:
        self.socket, self.where = connected, where
        self._buffer = b""
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", VANISHED_SECONDS // 3), ("TCP_KEEPINTVL", VANISHED_SECONDS // 6),
                              ("TCP_KEEPCNT", 4)):  # fmt: skip
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, message: dict[str, Any]) -> None:
        """A message, if there is still someone to read it."""
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return

    def received(self) -> list[dict[str, Any] | None]:
        """What has arrived, waiting for the first of it; None at the end of the connection."""
        try:
            part = self.socket.recv(1 << 16)
        except OSError:
            part = b""
        if not part:
            return [None]
        *lines, self._buffer = (self._buffer + part).split(b"\n")
        return [json.loads(line) for line in lines]

    def receive(self) -> dict[str, Any]:
        """The next message; OSError if the connection ends first, or nothing comes in time.

        Byte by byte: what was sent after it, such as that another rank has died, is for the watch, which begins later.
        """
        self.socket.settimeout(CONNECT_SECONDS)
        line = b""
        while not line.endswith(b"\n"):
            try:
                part = self.socket.recv(1)
            except OSError:
                part = b""
            if not part:
                raise ConnectionError("the connection was closed")
            line += part
        self.socket.settimeout(None)
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        self.socket.close()


def listen(host: str, port: int = 0) -> socket.socket:
    """A socket of rank 0 for the others to connect to; port 0: any that is free. UserError if it is taken."""
    try:
        return socket.create_server((host, port), backlog=1024)
    except OSError as error:
        raise UserError(
            f"{host or 'rank 0'}:{port}: rank 0 cannot listen there ({error.strerror}); choose a free port in "
            "TTR_MASTER"
        ) from None


def accept(server: socket.socket, size: int, token: str, message: dict[str, Any] | None = None) -> Watch:
    """Rank 0: wait for all others, and give each `message`. UserError if they do not come or are of another run."""
    peers: dict[int, Connection] = {}
    end = time.monotonic() + CONNECT_SECONDS
    with server:
        while len(peers) < size - 1:
            server.settimeout(max(0.01, end - time.monotonic()))
            try:
                connection = Connection(server.accept()[0], "")
                hello = connection.receive()
            except TimeoutError:
                missing = sorted(set(range(1, size)) - set(peers))
                raise UserError(
                    f"rank 0 ({where()}): ranks {missing[:8]} of {size} have not connected in {CONNECT_SECONDS:.0f} s; "
                    "were all started, and can they reach this machine?"
                ) from None
            except (ConnectionError, ValueError):
                continue
            # What else speaks to this port is none of ours.
            if hello.get("token") != token:
                connection.close()
                continue
            if hello["size"] != size or hello["rank"] in peers:
                problem = f"rank {hello['rank']} of {hello['size']} ({hello['where']}) came to a run of {size}"
                connection.send({"refused": problem})
                raise UserError(f"{problem}: all must be started by one mpirun or srun")
            connection.where = hello["where"]
            peers[int(hello["rank"])] = connection
    for connection in peers.values():
        connection.send({"where": where(), "message": message or {}})
    return Watch(0, size, peers)


def connect(host: str, port: int, rank: int, size: int, token: str) -> tuple[Watch, dict[str, Any]]:
    """Another rank: connect to rank 0, and what it gives. UserError if it is not there."""
    end = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            connection = Connection(socket.create_connection((host, port), timeout=CONNECT_SECONDS), f"{host}:{port}")
            break
        except OSError as error:
            # Rank 0 may not have begun yet.
            if time.monotonic() > end:
                raise UserError(
                    f"rank {rank} ({where()}): rank 0 at {host}:{port} cannot be reached ({error}); is it running, and "
                    "no firewall between?"
                ) from None
            time.sleep(0.1)
    connection.send({"rank": rank, "size": size, "token": token, "where": where()})
    try:
        message = connection.receive()
    except OSError as error:
        raise UserError(f"rank {rank} ({where()}): rank 0 at {host}:{port} did not answer ({error})") from None
    if "refused" in message:
        raise UserError(message["refused"])
    connection.where = str(message["where"])
    return Watch(rank, size, {0: connection}), message["message"]


def where() -> str:
    """This machine and process, as messages name them."""
    return f"{socket.gethostname()}, process {os.getpid()}"


def _say(line: str) -> None:
    """Past Python's buffers, which an interrupted thread may hold; and wait until the launcher has read it: one that
    is told to end all may drop what it has not."""
    try:
        sys.stdout.flush()
        os.write(2, f"{line}\n".encode())
        end = time.monotonic() + READ_SECONDS
        while stat.S_ISFIFO(os.fstat(2).st_mode) and _unread(2) and time.monotonic() < end:
            time.sleep(0.01)
    except (OSError, ValueError):
        return


def _unread(pipe: int) -> int:
    """Bytes in a pipe."""
    import fcntl
    import termios

    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)

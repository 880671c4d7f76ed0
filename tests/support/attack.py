"""Peers by the thousand that mean no good, in a process of their own: `python -m tests.support.attack`.

An `Attack` starts that process and ends it. Each peer connects, says its words, and then does what its kind does: it
holds on, goes on pouring or dripping, or resets the connection and comes back. They come from many addresses in ten
networks of 127.0.0.0/8, of which 127.0.0.0/24 is none.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import resource
import selectors
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tests.support.scope import Closes
from tests.support.sockets import Address, parse_address, reset

Then = Literal["hold", "pour", "drip", "reset"]

ROOT = Path(__file__).resolve().parents[2]
AT_ONCE = 256
"""Connections being made at a time."""

NETWORKS = 10
"""From which the peers come, with as many addresses each."""

DRIP = 0.25
"""Seconds between two bytes of a peer that drips."""


@dataclass
class Report:
    """What has become of an attack so far."""

    opened: int = 0
    refused: int = 0
    dropped: int = 0
    held: int = 0


class Swarm:
    """The peers, inside their process."""

    def __init__(self, address: Address, count: int, words: bytes, then: Then, sources: int) -> None:
        """sources: so many addresses they come from."""
        self._address = address
        self._count = count
        self._words = words
        self._then = then
        self._sources = sources
        self._begun = 0
        self._connecting = 0
        self._held: dict[socket.socket, bool] = {}
        self._selector = selectors.DefaultSelector()
        self._last_drip = time.monotonic()
        self.report = Report()

    def step(self) -> None:
        """Do what can be done now."""
        while self._connecting < AT_ONCE and self._connecting + len(self._held) < self._count and self._may_begin():
            self._begin()
        for key, events in self._selector.select(0.05):
            sock: Any = key.fileobj
            if not self._held[sock]:
                self._finish(sock)
            elif events & selectors.EVENT_READ:
                self._hear(sock)
            else:
                self._pour(sock)
        if self._then == "drip" and time.monotonic() - self._last_drip > DRIP:
            self._last_drip = time.monotonic()
            for sock in [sock for sock, connected in self._held.items() if connected]:
                self._pour(sock)
        self.report.held = sum(self._held.values())

    def _may_begin(self) -> bool:
        return self._then in ("pour", "reset") or self._begun < self._count

    def _begin(self) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        source = self._begun % self._sources
        sock.bind((f"127.0.{1 + source % NETWORKS}.{1 + source // NETWORKS}", 0))
        self._begun += 1
        if sock.connect_ex(self._address) not in (0, errno.EINPROGRESS):
            sock.close()
            self.report.refused += 1
            return
        self._held[sock] = False
        self._connecting += 1
        self._selector.register(sock, selectors.EVENT_WRITE)

    def _finish(self, sock: socket.socket) -> None:
        self._connecting -= 1
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._forget(sock)
            self.report.refused += 1
            return
        self._held[sock] = True
        self.report.opened += 1
        try:
            sock.send(self._words)
        except OSError:
            self._drop(sock)
            return
        if self._then == "reset":
            self._forget(sock, rudely=True)
        else:
            pours = selectors.EVENT_WRITE if self._then == "pour" else 0
            self._selector.modify(sock, selectors.EVENT_READ | pours)

    def _hear(self, sock: socket.socket) -> None:
        try:
            heard = sock.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            heard = b""
        if not heard:
            self._drop(sock)

    def _pour(self, sock: socket.socket) -> None:
        try:
            sock.send(self._words[:1] if self._then == "drip" else self._words)
        except BlockingIOError:
            return
        except OSError:
            self._drop(sock)

    def _drop(self, sock: socket.socket) -> None:
        self.report.dropped += 1
        self._forget(sock)

    def _forget(self, sock: socket.socket, rudely: bool = False) -> None:
        self._selector.unregister(sock)
        del self._held[sock]
        if rudely:
            reset(sock)
        else:
            sock.close()


class Attack(Closes):
    """An attack that runs in a process of its own; a context manager."""

    def __init__(
        self, address: Address, count: int, words: bytes = b"", then: Then = "hold", sources: int = 200
    ) -> None:
        host, port = address
        options = [f"{host}:{port}", str(count), str(len(words)), then, str(sources)]
        self._words = words
        self._command = [sys.executable, "-m", "tests.support.attack", *options]

    def __enter__(self) -> Attack:
        self._process = subprocess.Popen(
            self._command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        assert self._process.stdin
        view = memoryview(self._words)
        while view:
            view = view[self._process.stdin.write(view) :]
        return self

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def report(self) -> Report:
        """How far it is."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(b"?")
        return Report(**json.loads(self._process.stdout.readline()))


def main() -> None:
    """Read the words from standard input and attack; report whenever a byte more is read, until the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("address", "count", "size", "then", "sources"):
        parser.add_argument(name)
    given = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    words = b""
    while len(words) < int(given.size):
        words += os.read(0, int(given.size) - len(words))
    swarm = Swarm(parse_address(given.address), int(given.count), words, given.then, int(given.sources))
    os.set_blocking(0, False)
    while True:
        swarm.step()
        try:
            asked = os.read(0, 1)
        except BlockingIOError:
            continue
        if not asked:
            return
        sys.stdout.write(json.dumps(asdict(swarm.report)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

"""Silent connections at a steady rate, in a process of their own: `python -m tests.support.silent_flood`.

Each connection comes from a random one of the given addresses, says nothing, and is given up when the server closes it.
The flood keeps so many of them at most: where a server has no time to accept, more would only fill the kernel's queue.
"""

from __future__ import annotations

import contextlib
import random
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from tests.support.process import REPOSITORY
from tests.support.scope import Closes
from tests.support.sockets import Address, format_address, parse_address, reset

BURST = 0.02
"""Seconds of the rate that are made up for at once, after the flood itself was late."""

IPV6_FREEBIND = 78


class SilentFlood(Closes):
    """Such a process; a context manager. It lives in the network namespace of the thread that enters it."""

    def __init__(self, address: Address, rate: int, most: int, sources: Sequence[str]) -> None:
        """rate: connections per second. most: so many are open at a time."""
        arguments = [format_address(address), str(rate), str(most), *sources]
        self._command = [sys.executable, "-m", "tests.support.silent_flood", *arguments]

    def __enter__(self) -> SilentFlood:
        self._process = subprocess.Popen(self._command, cwd=REPOSITORY)
        return self

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def flood(address: Address, rate: int, most: int, sources: Sequence[str]) -> None:
    """Connect, without end."""
    held: dict[int, socket.socket] = {}
    poll = select.epoll()
    due, last = 0.0, time.monotonic()
    while True:
        now = time.monotonic()
        due, last = min(due + now - last, BURST), now
        while due > 0 and len(held) < most:
            due -= 1 / rate
            sock = connect_from(random.choice(sources), address)
            held[sock.fileno()] = sock
            poll.register(sock, select.EPOLLIN)
        for number, _ in poll.poll(1 / rate):
            reset(held.pop(number))


def connect_from(source: str, address: Address) -> socket.socket:
    """Begin to connect, from an address that the interface need not have."""
    sock = socket.socket(socket.AF_INET6 if ":" in source else socket.AF_INET)
    sock.setblocking(False)
    if ":" in source:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
    with contextlib.suppress(OSError):
        sock.bind((source, 0))
        sock.connect(address)
    return sock


if __name__ == "__main__":
    flood(parse_address(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])

"""Small socket helpers: addresses, waiting, reading to a length or to the end, resetting.

Every socket made here has a time limit, so that a broken tunnel fails a test and never hangs it.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import time
from collections.abc import Callable
from typing import TypeVar

Address = tuple[str, int]
T = TypeVar("T")

PATIENCE = 20.0
"""Seconds a test waits for anything: generous, since only a failure ever waits that long."""

WORKERS = 8
"""Slices of the ports to choose from: tests that run at the same time must not find the same port free."""

UNPRIVILEGED = range(12000, 30000)
"""Ports to choose from: below the kernel's ephemeral range, so that no outgoing socket takes them."""


def until(condition: Callable[[], T], timeout: float = PATIENCE, what: str = "") -> T:
    """Ask until the answer is true, less often the longer it takes, and return it; AssertionError after timeout."""
    began = time.monotonic()
    while not (answer := condition()):
        passed = time.monotonic() - began
        if passed > timeout:
            raise AssertionError(f"still not so after {timeout:g} s: {what or condition}")
        time.sleep(min(0.005 + passed / 10, 0.1))
    return answer


def parse_address(text: str) -> Address:
    """The host and port of `127.0.0.1:80`, `[::1]:80` or `:80`."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def format_address(address: Address) -> str:
    """The text of an address as it goes into a URL, IPv6 in brackets."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether TCP and UDP can both bind the port on the host now."""
    try:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            with socket.socket(socket.AF_INET, kind) as probe:
                probe.bind((host, port))
    except OSError:
        return False
    return True


def free_port(count: int = 1) -> int:
    """The first of `count` ports in a row that nobody uses, for programs that cannot take port 0."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % WORKERS
    own = UNPRIVILEGED[worker * len(UNPRIVILEGED) // WORKERS : (worker + 1) * len(UNPRIVILEGED) // WORKERS - count]
    while True:
        first = random.choice(own)
        if all(is_free(port, "0.0.0.0") for port in range(first, first + count)):
            return first


def connect(address: Address, timeout: float = PATIENCE) -> socket.socket:
    """A TCP connection whose every operation has the time limit."""
    return socket.create_connection(address, timeout=timeout)


def datagram_socket(host: str = "127.0.0.1", timeout: float = PATIENCE) -> socket.socket:
    """A UDP socket on a port of its own, with the time limit."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_DGRAM)
    made.settimeout(timeout)
    made.bind((host, 0))
    return made


def receive_exactly(source: socket.socket, size: int) -> bytes:
    """The next `size` bytes; AssertionError if the stream ends before."""
    received = bytearray()
    while len(received) < size:
        data = source.recv(min(size - len(received), 1 << 16))
        assert data, f"the stream ended after {len(received)} of {size} bytes"
        received += data
    return bytes(received)


def receive_all(source: socket.socket) -> bytes:
    """Every byte up to the end of the stream."""
    received = bytearray()
    while data := source.recv(1 << 16):
        received += data
    return bytes(received)


def is_over(source: socket.socket) -> bool:
    """Wait for the peer to end: True at end of stream or reset, False if it said something."""
    try:
        return source.recv(1) == b""
    except ConnectionError:
        return True


def is_refused(dial: Callable[[], socket.socket]) -> bool:
    """Make a connection and wait for the peer to end it: True at end of stream or reset, False if it said something.

    A reset can arrive before the dial has returned, which then raises it.
    """
    try:
        with dial() as made:
            return is_over(made)
    except ConnectionResetError:
        return True


def is_closed_both_ways(sock: socket.socket) -> bool:
    """Wait until nothing arrives any more and nothing can be sent either."""
    if not is_over(sock):
        return False

    def refuses() -> bool:
        try:
            sock.send(b"x")
        except (ConnectionError, BrokenPipeError):
            return True
        return False

    return until(refuses, what="the other end still takes bytes")


def is_silent(source: socket.socket, seconds: float) -> bool:
    """Whether nothing, not even an end of stream, arrives for so long."""
    before = source.gettimeout()
    source.settimeout(seconds)
    try:
        source.recv(1, socket.MSG_PEEK)
    except TimeoutError:
        return True
    finally:
        source.settimeout(before)
    return False


def reset(sock: socket.socket) -> None:
    """Close with a TCP reset instead of an end of stream."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def abort(sock: socket.socket) -> None:
    """Shut a socket down both ways, which wakes up any thread that waits for it, and close it."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


def has_ipv6() -> bool:
    """Whether this machine has the IPv6 loopback address."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True

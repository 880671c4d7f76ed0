"""A proxy that does what a test says, and a dial through it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import gevent
from gevent import socket
from gevent.server import StreamServer

from nodepass.config.outbound import Credentials, Login, Passage, Proxy
from nodepass.config.urls import Address
from nodepass.log import Log
from nodepass.net.sockets import Endpoint, Socket
from nodepass.outbound.ways import Proxied
from nodepass.stats import Stats
from nodepass.tasks import TaskGroup

TIMEOUT = 10.0
"""Seconds for a dial that succeeds, or is refused."""

Answer = Callable[[Any], object]
"""What the proxy does with a connection; it is closed then."""


def through(
    stack: ExitStack,
    scheme: str,
    answer: Answer,
    login: Credentials | None = None,
    server: str = "server.example",
) -> Proxied:
    """The way to port 10101 of a server through a proxy that answers so."""

    def handle(sock: Any, _: object) -> None:
        try:
            answer(sock)
        except OSError:
            pass  # the client has left
        finally:
            sock.close()

    proxy = StreamServer(("127.0.0.1", 0), handle)
    proxy.start()
    stack.callback(proxy.stop)
    group = TaskGroup(Log("test"), Stats())
    stack.callback(group.kill)
    passage = Passage(Proxy(scheme, "127.0.0.1", proxy.address[1]), Login(fixed=login))
    endpoints = [Endpoint(socket.AF_INET, proxy.address)]
    return Proxied(Address(server, 10101), passage, None, lambda _: endpoints, group.spawn)


def dial(way: Proxied, timeout: float = TIMEOUT) -> Socket:
    return way.dial(timeout)


def receive(sock: Socket, size: int) -> bytes:
    """So many bytes of a socket of the kernel, fewer at the end of the stream."""
    data = b""
    while len(data) < size:
        try:
            received = sock.recv(size - len(data))
        except BlockingIOError:
            gevent.socket.wait_read(sock.fileno())
            continue
        if not received:
            break
        data += received
    return data


def read_request(sock: Any) -> bytes:
    """The head of a request of HTTP."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = sock.recv(1)
        assert byte
        head += byte
    return head


def drip(sock: Any, data: bytes) -> None:
    """Send byte for byte, each in a segment of its own."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in data:
        sock.sendall(bytes([byte]))
        gevent.sleep(0)

"""Both ends of a control connection on real sockets, for tests that run inside this process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import gevent
from gevent import Greenlet, socket

from nodepass.log import Log
from nodepass.stats import Stats
from nodepass.tunnel.control import Agreement, ClientControl, ServerControl
from nodepass.wire.signals import Offer
from tests.unit.streams import tcp_pair

V1 = Agreement(Offer(10102, 0))
V2 = Agreement(Offer(10102, 0, 5000))
INTERVAL = 5.0
"""Seconds between heartbeats, unless a test says otherwise: longer than any test."""


@dataclass
class Ends:
    """The sockets of a control connection: the server's and the client's."""

    server: socket.socket
    client: socket.socket

    def server_control(self, agreement: Agreement | None = None, interval: float = INTERVAL) -> ServerControl:
        """The program's server at its end; without an agreement its handshake is still to come."""
        control = ServerControl(self.server, interval, Log("server"), Stats())
        if agreement:
            control.agree(agreement)
        return control

    def client_control(self, agreement: Agreement | None = None, interval: float = INTERVAL) -> ClientControl:
        """The program's client at its end."""
        control = ClientControl(self.client, interval, Log("client"), Stats())
        if agreement:
            control.agree(agreement)
        return control


def connect_ends(stack: ExitStack) -> Ends:
    """A new connection, closed with `stack`."""
    stream, client = stack.enter_context(tcp_pair())
    assert isinstance(stream.sock, socket.socket)
    return Ends(stream.sock, client)


def run(stack: ExitStack, work: Callable[..., object], *args: object) -> Greenlet[..., object]:
    """Run `work(*args)` beside the test, at most until `stack` ends."""
    greenlet: Greenlet[..., object] = gevent.spawn(work, *args)
    stack.callback(greenlet.kill)
    return greenlet


def until(condition: Callable[[], object]) -> None:
    """Let the other greenlets run until a condition holds, for at most 10 seconds."""
    with gevent.Timeout(10):
        while not condition():
            gevent.sleep(0.001)


def read_line(sock: socket.socket) -> bytes:
    """One line, with its newline; what there is of it at the end of the stream."""
    line = b""
    while not line.endswith(b"\n") and (byte := sock.recv(1)):
        line += byte
    return line


def is_closed(sock: socket.socket) -> bool:
    """Whether the peer has closed a connection, with a reset or without; waits for that."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True

"""Both ends of a control connection on real sockets, for tests that run inside this process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import gevent
from gevent import Greenlet, socket
from OpenSSL import SSL

from nodepass.log import Log
from nodepass.net.stream import Stream, TCPStream
from nodepass.stats import Stats
from nodepass.tls.certificates import self_signed
from nodepass.tls.contexts import server_context
from nodepass.tls.stream import TLSStream, accept_tls, connect_tls
from nodepass.tls.verify import Expected
from nodepass.tunnel.control import Agreement, ClientControl, ServerControl
from nodepass.wire.negotiation import Offer
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

    def server_control(
        self, agreement: Agreement | None = None, interval: float = INTERVAL, stream: Stream | None = None
    ) -> ServerControl:
        """The program's server at its end, in the clear unless it has a stream; without an agreement not agreed yet."""
        control = ServerControl(stream or TCPStream(self.server), interval, Log("server"), Stats())
        if agreement:
            control.agree(agreement)
        return control

    def client_control(
        self, agreement: Agreement | None = None, interval: float = INTERVAL, stream: Stream | None = None
    ) -> ClientControl:
        """The program's client at its end."""
        control = ClientControl(stream or TCPStream(self.client), interval, Log("client"), Stats())
        if agreement:
            control.agree(agreement)
        return control


def connect_ends(stack: ExitStack) -> Ends:
    """A new connection, closed with `stack`."""
    stream, client = stack.enter_context(tcp_pair())
    assert isinstance(stream.sock, socket.socket)
    return Ends(stream.sock, client)


def run_tls(stack: ExitStack, ends: Ends, context: SSL.Context | None = None) -> tuple[TLSStream, TLSStream]:
    """Both ends under TLS, the server's with this context or with one of its own."""
    context = context or self_signed_context()
    accepting = run(stack, accept_tls, ends.server, context)
    client = connect_tls(cast(Any, ends.client), Expected("localhost"))
    server = accepting.get()
    assert isinstance(server, TLSStream)
    return server, client


@cache
def self_signed_context() -> SSL.Context:
    """A server's in TLS mode 1."""
    identity = self_signed()
    return server_context(identity.chain, identity.key)


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

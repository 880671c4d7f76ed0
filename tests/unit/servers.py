"""Parts of a server on real sockets, for tests that run inside this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import gevent
import pytest
from gevent import socket

from nodepass.config import Settings
from nodepass.log import Log
from nodepass.net import listen, sockets
from nodepass.net.listen import close_all, listen_tcp
from nodepass.net.sockets import as_plain
from nodepass.net.stream import TCPStream
from nodepass.server import control_listener
from nodepass.server.client_slot import ClientSlot
from nodepass.stats import Stats
from nodepass.tasks import TaskGroup
from nodepass.tunnel import handshake
from nodepass.tunnel.control import Agreement, ServerControl
from nodepass.tunnel.part import Common, Part
from nodepass.urls import Address
from nodepass.wire.auth import Key
from tests.unit.controls import V2, Ends, connect_ends
from tests.unit.streams import tcp_pair

PATIENT = 10.0
"""Seconds for what should happen at once."""


@contextmanager
def a_server_room(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    """What is entered here is closed at the end of the test; sockets are gevent's, as in the patched program.

    A peer that is slow, as all are on a busy machine, is not taken for one that says nothing.
    """
    monkeypatch.setattr(sockets, "socket", socket)
    monkeypatch.setattr(listen, "socket", socket)
    monkeypatch.setattr(control_listener, "FIRST_BYTES_WITHIN", PATIENT)
    monkeypatch.setattr(handshake, "HELLO_WITHIN", PATIENT)
    with ExitStack() as stack, gevent.Timeout(20):
        yield stack


def make_common(stack: ExitStack, **settings: Any) -> Common:
    """The settings that are given, the others short; a crash of a loop fails the test at its end."""
    settings = {"pool_get_timeout": PATIENT, "handshake_timeout": PATIENT, **settings}
    log, stats, crashes = Log("test"), Stats(), list[Exception]()

    def check() -> None:
        assert not crashes

    stack.callback(check)
    return Common(Settings(**settings), log, stats, TaskGroup(log, stats, on_crash=crashes.append))


def make_slot(stack: ExitStack, key: Key | None = None, **settings: Any) -> tuple[Common, ClientSlot]:
    """A slot without a client, and its flows."""
    common = make_common(stack, **settings)
    slot = ClientSlot(common, key)
    start(stack, slot.flows)
    return common, start(stack, slot)


AnyPart = Any


def start(stack: ExitStack, part: AnyPart) -> AnyPart:
    """Start a part, and close it with `stack`."""
    assert isinstance(part, Part)
    stack.callback(part.close)
    part.start()
    return part


def listen_on(stack: ExitStack, host: str = "127.0.0.1") -> socket.socket:
    """A listener of the program on a free port."""
    listeners = listen_tcp(Address(host, 0), "tunnel")
    stack.callback(close_all, listeners)
    return listeners[0]  # type: ignore[return-value]  # patched


def connect(stack: ExitStack, listener: socket.socket, source: str = "127.0.0.1") -> socket.socket:
    """A peer's connection to a listener."""
    return stack.enter_context(socket.create_connection(listener.getsockname(), PATIENT, (source, 0)))


def occupy(stack: ExitStack, slot: ClientSlot, agreement: Agreement = V2) -> tuple[Ends, ServerControl]:
    """Put a client into a slot."""
    ends = connect_ends(stack)
    control = ends.server_control()
    with slot.admission(control, bool(slot.key)):
        control.agree(agreement)
    return ends, control


def fill(stack: ExitStack, slot: ClientSlot, *ids: str) -> list[socket.socket]:
    """Put data connections into the slot's pool, on sockets as they are accepted; the client's ends."""
    peers = []
    for id in ids:
        stream, peer = stack.enter_context(tcp_pair())
        assert isinstance(stream.sock, socket.socket)
        slot.pool.add(id, TCPStream(as_plain(stream.sock)))
        peers.append(peer)
    return peers

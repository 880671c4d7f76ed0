"""Parts of a server on real sockets, for tests that run inside this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import gevent
import pytest
from gevent import socket

from nodepass.config.kinds import Ports
from nodepass.config.settings import Settings
from nodepass.config.urls import Address, ServerURL
from nodepass.log import Log
from nodepass.net import listen, sockets
from nodepass.net.activation import NOTHING
from nodepass.net.listen import close_all, listen_tcp
from nodepass.net.sockets import as_plain
from nodepass.net.stream import TCPStream
from nodepass.server import control_listener
from nodepass.server.client_slot import ClientSlot
from nodepass.server.clients import Clients
from nodepass.server.control_listener import ControlListener
from nodepass.server.data_listener import DataListener
from nodepass.server.server import make_port_parts
from nodepass.server.tunnel_port import TunnelPort
from nodepass.stats import Stats
from nodepass.tasks import TaskGroup
from nodepass.tunnel.control import Agreement, ServerControl
from nodepass.tunnel.handshake import Candidate
from nodepass.tunnel.part import Common, Part
from nodepass.tunnel.rates import Rates
from nodepass.wire.auth import Key
from tests.unit.controls import V2, Ends, connect_ends, read_line
from tests.unit.streams import tcp_pair

PATIENT = 10.0
"""Seconds for what should happen at once."""

SOON = 0.05
"""Seconds for what never happens."""


@contextmanager
def a_server_room(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    """What is entered here is closed at the end of the test; sockets are gevent's, as in the patched program.

    A peer that is slow, as all are on a busy machine, is not taken for one that says nothing.
    """
    monkeypatch.setattr(sockets, "socket", socket)
    monkeypatch.setattr(listen, "socket", socket)
    monkeypatch.setattr(control_listener, "SILENCE", PATIENT)
    with ExitStack() as stack, gevent.Timeout(20):
        yield stack


def make_common(stack: ExitStack, **settings: Any) -> Common:
    """The settings that are given, the others short; a crash of a loop fails the test at its end."""
    settings = {"pool_get_timeout": PATIENT, "handshake_timeout": PATIENT, **settings}
    log, stats, crashes = Log("test"), Stats(), list[Exception]()

    def check() -> None:
        assert not crashes

    stack.callback(check)
    own, loops = Settings(**settings), TaskGroup(log, stats, on_crash=crashes.append)
    return Common(own, log, stats, loops, rates=Rates.of(own, stats))


def make_clients(stack: ExitStack, *keys: Key, **settings: Any) -> tuple[Common, Clients]:
    """The slots of a tunnel, without clients."""
    common = make_common(stack, **settings)
    return common, start_clients(stack, Clients(common, "", keys))


def start_clients(stack: ExitStack, clients: Clients) -> Clients:
    """Start a tunnel's slots and flows, and close them with `stack`."""
    start(stack, clients.flows)
    start(stack, clients)
    return clients


AnyPart = Any
AnyListener = TypeVar("AnyListener", ControlListener, DataListener)


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
    return listeners[0]


def connect(stack: ExitStack, listener: Any, source: str = "127.0.0.1") -> socket.socket:
    """A peer's connection to a listener."""
    return stack.enter_context(socket.create_connection(listener.getsockname(), PATIENT, (source, 0)))


def server_url(name: str = "", tls: int = 0, wire: str = "auto", port: int = 0) -> ServerURL:
    """A server on this machine."""
    tunnel = Address("127.0.0.1", port)
    return ServerURL(tunnel, Address("127.0.0.1", 0), tls=tls, tunnel_name=name, wire=wire)


class OpenPort:
    """A tunnel port that is served, the slots of its tunnels, and what connects to it."""

    def __init__(
        self,
        stack: ExitStack,
        *keys: Key,
        tunnels: Mapping[str, Sequence[Key]] | None = None,
        tls: int = 0,
        wire: str = "auto",
        mux: bool = False,
        **settings: Any,
    ) -> None:
        """`keys`: of the one tunnel, which has no name, unless `tunnels` says which there are."""
        self._stack = stack
        self.common = make_common(stack, data_port=Ports(0, 0, tunnel=mux), **settings)
        keys_by_name = {"": keys} if tunnels is None else tunnels
        urls = [server_url(name, tls, wire) for name in keys_by_name]
        common = self.common
        several = common.settings.clients > 1
        self.port = TunnelPort(urls, common.settings, common.log, common.stats, NOTHING, has_several_clients=several)
        self.crashes: list[Exception] = []
        self.tunnels = [Clients(common, name, its_keys) for name, its_keys in keys_by_name.items()]
        for clients in self.tunnels:
            self.port.join(clients, self.crashes.append)
            stack.callback(self.port.leave, clients)
            start_clients(stack, clients)
        self.slots = [clients.slots[0] for clients in self.tunnels]
        self.slot = self.slots[0]
        self.port.run(make_port_parts)
        self.control_listener, self.data_listener = self._find(ControlListener), self._find(DataListener)

    def _find(self, kind: type[AnyListener]) -> AnyListener:
        [found] = [part for part in self.port._parts if isinstance(part, kind)]
        return found

    def connect(self, *lines: bytes, source: str = "127.0.0.1") -> socket.socket:
        """A peer at the tunnel port that has said something."""
        return self._say(connect(self._stack, self.port.tunnel[0], source), lines)

    def connect_data(self, *lines: bytes, source: str = "127.0.0.1") -> socket.socket:
        """A peer at the port for data connections that has said something."""
        return self._say(connect(self._stack, (self.port.data or self.port.tunnel)[0], source), lines)

    def _say(self, peer: socket.socket, lines: Sequence[bytes]) -> socket.socket:
        for line in lines:
            peer.sendall(line)
        return peer

    def try_v1(self, monkeypatch: pytest.MonkeyPatch, source: str = "127.0.0.1") -> socket.socket:
        """A v1 client on trial, that has got its line."""
        with monkeypatch.context() as brief:
            brief.setattr(control_listener, "SILENCE", SOON)
            client = self.connect(source=source)
            assert read_line(client) == self.port.offer(1).encode()
            return client

    @property
    def control_failures(self) -> dict[str, int]:
        """Which clients have been rejected, by reason."""
        return {why: number for why, number in self.common.stats.control_failures.items() if number}

    @property
    def data_failures(self) -> dict[str, int]:
        """Which data connections have been rejected, by reason."""
        return {why: number for why, number in self.common.stats.data_failures.items() if number}


def occupy(stack: ExitStack, slot: ClientSlot | Clients, agreement: Agreement = V2) -> tuple[Ends, ServerControl]:
    """Put a client into a slot."""
    ends = connect_ends(stack)
    control = ends.server_control()
    with slot.admission(Candidate(control, agreement.client, agreement.key)):
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

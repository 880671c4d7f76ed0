"""Whole tunnels for tests: a server, a client, and the target between which the test itself plays the
service.

The test holds both ends: `visit` gives the visitor's socket, `open` the visitor's and the service's.
Either side of the tunnel is our program or a v1 peer.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tests.support.certificates import Authority, Certificate
from tests.support.log import Entry
from tests.support.process import Environment, Nodepass, Output
from tests.support.sockets import (
    PATIENCE,
    Address,
    connect,
    datagram_socket,
    format_address,
    parse_address,
    receive_all,
    receive_exactly,
)
from tests.support.target import Target
from tests.support.v1_client import V1Client
from tests.support.v1_server import V1Server

Side = Literal["ours", "v1"]

CALM: Environment = {"SERVICE_COOLDOWN": "500ms"}
"""What runs have by default: heartbeats every 5 s, so that a busy machine ends no control connection in a test that is
about something else."""

STEADY: Environment = {**CALM, "REPORT_INTERVAL": "1s"}
"""For what comes with each interval: reports, round trips, a pool that shrinks. A peer is given up after 3 s."""

BRISK: Environment = {**CALM, "REPORT_INTERVAL": "200ms"}
"""For tests that bear it, or wait for it, that a peer which is late by 0.6 s is given up."""


@dataclass(frozen=True)
class Pair:
    """Who is on either side of a tunnel, and its TLS mode."""

    server: Side
    client: Side
    tls: int

    def __str__(self) -> str:
        return f"{self.server}-server-{self.client}-client-tls{self.tls}"


def listening(server: Nodepass) -> tuple[Address, Address, Address]:
    """Where a server says that it listens: tunnel, data, target."""
    entry = server.wait_for("server.listening")
    tunnel, data, target = (parse_address(entry[f"{name}_address"]) for name in ("tunnel", "data", "target"))
    return tunnel, data, target


class OurServer(Nodepass):
    """Our program as a server; entering waits until it listens."""

    def __init__(
        self,
        tls: int = 0,
        certificate: Certificate | None = None,
        *,
        tunnel: str = "127.0.0.1:0",
        target: str = "127.0.0.1:0",
        log: str = "debug",
        query: str = "",
        env: Environment | None = None,
        flags: tuple[str, ...] = (),
        output: Output = "pipe",
    ) -> None:
        """query: more of the URL's, such as `name=web`."""
        url = f"server://{tunnel}/{target}?tls={tls}&log={log}" + (f"&{query}" if query else "")
        if tls == 2:
            assert certificate is not None, "tls=2 needs a certificate"
            url += f"&crt={certificate.crt}&key={certificate.key}"
        super().__init__(*flags, url, env=CALM if env is None else env, output=output)

    def __enter__(self) -> OurServer:
        super().__enter__()
        try:
            self.tunnel_address, self.data_address, self.visitor_address = listening(self)
        except BaseException:
            self.kill()
            raise
        return self

    def wait_for_client(self, after: int = 0, timeout: float = PATIENCE, **fields: Any) -> Entry:
        """Return once a client is connected."""
        return self.wait_for("client.connected", after=after, timeout=timeout, **fields)


class OurClient(Nodepass):
    """Our program as a client; it need not be connected when it has been entered."""

    def __init__(
        self,
        tunnel: Address,
        target: Address,
        *,
        log: str = "debug",
        query: str = "tls=0",
        env: Environment | None = None,
        flags: tuple[str, ...] = (),
    ) -> None:
        """query: more of the URL's, such as `tls=1`; unless given, the server's mode is accepted, also with a key."""
        url = f"client://{format_address(tunnel)}/{format_address(target)}?log={log}" + (f"&{query}" if query else "")
        super().__init__(*flags, url, env=CALM if env is None else env)

    def wait_until_connected(self, after: int = 0, timeout: float = PATIENCE, **fields: Any) -> Entry:
        """Return once it is connected to a server."""
        return self.wait_for("server.connected", after=after, timeout=timeout, **fields)


class OurClients(Nodepass):
    """Our program as the client of several servers, each with a tunnel of its own in one process."""

    def __init__(self, tunnels: Iterable[Address], target: Address, *, env: Environment | None = None) -> None:
        urls = [f"client://{format_address(each)}/{format_address(target)}?log=debug" for each in tunnels]
        super().__init__(*urls, env=CALM if env is None else env)

    def wait_for_tunnel(self, tunnel: Address, event: str = "", **fields: Any) -> Entry:
        """The first such event of the tunnel to that server."""
        return self.wait_for(event, tunnel=f"client:{tunnel[1]}", **fields)


class ServerEnd(Protocol):
    """Any server: our program, one of the servers of a process of ours, or a peer."""

    @property
    def tunnel_address(self) -> Address:
        """Where its client connects."""

    @property
    def visitor_address(self) -> Address:
        """Where visitors connect."""


@dataclass
class Tunnel:
    """A running tunnel, connected; visitors go to `visitor_address` and come out at the target."""

    server: ServerEnd
    client: Nodepass | V1Client
    target: Target

    @property
    def visitor_address(self) -> Address:
        """Where visitors connect, by TCP and UDP."""
        return self.server.visitor_address

    @property
    def our_server(self) -> OurServer:
        """The server, where it is our program."""
        assert isinstance(self.server, OurServer)
        return self.server

    @property
    def our_client(self) -> OurClient:
        """The client, where it is our program."""
        assert isinstance(self.client, OurClient)
        return self.client

    @property
    def v1_server(self) -> V1Server:
        """The server, where it is a v1 peer."""
        assert isinstance(self.server, V1Server)
        return self.server

    @property
    def v1_client(self) -> V1Client:
        """The client, where it is a v1 peer."""
        assert isinstance(self.client, V1Client)
        return self.client

    @contextlib.contextmanager
    def session(self) -> Iterator[tuple[socket.socket, socket.socket]]:
        """Both ends of a new session: the visitor's socket and the service's."""
        with connect(self.visitor_address) as visitor, self.target.accept() as service:
            yield visitor, service

    def exchange(self, question: bytes, answer: bytes) -> tuple[bytes, bytes]:
        """Send a datagram in and one back; what arrived at the target and at the visitor."""
        return exchange(self.visitor_address, self.target, question, answer)

    def assert_works(self) -> None:
        """Carry a few bytes both ways."""
        with self.session() as (visitor, service):
            assert_connected(visitor, service)


def exchange(visitors: Address, target: Target, question: bytes, answer: bytes) -> tuple[bytes, bytes]:
    """Send a datagram in and one back; what arrived at the target and at the visitor."""
    with datagram_socket() as visitor:
        visitor.sendto(question, visitors)
        asked, client = target.udp.recvfrom(1 << 16)
        target.udp.sendto(answer, client)
        return asked, visitor.recv(1 << 16)


def assert_connected(visitor: socket.socket, service: socket.socket) -> None:
    """Check that both ends of a session hear each other."""
    visitor.sendall(b"ping")
    assert receive_exactly(service, 4) == b"ping"
    service.sendall(b"pong")
    assert receive_exactly(visitor, 4) == b"pong"


def assert_half_closes_pass(first: socket.socket, second: socket.socket) -> None:
    """Check that an end of a session that has said all hears the other one, and that both ends of streams pass."""
    first.sendall(b"question")
    first.shutdown(socket.SHUT_WR)
    assert receive_all(second) == b"question"
    second.sendall(b"answer")
    second.shutdown(socket.SHUT_WR)
    assert receive_all(first) == b"answer"


def assert_arrives(sent: bytes, source: socket.socket, sink: socket.socket) -> None:
    """Send more than buffers hold, and the end of the stream, and check that it arrives unharmed."""

    def write() -> None:
        source.sendall(sent)
        source.shutdown(socket.SHUT_WR)

    writer = threading.Thread(target=write)
    writer.start()
    received = receive_all(sink)
    writer.join()
    assert received == sent, f"{len(received)} of {len(sent)} bytes, or others"


@contextlib.contextmanager
def open_tunnel(
    pair: Pair,
    authority: Authority,
    *,
    server_env: Environment = CALM,
    client_env: Environment = CALM,
) -> Iterator[Tunnel]:
    """Start both sides around a target and wait until they are connected."""
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(Target())
        server = stack.enter_context(make_server(pair, authority.local, server_env))
        client = stack.enter_context(make_client(pair, authority, server.tunnel_address, target.address, client_env))
        if isinstance(client, OurClient):
            client.wait_until_connected()
        else:
            client.wait_until_full()
        yield Tunnel(server, client, target)


def make_server(pair: Pair, certificate: Certificate, env: Environment) -> AbstractContextManager[OurServer | V1Server]:
    """The server side of a pair, not yet started."""
    if pair.server == "ours":
        return OurServer(pair.tls, certificate, env=env)
    return V1Server(pair.tls, certificate)


def make_client(
    pair: Pair, authority: Authority, tunnel: Address, target: Address, env: Environment
) -> AbstractContextManager[OurClient | V1Client]:
    """The client side of a pair, not yet started; it trusts the authority."""
    if pair.client == "ours":
        return OurClient(tunnel, target, env={**env, "SSL_CERT_FILE": str(authority.crt)})
    return V1Client(tunnel, target, cafile=authority.crt, server_name="127.0.0.1")

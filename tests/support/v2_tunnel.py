"""Whole tunnels that speak v2: our program or a peer of `support` on either side, with and without a key."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

from nodepass.daemon.key_file import generate
from tests.support.certificates import Authority
from tests.support.process import Environment
from tests.support.shared_tunnels import Ends, Shared, open_tunnels
from tests.support.sockets import Address
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, OurServer, Tunnel
from tests.support.v1_client import V1Client
from tests.support.v1_server import V1Server
from tests.support.wire2.client import V2Client
from tests.support.wire2.server import V2Server

V2Side = Literal["ours", "v2"]

SECRET = generate()
KEYED: Environment = {**CALM, "TUNNEL_KEY": SECRET}


@dataclass(frozen=True)
class V2Pair:
    """Who is on either side of a tunnel, its TLS mode, and whether there is a key."""

    server: V2Side
    client: V2Side
    tls: int = 0
    is_keyed: bool = False

    def __str__(self) -> str:
        return f"{self.server}-server-{self.client}-client-tls{self.tls}{'-keyed' * self.is_keyed}"

    @property
    def secret(self) -> str:
        """The key of the peers."""
        return SECRET if self.is_keyed else ""

    @property
    def client_query(self) -> str:
        """What our client's URL demands: with a key the mode, without one nothing, so that it adopts the server's."""
        return f"tls={self.tls}" if self.is_keyed else ""

    def env(self, extra: Environment) -> dict[str, str]:
        """The environment of our program."""
        return {**(KEYED if self.is_keyed else CALM), **extra}


def v2_server(pair: V2Pair, authority: Authority, extra: Environment) -> AbstractContextManager[OurServer | V1Server]:
    """The server side, not yet started."""
    if pair.server == "ours":
        return OurServer(pair.tls, authority.local, env=pair.env(extra))
    return V2Server(pair.tls, authority.local, secret=pair.secret, mux=extra.get("DATA_PORT") == "tunnel")


def v2_client(
    pair: V2Pair, authority: Authority, tunnel: Address, target: Address, extra: Environment
) -> AbstractContextManager[OurClient | V1Client]:
    """The client side, not yet started; it trusts the authority."""
    if pair.client == "ours":
        env = {**pair.env(extra), "SSL_CERT_FILE": str(authority.crt)}
        return OurClient(tunnel, target, query=pair.client_query, env=env)
    return V2Client(
        tunnel,
        target,
        secret=pair.secret,
        demand=pair.tls if pair.is_keyed else 0,
        cafile=authority.crt if pair.tls == 2 else None,
    )


def ends_of(pair: V2Pair, authority: Authority) -> Ends:
    """The ends of a tunnel that shares processes of ours with others; with a key each has a name of its own."""
    name = str(pair) if pair.is_keyed else ""

    def make_client(tunnel: Address, target: Address) -> V1Client:
        cafile = authority.crt if pair.tls == 2 else None
        demand = pair.tls if pair.is_keyed else 0
        return V2Client(tunnel, target, secret=pair.secret, name=name, demand=demand, cafile=cafile)

    return Ends(
        f"tls={pair.tls}&name={name}"
        if pair.server == "ours"
        else V2Server(pair.tls, authority.local, secret=pair.secret, name=name),
        f"{pair.client_query}&name={name}".lstrip("&") if pair.client == "ours" else make_client,
    )


@contextlib.contextmanager
def open_v2_tunnels(
    pairs: Iterable[V2Pair], authority: Authority, extra: Environment | None = None
) -> Iterator[dict[str, Tunnel]]:
    """Tunnels that have agreed on v2, and of which neither end has given up the other in the end: two starts of our
    program for all of them with a key, and two for all without.
    """
    tunnels: dict[str, Tunnel] = {}
    with contextlib.ExitStack() as stack:
        for is_keyed in (False, True):
            group = [pair for pair in pairs if pair.is_keyed == is_keyed]
            if not group:
                continue
            ends = {str(pair): ends_of(pair, authority) for pair in group}
            env = {**(KEYED if is_keyed else CALM), **(extra or {})}
            shared = stack.enter_context(open_tunnels(ends, authority, env))
            tunnels |= shared.tunnels
            stack.callback(check_log, shared, group)
        yield tunnels


def check_log(shared: Shared, pairs: Iterable[V2Pair]) -> None:
    """Check what the log has of tunnels that still run."""
    for pair in pairs:
        if pair.client == "ours":
            assert shared.clients.find_in(str(pair), "server.connected", tls=pair.tls, wire=2)
        if pair.server == "ours":
            assert shared.servers.find_in(str(pair), "client.connected", wire=2)
    for run in (shared.servers, shared.clients):
        assert not run.find("client.disconnected") + run.find("server.disconnected") + run.find(level="error")


@contextlib.contextmanager
def open_v2_tunnel(pair: V2Pair, authority: Authority, extra: Environment | None = None) -> Iterator[Tunnel]:
    """Start both sides around a target and wait until they are connected; `extra`: more settings for both."""
    more = extra or {}
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(Target())
        server = stack.enter_context(v2_server(pair, authority, more))
        client = stack.enter_context(v2_client(pair, authority, server.tunnel_address, target.address, more))
        if isinstance(client, OurClient):
            client.wait_until_connected(tls=pair.tls, wire=2)
        else:
            client.wait_until_full()
        if isinstance(server, OurServer):
            server.wait_for_client(wire=2)
        yield Tunnel(server, client, target)

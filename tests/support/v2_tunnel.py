"""Whole tunnels that speak v2: our program or a peer of `support` on either side, with and without a key."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

from nodepass.daemon.key_file import generate
from tests.support.certificates import Authority
from tests.support.process import Environment
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

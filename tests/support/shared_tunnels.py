"""Many whole tunnels with two starts of our program: one process has all servers of ours, and one all clients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from tests.support.certificates import Authority
from tests.support.process import Environment
from tests.support.sockets import Address
from tests.support.target import Target
from tests.support.tunnel import CALM, Pair, Tunnel
from tests.support.v1_client import V1Client
from tests.support.v1_server import V1Server
from tests.support.wire2.ours import OurClients, OurServers, Place


@dataclass(frozen=True)
class Ends:
    """The ends of a tunnel: the query of our URL, or a peer. A client is made with the tunnel's and the target's
    address.
    """

    server: str | AbstractContextManager[V1Server]
    client: str | Callable[[Address, Address], AbstractContextManager[V1Client]]


@dataclass
class Shared:
    """Running tunnels by label, and the processes of ours that they share."""

    servers: OurServers
    clients: OurClients
    tunnels: dict[str, Tunnel]


@contextlib.contextmanager
def open_tunnels(ends: Mapping[str, Ends], authority: Authority, env: Environment = CALM) -> Iterator[Shared]:
    """Start everything, each tunnel with a target of its own, and wait until all clients are connected."""
    with contextlib.ExitStack() as stack:
        queries = {label: each.server for label, each in ends.items() if isinstance(each.server, str)}
        servers = stack.enter_context(OurServers(queries, authority.local, env=env))
        near: dict[str, Place | V1Server] = {
            label: servers[label] if isinstance(each.server, str) else stack.enter_context(each.server)
            for label, each in ends.items()
        }
        targets = {label: stack.enter_context(Target()) for label in ends}
        where = {
            label: (near[label].tunnel_address, each.client)
            for label, each in ends.items()
            if isinstance(each.client, str)
        }
        addresses = {label: targets[label].address for label in where}
        client_env = {**env, "SSL_CERT_FILE": str(authority.crt)}
        clients = stack.enter_context(OurClients(where, addresses, env=client_env))
        peers = {
            label: stack.enter_context(each.client(near[label].tunnel_address, targets[label].address))
            for label, each in ends.items()
            if not isinstance(each.client, str)
        }
        for label in where:
            clients.wait_in(label, "server.connected")
        for label in queries:
            servers.wait_in(label, "client.connected")
        for peer in peers.values():
            peer.wait_until_full()
        tunnels = {label: Tunnel(near[label], peers.get(label, clients), targets[label]) for label in ends}
        yield Shared(servers, clients, tunnels)


def ends_of(pair: Pair, authority: Authority) -> Ends:
    """Our program or a v1 peer on either end; our client accepts any mode, and trusts the authority."""

    def make_client(tunnel: Address, target: Address) -> V1Client:
        return V1Client(tunnel, target, cafile=authority.crt, server_name="127.0.0.1")

    return Ends(
        f"tls={pair.tls}" if pair.server == "ours" else V1Server(pair.tls, authority.local),
        "tls=0" if pair.client == "ours" else make_client,
    )

"""A client of ours at a v1 server, which speaks first, reads nothing and never notices what it was asked."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping

import pytest

from tests.support.certificates import Authority
from tests.support.log import one_of
from tests.support.process import Environment
from tests.support.sockets import until
from tests.support.target import Target
from tests.support.tunnel import CALM, Tunnel
from tests.support.v1_server import V1Server
from tests.support.wire2.ours import OurClients
from tests.support.wire2.proofs import SECRET


@pytest.fixture(scope="module")
def env(authority: Authority) -> Environment:
    return {**CALM, "SSL_CERT_FILE": str(authority.crt)}


@contextlib.contextmanager
def at_v1_servers(
    authority: Authority, env: Environment, cases: Mapping[str, tuple[int, str]]
) -> Iterator[tuple[OurClients, dict[str, tuple[V1Server, Target]]]]:
    """One process with a client for each case, each with a v1 server and a target of its own."""
    with contextlib.ExitStack() as stack:
        servers = {label: stack.enter_context(V1Server(tls, authority.local)) for label, (tls, _) in cases.items()}
        targets = {label: stack.enter_context(Target()) for label in cases}
        where = {label: (servers[label].tunnel_address, query) for label, (_, query) in cases.items()}
        addresses = {label: target.address for label, target in targets.items()}
        clients = stack.enter_context(OurClients(where, addresses, env=env))
        yield clients, {label: (servers[label], targets[label]) for label in cases}
        assert not clients.find_crashes()


SERVED = {
    "0, no demand": (0, ""),
    "1, no demand": (1, ""),
    "2, no demand": (2, ""),
    "0, adopted quietly": (0, "tls=0"),
    "1 for 1": (1, "tls=1"),
    "2 for 1": (2, "tls=1"),
    "2 for 2, v1 expected": (2, "tls=2&wire=1"),
    "1 for 1, v1 expected": (1, "tls=1&wire=1"),
    "0, v1 expected": (0, "wire=1"),
}


def test_a_v1_server_is_used_on_the_connection_on_which_it_was_asked(authority: Authority, env: Environment) -> None:
    """It answers a ClientHello in the clear: it has sent its line before it could read anything."""
    with at_v1_servers(authority, env, SERVED) as (clients, ends):
        for label, (server, target) in ends.items():
            clients.wait_in(label, "server.connected", tls=SERVED[label][0], wire=1)
            tunnel = Tunnel(server, clients, target)
            for _ in range(10):
                tunnel.assert_works()
            assert tunnel.exchange(b"question", b"answer") == (b"question", b"answer")
            assert server.connects == 1


REFUSED = {
    "0 for 1": (0, "tls=1"),
    "0 for 2": (0, "tls=2"),
    "1 for 2": (1, "tls=2"),
    "2 for 2, v1 not expected": (2, "tls=2"),
    "1 for 2, v1 expected": (1, "tls=2&wire=1"),
    "0 for 1, v1 expected": (0, "tls=1&wire=1"),
    "v2 demanded": (0, "wire=2"),
    "v2 demanded with TLS": (1, "tls=1&wire=2"),
}


def test_a_v1_server_below_the_demand_is_refused_by_name(authority: Authority, env: Environment) -> None:
    with at_v1_servers(authority, env, REFUSED) as (clients, ends):
        for label, (server, _) in ends.items():
            entry = clients.wait_in(label, "server.rejected", level="error", reason=one_of("no_tls", "version"))
            assert re.search("v1|tls", entry["error"]), entry
            assert server.idle == 0
        assert not clients.find("server.connected")


@pytest.mark.programs
def test_with_a_key_no_v1_server_is_used(authority: Authority, env: Environment) -> None:
    cases = {query: (2, f"{query}&name={number}") for number, query in enumerate(("tls=0", "tls=1", "tls=2", "wire=2"))}
    with at_v1_servers(authority, {**env, "TUNNEL_KEY": SECRET}, cases) as (clients, ends):
        for label, (server, _) in ends.items():
            clients.wait_in(label, "server.rejected", level="error", reason=one_of("key_mismatch", "version", "no_tls"))
            assert server.idle == 0
        assert not clients.find("server.connected")


@pytest.mark.programs
def test_signals_in_the_clear_are_said_at_each_connect_where_tls_2_is_demanded(
    authority: Authority, env: Environment
) -> None:
    with at_v1_servers(authority, env, {"": (2, "tls=2&wire=1")}) as (clients, ends):
        for times in (1, 2):
            until(lambda: len(clients.find("server.clear_signals", level="warn")) == times)  # noqa: B023  # called here
            ends[""][0].drop_client()

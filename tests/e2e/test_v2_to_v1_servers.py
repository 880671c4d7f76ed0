"""A client of ours at a v1 server, which speaks first, reads nothing and never notices what it was asked."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import pytest

from tests.support.certificates import Authority
from tests.support.log import one_of
from tests.support.process import Environment
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, Tunnel
from tests.support.v1_server import V1Server


@pytest.fixture(scope="module")
def env(authority: Authority) -> Environment:
    return {**CALM, "SSL_CERT_FILE": str(authority.crt)}


@contextlib.contextmanager
def at_v1_server(authority: Authority, env: Environment, tls: int, query: str) -> Iterator[Tunnel]:
    with (
        V1Server(tls, authority.local) as server,
        Target() as target,
        OurClient(server.tunnel_address, target.address, query=query, env=env) as client,
    ):
        yield Tunnel(server, client, target)


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


@pytest.mark.parametrize("case", SERVED)
def test_a_v1_server_is_used_on_the_connection_on_which_it_was_asked(
    authority: Authority, env: Environment, case: str
) -> None:
    """It answers a ClientHello in the clear: it has sent its line before it could read anything."""
    tls, query = SERVED[case]
    with at_v1_server(authority, env, tls, query) as tunnel:
        tunnel.our_client.wait_until_connected(tls=tls, wire=1)
        for _ in range(10):
            tunnel.assert_works()
        assert tunnel.exchange(b"question", b"answer") == (b"question", b"answer")
        assert tunnel.v1_server.connects == 1


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


@pytest.mark.parametrize("case", REFUSED)
def test_a_v1_server_below_the_demand_is_refused_by_name(authority: Authority, env: Environment, case: str) -> None:
    tls, query = REFUSED[case]
    with at_v1_server(authority, env, tls, query) as tunnel:
        client = tunnel.our_client
        entry = client.wait_for("server.rejected", level="error", reason=one_of("no_tls", "version"))
        assert re.search("v1|tls", entry["error"]), entry
        assert not client.find("server.connected")
        assert tunnel.v1_server.idle == 0


@pytest.mark.parametrize("query", ["tls=0", "tls=1", "tls=2", ""])
def test_with_a_key_no_v1_server_is_used(authority: Authority, env: Environment, query: str) -> None:
    with at_v1_server(authority, {**env, "TUNNEL_KEY": "correct horse battery staple"}, 2, query) as tunnel:
        client = tunnel.our_client
        client.wait_for("server.rejected", level="error", reason=one_of("key_mismatch", "version", "no_tls"))
        assert not client.find("server.connected")
        assert tunnel.v1_server.idle == 0


def test_signals_in_the_clear_are_said_at_each_connect_where_tls_2_is_demanded(
    authority: Authority, env: Environment
) -> None:
    with at_v1_server(authority, env, 2, "tls=2&wire=1") as tunnel:
        client = tunnel.our_client
        client.wait_for("server.clear_signals", level="warn")
        mark = client.mark()
        tunnel.v1_server.drop_client()
        client.wait_for("server.clear_signals", level="warn", after=mark)

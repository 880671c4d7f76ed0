"""The v1 peers of `support` against each other: what the other tests measure our program with is itself
good.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.certificates import Authority
from tests.support.sockets import (
    connect,
    is_closed_both_ways,
    receive_exactly,
    reset,
    until,
)
from tests.support.tunnel import Pair, Tunnel, assert_arrives, assert_connected, assert_half_closes_pass, open_tunnel
from tests.support.v1_client import V1Client
from tests.support.v1_server import V1Server

PAIRS = [Pair("v1", "v1", tls) for tls in (0, 1, 2)]


@pytest.fixture(scope="module", params=PAIRS, ids=str)
def peers(request: pytest.FixtureRequest, authority: Authority) -> Iterator[Tunnel]:
    """A tunnel of two v1 peers in each TLS mode."""
    with open_tunnel(request.param, authority) as tunnel:
        yield tunnel


def test_v1_peers_carry_more_sessions_than_their_pool_holds(peers: Tunnel) -> None:
    for _ in range(30):
        peers.assert_works()


def test_v1_peers_pass_a_half_close_in_both_directions(peers: Tunnel) -> None:
    with peers.session() as (visitor, service):
        assert_half_closes_pass(visitor, service)
    with peers.session() as (visitor, service):
        assert_half_closes_pass(service, visitor)


def test_v1_peers_carry_megabytes_unharmed(peers: Tunnel) -> None:
    with peers.session() as (visitor, service):
        assert_arrives(bytes(range(256)) * (4 << 12), visitor, service)


def test_v1_peers_carry_datagrams_that_fit_the_first_tls_record(peers: Tunnel) -> None:
    for size in (1, 100, 1000):
        question, answer = b"q" * size, b"a" * size
        assert peers.exchange(question, answer) == (question, answer)


def test_a_v1_peer_passes_a_reset_on(peers: Tunnel) -> None:
    with peers.session() as (visitor, service):
        assert_connected(visitor, service)
        reset(visitor)
        assert is_closed_both_ways(service)


def test_a_v1_client_comes_back_and_its_sessions_go_on(peers: Tunnel) -> None:
    server = peers.v1_server
    with peers.session() as (visitor, service):
        before = server.connects
        server.drop_client()
        until(lambda: server.connects > before)
        assert_connected(visitor, service)
    peers.assert_works()


def test_a_v1_client_replaces_idle_connections_that_its_server_closed(peers: Tunnel) -> None:
    server = peers.v1_server
    until(lambda: server.idle == 8)
    assert server.close_idle() == 8
    until(lambda: server.idle == 8)
    peers.assert_works()


def test_a_v1_server_drops_idle_connections_that_its_client_closed(peers: Tunnel) -> None:
    peers.v1_client.wait_until_full()
    peers.v1_client.close_idle(keep=1)
    peers.assert_works()


def test_a_v1_client_can_be_led_by_hand() -> None:
    with V1Server() as server, V1Client(server.tunnel_address, automatic=False) as client:
        client.connect()
        identity, stream = client.open_data()
        server.write(b"\n//ignored?query#unknown\n \n")
        with connect(server.visitor_address) as visitor:
            assert client.next_launch() == (identity, 1)
            stream.send(b"by hand")
            assert receive_exactly(visitor, 7) == b"by hand"

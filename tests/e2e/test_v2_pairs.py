"""Wire v2 in every TLS mode, with and without a key: our program with itself and with a v2 peer on either end."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import pytest

from tests.support.certificates import Authority
from tests.support.sockets import datagram_socket
from tests.support.tunnel import Tunnel, assert_arrives, assert_connected, assert_half_closes_pass
from tests.support.v2_tunnel import V2Pair, V2Side, open_v2_tunnels

SIDES: tuple[tuple[V2Side, V2Side], ...] = (("ours", "ours"), ("ours", "v2"), ("v2", "ours"))
PAIRS = [
    *(V2Pair("ours", "ours", tls, keyed) for tls in (0, 1, 2) for keyed in (False, True)),
    *(V2Pair(*sides, tls, tls > 0) for sides in SIDES[1:] for tls in (0, 1, 2)),
]
DIAGONAL = [V2Pair("ours", "ours", 1, True), V2Pair("ours", "v2", 2), V2Pair("v2", "ours", 0, True)]

every_pair = pytest.mark.parametrize("v2_tunnel", PAIRS, indirect=True, ids=str, scope="module")


@pytest.fixture(scope="module")
def kinds(authority: Authority) -> Iterator[dict[str, Tunnel]]:
    with open_v2_tunnels(dict.fromkeys([*PAIRS, *DIAGONAL]), authority) as tunnels:
        yield tunnels


@pytest.fixture(scope="module", params=DIAGONAL, ids=str)
def v2_tunnel(request: pytest.FixtureRequest, kinds: dict[str, Tunnel]) -> Tunnel:
    return kinds[str(request.param)]


def test_tcp_sessions_more_than_the_pool_holds_all_work(v2_tunnel: Tunnel) -> None:
    for _ in range(25):
        v2_tunnel.assert_works()


def test_many_sessions_at_once_keep_apart(v2_tunnel: Tunnel) -> None:
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(v2_tunnel.session()) for _ in range(20)]
        for visitor, service in sessions:
            assert_connected(visitor, service)


@every_pair
def test_a_half_close_passes_in_both_directions(v2_tunnel: Tunnel) -> None:
    with v2_tunnel.session() as (visitor, service):
        assert_half_closes_pass(visitor, service)


@every_pair
def test_megabytes_pass_unharmed(v2_tunnel: Tunnel) -> None:
    with v2_tunnel.session() as (visitor, service):
        assert_arrives(random.Random(7).randbytes(2 << 20), visitor, service)


@every_pair
def test_datagrams_pass_both_ways(v2_tunnel: Tunnel) -> None:
    for number in range(20):
        question, answer = b"question %d" % number, b"answer %d" % number
        assert v2_tunnel.exchange(question, answer) == (question, answer)


def test_datagrams_and_bytes_share_the_tunnel(v2_tunnel: Tunnel) -> None:
    with v2_tunnel.session() as (visitor, service), datagram_socket() as asker:
        asker.sendto(b"question", v2_tunnel.visitor_address)
        _, flow = v2_tunnel.target.udp.recvfrom(100)
        assert_connected(visitor, service)
        v2_tunnel.target.udp.sendto(b"answer", flow)
        assert asker.recv(100) == b"answer"

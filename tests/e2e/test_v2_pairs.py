"""Wire v2 in every TLS mode, with and without a key: our program with itself and with a v2 peer on either end."""

from __future__ import annotations

import contextlib
import hashlib
import random
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.support.certificates import Authority
from tests.support.sockets import datagram_socket, receive_all
from tests.support.tunnel import Tunnel, assert_connected
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
        visitor.sendall(b"question")
        visitor.shutdown(socket.SHUT_WR)
        assert receive_all(service) == b"question"
        service.sendall(b"answer")
        service.shutdown(socket.SHUT_WR)
        assert receive_all(visitor) == b"answer"


@every_pair
def test_megabytes_pass_unharmed(v2_tunnel: Tunnel) -> None:
    sent = random.Random(7).randbytes(2 << 20)

    def write() -> None:
        visitor.sendall(sent)
        visitor.shutdown(socket.SHUT_WR)

    with v2_tunnel.session() as (visitor, service):
        writer = threading.Thread(target=write)
        writer.start()
        received = receive_all(service)
        writer.join()
    assert hashlib.sha256(received).digest() == hashlib.sha256(sent).digest()


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

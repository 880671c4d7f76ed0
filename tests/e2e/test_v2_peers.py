"""The v2 peers of `support` against the test vector and against each other: what the other tests measure our
program with is itself good.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.support.certificates import Authority
from tests.support.sockets import datagram_socket, receive_all, until
from tests.support.tunnel import Tunnel, assert_connected
from tests.support.v2_client import V2Client
from tests.support.v2_control import Refused
from tests.support.v2_crypto import Transcript, stretch
from tests.support.v2_lane import LANE, LARGEST, make_frame
from tests.support.v2_server import V2Server
from tests.support.v2_tunnel import SECRET, V2Pair, open_v2_tunnel

PAIRS = [V2Pair("v2", "v2", tls, keyed) for tls, keyed in ((0, False), (0, True), (1, True), (2, False))]


@pytest.fixture(scope="module", params=PAIRS, ids=str)
def peers(request: pytest.FixtureRequest, authority: Authority) -> Iterator[Tunnel]:
    """A tunnel of two v2 peers of every kind."""
    with open_v2_tunnel(request.param, authority) as tunnel:
        yield tunnel


def test_the_peers_compute_the_test_vector() -> None:
    nonces = "000102030405060708090a0b0c0d0e0f", "f0e0d0c0b0a090807060504030201000"
    secret = "correct horse battery staple"
    agreed = Transcript(secret, *nonces, port=10102, tls=0)
    assert stretch(secret).hex() == "f037d55a2a94b0f4829f20111e56fdb8bd62156b2cc316b4cff08809b9f6a864"
    assert agreed.client_proof() == "e7ff0df20186f6168b696ff9fe0cb2b2b86adbb768d9c718e69cb305e84e60a8"
    assert agreed.server_proof() == "114d82eea31a76f4659de6a3e14d43749eb4a2c727844ac89123a6f52b1eaafb"
    assert agreed.session_key().hex() == "bfd0ab4234f84ed48934fab30b9a8a758c30123327c77fd5deb9e66651eaeeae"
    proof = agreed.data_proof(b"deadbeef")
    assert proof.hex() == "267782a769d28fc0a00c4de08582df1f2c28715e6913de2af09f47ce17fd1b84"


def test_a_frame_is_flow_length_and_payload_in_network_order() -> None:
    assert make_frame(1, b"") == bytes.fromhex("00000001 0000")
    assert make_frame(0x01020304, b"xyz") == bytes.fromhex("01020304 0003") + b"xyz"


def test_v2_peers_carry_more_sessions_than_their_pool_holds(peers: Tunnel) -> None:
    for _ in range(20):
        peers.assert_works()


def test_v2_peers_pass_a_half_close(peers: Tunnel) -> None:
    with peers.session() as (visitor, service):
        visitor.sendall(b"question")
        visitor.shutdown(socket.SHUT_WR)
        assert receive_all(service) == b"question"
        service.sendall(b"answer")
        service.shutdown(socket.SHUT_WR)
        assert receive_all(visitor) == b"answer"


@pytest.mark.parametrize("size", [0, 1, 1472, 9000, LARGEST])
def test_v2_peers_carry_datagrams_of_any_size(peers: Tunnel, size: int) -> None:
    question, answer = b"q" * size, b"a" * size
    assert peers.exchange(question, answer) == (question, answer)


def test_v2_peers_deliver_unasked_datagrams(peers: Tunnel) -> None:
    with datagram_socket() as visitor:
        visitor.sendto(b"hello", peers.visitor_address)
        _, flow = peers.target.udp.recvfrom(100)
        for number in range(5):
            peers.target.udp.sendto(b"%d" % number, flow)
            assert visitor.recv(100) == b"%d" % number


def test_v2_peers_answer_heartbeats(peers: Tunnel) -> None:
    assert isinstance(peers.server, V2Server)
    server, before = peers.server, peers.server.answers
    until(lambda: server.answers >= before + 2)


def test_a_v2_client_comes_back_and_its_sessions_go_on(peers: Tunnel) -> None:
    server = peers.v1_server
    with peers.session() as (visitor, service):
        before = server.connects
        server.drop_client()
        until(lambda: server.connects > before)
        assert_connected(visitor, service)
    peers.assert_works()


@pytest.mark.parametrize("pair", [V2Pair("v2", "v2", tls, True) for tls in (0, 1)], ids=str)
def test_v2_peers_can_do_with_one_port(pair: V2Pair, authority: Authority) -> None:
    with open_v2_tunnel(pair, authority, {"DATA_PORT": "tunnel"}) as tunnel:
        assert isinstance(tunnel.client, V2Client)
        assert tunnel.client.data_address == tunnel.server.tunnel_address
        tunnel.assert_works()
        assert tunnel.exchange(b"question", b"answer") == (b"question", b"answer")


def test_a_v2_server_turns_a_wrong_key_away_and_refuses_a_wrong_data_proof() -> None:
    with V2Server(secret=SECRET) as server:
        stranger = V2Client(server.tunnel_address, secret="wrong", automatic=False)
        with stranger, pytest.raises(Refused, match="key-mismatch"):
            stranger.connect()
        with V2Client(server.tunnel_address, secret=SECRET, automatic=False) as client:
            client.connect()
            _, stream = client.open_data(prove=lambda _: bytes(32))
            assert stream.recv(1) == b""
            assert server.refused_proofs == 1


def test_a_v2_client_can_be_led_by_hand() -> None:
    with V2Server() as server, V2Client(server.tunnel_address, automatic=False) as client:
        client.connect()
        identity, stream = client.open_data()
        with datagram_socket() as visitor:
            visitor.sendto(b"by hand", server.visitor_address)
            lane = client.next_lane({identity: stream})
            flow, payload = lane.receive()
            assert payload == b"by hand"
            lane.send(flow, b"so be it")
            assert visitor.recv(100) == b"so be it"
        assert LANE == 3

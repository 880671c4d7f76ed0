"""UDP: one datagram in, one answer back, of every allowed size, in every TLS mode and with v1 peers."""

from __future__ import annotations

import contextlib
import random
import re
import socket

import pytest

from tests.e2e.conftest import TunnelFactory, every_pair
from tests.support.sockets import connect, datagram_socket, free_port, is_silent
from tests.support.tunnel import CALM, OurClient, OurServer, Tunnel

SIZES = (1, 100, 999, 1000, 1200, 1400, 4096, 8192)


@every_pair
def test_a_datagram_of_any_size_passes_exactly(any_tunnel: Tunnel) -> None:
    for size in SIZES:
        question, answer = random.Random(size).randbytes(size), random.Random(-size).randbytes(size)
        assert any_tunnel.exchange(question, answer) == (question, answer)


def test_many_visitors_each_get_their_own_answer(any_tunnel: Tunnel) -> None:
    with contextlib.ExitStack() as stack:
        visitors = [stack.enter_context(datagram_socket()) for _ in range(32)]
        for number, visitor in enumerate(visitors):
            visitor.sendto(b"question %d" % number, any_tunnel.visitor_address)
        for _ in visitors:
            question, client = any_tunnel.target.udp.recvfrom(100)
            any_tunnel.target.udp.sendto(question.replace(b"question", b"answer"), client)
        for number, visitor in enumerate(visitors):
            assert visitor.recv(100) == b"answer %d" % number


def test_a_visitor_may_ask_again_and_again(any_tunnel: Tunnel) -> None:
    with datagram_socket() as visitor:
        for number in range(20):
            visitor.sendto(b"%d" % number, any_tunnel.visitor_address)
            question, client = any_tunnel.target.udp.recvfrom(100)
            any_tunnel.target.udp.sendto(question * 2, client)
            assert visitor.recv(100) == b"%d" % number * 2


def test_the_answer_comes_from_the_address_that_was_asked(any_tunnel: Tunnel) -> None:
    with datagram_socket() as visitor:
        visitor.connect(any_tunnel.visitor_address)
        visitor.send(b"question")
        _, client = any_tunnel.target.udp.recvfrom(100)
        any_tunnel.target.udp.sendto(b"answer", client)
        assert visitor.recv(100) == b"answer"


@pytest.mark.programs
def test_a_service_that_never_answers_harms_nobody(tunnel: TunnelFactory) -> None:
    short = {**CALM, "UDP_SESSION_TIMEOUT": "500ms"}
    started = tunnel(server_env=short, client_env=short)
    server, client = started.our_server, started.our_client
    started.exchange(b"warm", b"up")
    before = server.settled_descriptors(), client.settled_descriptors()
    with datagram_socket() as visitor:
        for _ in range(20):
            visitor.sendto(b"anybody?", started.visitor_address)
            assert started.target.udp.recv(100) == b"anybody?"
        assert is_silent(visitor, 0.3)
    assert started.exchange(b"question", b"answer") == (b"question", b"answer")
    assert server.settled_descriptors() <= before[0]
    assert client.settled_descriptors() <= before[1]


@pytest.mark.programs
def test_a_service_without_a_udp_port_harms_nobody(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(OurServer())
    client = stack.enter_context(OurClient(server.tunnel_address, ("127.0.0.1", free_port())))
    client.wait_until_connected()
    with datagram_socket() as visitor:
        for _ in range(5):
            visitor.sendto(b"anybody?", server.visitor_address)
        assert is_silent(visitor, 0.3)
    assert client.is_running
    assert server.is_running


def test_a_datagram_over_the_limit_is_dropped_and_logged(tunnel: TunnelFactory) -> None:
    started = tunnel(client="v1", server_env={**CALM, "UDP_DATA_BUF_SIZE": "2000"})
    with datagram_socket() as visitor:
        visitor.sendto(b"x" * 2001, started.visitor_address)
        started.our_server.wait_for("datagram.dropped", level="warn", reason="too_large", size=2001)
    assert started.exchange(b"q" * 2000, b"answer") == (b"q" * 2000, b"answer")


def test_an_answer_over_the_limit_is_dropped_and_logged(tunnel: TunnelFactory) -> None:
    started = tunnel(server="v1", client_env={**CALM, "UDP_DATA_BUF_SIZE": "2000"})
    with datagram_socket() as visitor:
        visitor.sendto(b"question", started.visitor_address)
        _, client = started.target.udp.recvfrom(100)
        started.target.udp.sendto(b"x" * 2001, client)
        started.our_client.wait_for("datagram.dropped", level="warn", reason="too_large", error=re.compile("2001"))
        assert is_silent(visitor, 0.1)
    assert started.exchange(b"question", b"a" * 2000) == (b"question", b"a" * 2000)


@pytest.mark.programs
def test_an_empty_pool_never_stalls_the_next_datagrams(stack: contextlib.ExitStack) -> None:
    """Datagrams that came while no client was there wait beside each other, not in a row."""
    server = stack.enter_context(OurServer(env={**CALM, "POOL_GET_TIMEOUT": "1s"}))
    visitor = stack.enter_context(datagram_socket())
    for _ in range(30):
        visitor.sendto(b"nobody is there", server.visitor_address)
    server.wait_for("datagram.dropped", reason="unserved")
    target = stack.enter_context(datagram_socket())
    client = stack.enter_context(OurClient(server.tunnel_address, target.getsockname()))
    client.wait_until_connected()
    visitor.sendto(b"question", server.visitor_address)
    while target.recv(100) != b"question":
        pass


def test_tcp_and_udp_share_one_address(our_tunnel: Tunnel) -> None:
    with our_tunnel.session() as (visitor, service):
        assert our_tunnel.exchange(b"question", b"answer") == (b"question", b"answer")
        visitor.sendall(b"tcp")
        visitor.shutdown(socket.SHUT_WR)
        assert service.recv(10) == b"tcp"
    with connect(our_tunnel.visitor_address), our_tunnel.target.accept():
        pass

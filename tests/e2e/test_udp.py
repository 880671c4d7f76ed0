"""UDP where something is wrong: limits, services that do not answer, a pool that is empty.

What passes between v1 peers and ours in every TLS mode is in tests/e2e/test_sessions.py, v2's in test_lanes.py.
"""

from __future__ import annotations

import contextlib
import re

import pytest

from tests.e2e.conftest import TunnelFactory
from tests.support.sockets import datagram_socket, free_port, is_silent
from tests.support.tunnel import CALM, OurClient, OurServer


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

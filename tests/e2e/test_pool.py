"""The pool of idle data connections: never stalled by a silent peer, never hands out a dead connection."""

from __future__ import annotations

import contextlib
import socket

import pytest

from tests.e2e.conftest import TunnelFactory
from tests.support.proc import count_connections
from tests.support.sockets import connect, is_over, receive_exactly, reset, until
from tests.support.target import Target
from tests.support.tunnel import BRISK, CALM, OurClient, OurServer, Tunnel
from tests.support.v1_client import V1Client
from tests.support.v1_server import V1Server

FEW: dict[str, str] = {**CALM, "MIN_POOL_CAPACITY": "4", "MAX_POOL_CAPACITY": "8"}


def test_the_client_fills_the_pool_to_its_minimum(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(OurServer(1, env=FEW))
    mark = server.mark()
    client = stack.enter_context(OurClient(server.tunnel_address, ("127.0.0.1", 9), env=FEW))
    client.wait_until_connected()
    server.wait_for_client(after=mark)
    until(lambda: count_connections(client.pid, server.data_address[1]) == 4)


@pytest.mark.parametrize("tls", [pytest.param(0, marks=pytest.mark.programs), 1])
def test_a_connection_that_the_client_closed_is_never_handed_to_a_visitor(
    stack: contextlib.ExitStack, tls: int
) -> None:
    server = stack.enter_context(OurServer(tls))
    target = stack.enter_context(Target())
    client = stack.enter_context(V1Client(server.tunnel_address, target.address, pool=12))
    tunnel = Tunnel(server, client, target)
    for _ in range(5):
        client.wait_until_full()
        client.close_idle(keep=1)
        for _ in range(3):
            tunnel.assert_works()


@pytest.mark.programs
def test_a_connection_that_the_server_closed_is_replaced_by_our_client(
    stack: contextlib.ExitStack,
) -> None:
    server = stack.enter_context(V1Server())
    target = stack.enter_context(Target())
    client = stack.enter_context(OurClient(server.tunnel_address, target.address, env=FEW))
    for _ in range(3):
        until(lambda: server.idle >= 4)
        assert server.close_idle() >= 4
        Tunnel(server, client, target).assert_works()


def test_a_connection_that_talks_out_of_turn_is_never_handed_to_a_visitor(
    stack: contextlib.ExitStack,
) -> None:
    server = stack.enter_context(OurServer(1))
    client = stack.enter_context(V1Client(server.tunnel_address, automatic=False))
    client.connect()
    talkative, stream = client.open_data()
    stream.send(b"out of turn")
    good, _ = client.open_data()
    with connect(server.visitor_address):
        assert client.next_launch() == (good, 1)
    assert talkative != good


@pytest.mark.programs
def test_silent_peers_on_the_data_port_do_not_stall_the_pool(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(OurServer(1, env={**CALM, "HANDSHAKE_TIMEOUT": "20s"}))
    target = stack.enter_context(Target())
    for _ in range(100):
        stack.enter_context(connect(server.data_address))
    client = stack.enter_context(OurClient(server.tunnel_address, target.address))
    for _ in range(100):
        stack.enter_context(connect(server.data_address))
    client.wait_until_connected()
    tunnel = Tunnel(server, client, target)
    for _ in range(40):
        tunnel.assert_works()


@pytest.mark.programs
def test_a_silent_peer_on_the_data_port_is_closed_after_the_handshake_timeout(
    stack: contextlib.ExitStack,
) -> None:
    server = stack.enter_context(OurServer(1, env={**CALM, "HANDSHAKE_TIMEOUT": "300ms"}))
    client = stack.enter_context(V1Client(server.tunnel_address, automatic=False))
    client.connect()
    with connect(server.data_address) as silent:
        assert is_over(silent)


@pytest.mark.programs
def test_rubbish_on_the_data_port_is_survived(tunnel: TunnelFactory) -> None:
    started = tunnel(tls=1)
    for rubbish in (b"GET / HTTP/1.1\r\n\r\n", b"\0" * 4000, b"\x16\x03\x01"):
        with connect(started.our_server.data_address) as stranger:
            stranger.sendall(rubbish)
            stranger.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while stranger.recv(4096):
                    pass
    reset(connect(started.our_server.data_address))
    started.assert_works()


@pytest.mark.programs
def test_a_data_port_that_says_nothing_does_not_stop_our_client(
    stack: contextlib.ExitStack,
) -> None:
    """Every second data connection of this server stays silent."""
    turn = iter(range(10_000))

    def admit_every_second(sock: socket.socket) -> None:
        if next(turn) % 2:
            server.admit(sock)

    server = stack.enter_context(V1Server(handle_data=admit_every_second))
    target = stack.enter_context(Target())
    env = {**FEW, "HANDSHAKE_TIMEOUT": "300ms"}
    client = stack.enter_context(OurClient(server.tunnel_address, target.address, env=env))
    for _ in range(10):
        Tunnel(server, client, target).assert_works()


@pytest.mark.programs
def test_the_pool_grows_under_load_and_shrinks_to_its_minimum_afterwards(
    tunnel: TunnelFactory,
) -> None:
    started = tunnel(server_env=BRISK, client_env=BRISK)
    client, port = started.our_client, started.our_server.data_address[1]
    until(lambda: count_connections(client.pid, port) == 16)
    with contextlib.ExitStack() as stack:
        visitors = [stack.enter_context(connect(started.visitor_address)) for _ in range(200)]
        services = [stack.enter_context(started.target.accept()) for _ in visitors]
        for visitor, service in zip(visitors, services, strict=True):
            visitor.sendall(b"x")
            service.sendall(b"y")
        assert all(receive_exactly(visitor, 1) == b"y" for visitor in visitors)
        until(lambda: count_connections(client.pid, port) > 200 + 16, what="the pool never grew")
    until(lambda: count_connections(client.pid, port) == 16, what="the pool never shrank back")

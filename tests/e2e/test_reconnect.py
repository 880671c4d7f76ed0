"""Either side may vanish and come back: the other waits, and sessions outlive the control connection."""

from __future__ import annotations

import contextlib
import socket
import time

import pytest

from tests.e2e.conftest import TunnelFactory
from tests.support.log import loud, one_of
from tests.support.proc import cpu_seconds
from tests.support.sockets import PATIENCE, connect, free_port, is_over, is_refused, receive_exactly, until
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, OurServer, Tunnel, assert_connected
from tests.support.v1_client import V1Client
from tests.support.v1_server import V1Server


def server_at(first: int, tls: int = 0) -> OurServer:
    """A server on this port and the next, which a second run can bind again."""
    return OurServer(tls, tunnel=f"127.0.0.1:{first}", target=f"127.0.0.1:{first + 1}")


@pytest.mark.programs
def test_a_killed_server_that_is_started_again_gets_its_client_back(
    stack: contextlib.ExitStack,
) -> None:
    first = free_port(2)
    server = stack.enter_context(server_at(first, 1))
    target = stack.enter_context(Target())
    client = stack.enter_context(OurClient(server.tunnel_address, target.address))
    with Tunnel(server, client, target).session() as (visitor, service):
        assert_connected(visitor, service)
        mark = client.mark()
        server.kill()
        assert is_over(service)
    client.wait_for("server.disconnected", after=mark, reason=one_of("closed", "failed"))
    client.wait_for("server.unreachable", after=mark, level="warn")
    mark = client.mark()
    again = stack.enter_context(server_at(first, 1))
    client.wait_until_connected(after=mark)
    Tunnel(again, client, target).assert_works()


def test_a_client_adopts_the_tls_mode_and_the_data_port_of_a_restarted_server(
    stack: contextlib.ExitStack,
) -> None:
    first = free_port(2)
    target = stack.enter_context(Target())
    with server_at(first) as server:
        client = stack.enter_context(OurClient(server.tunnel_address, target.address))
        client.wait_until_connected(tls=0)
    with server_at(first, 1) as server:
        client.wait_until_connected(data_port=server.data_address[1], tls=1)
        Tunnel(server, client, target).assert_works()


@pytest.mark.programs
def test_a_killed_client_is_replaced_by_the_next(tunnel: TunnelFactory) -> None:
    started = tunnel()
    with started.session() as (visitor, service):
        assert_connected(visitor, service)
        mark = started.our_server.mark()
        started.our_client.kill()
        assert is_over(visitor)
    started.our_server.wait_for("client.disconnected", after=mark, reason=one_of("closed", "failed"))
    with OurClient(started.our_server.tunnel_address, started.target.address) as second:
        started.our_server.wait_for_client(after=mark)
        Tunnel(started.server, second, started.target).assert_works()


@pytest.mark.programs
def test_a_visitor_that_came_while_the_client_was_away_is_served_by_the_next(
    tunnel: TunnelFactory,
) -> None:
    started = tunnel(server_env={**CALM, "POOL_GET_TIMEOUT": "20s"})
    mark = started.our_server.mark()
    started.our_client.kill()
    started.our_server.wait_for("client.disconnected", after=mark)
    with connect(started.visitor_address) as visitor:
        visitor.sendall(b"patience")
        successor = OurClient(started.our_server.tunnel_address, started.target.address)
        with successor, started.target.accept() as service:
            assert receive_exactly(service, 8) == b"patience"
            assert_connected(visitor, service)


@pytest.mark.programs
def test_listeners_stay_open_while_no_client_is_there(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(OurServer(env={**CALM, "POOL_GET_TIMEOUT": "20s"}))
    for _ in range(3):
        with V1Client(server.tunnel_address) as client:
            client.wait_until_full()
        with connect(server.visitor_address):
            pass
        with connect(server.data_address):
            pass


def test_a_visitor_whom_nobody_can_serve_is_closed_with_one_line(
    stack: contextlib.ExitStack,
) -> None:
    server = stack.enter_context(OurServer(env={**CALM, "POOL_GET_TIMEOUT": "300ms"}))
    began = time.monotonic()
    assert is_refused(lambda: connect(server.visitor_address))
    assert time.monotonic() - began > 0.25
    server.wait_for("visitor.unserved", level="warn", reason="no_client")
    assert is_refused(lambda: connect(server.visitor_address))
    until(lambda: len(server.find("visitor.unserved")) == 2)
    assert len(server.find(level=loud)) == 2


def test_a_running_session_outlives_the_control_connection_of_our_server(
    tunnel: TunnelFactory,
) -> None:
    started = tunnel(client="v1")
    server, client = started.our_server, started.v1_client
    with started.session() as (visitor, service):
        assert_connected(visitor, service)
        mark = server.mark()
        client.disconnect()
        server.wait_for("client.disconnected", after=mark)
        assert_connected(visitor, service)
        server.wait_for_client(after=mark)
        started.assert_works()
        assert_connected(visitor, service)


def test_a_running_session_outlives_the_control_connection_of_our_client(
    tunnel: TunnelFactory,
) -> None:
    started = tunnel(server="v1", tls=1)
    with started.session() as (visitor, service):
        assert_connected(visitor, service)
        mark = started.our_client.mark()
        started.v1_server.drop_client()
        started.our_client.wait_for("server.disconnected", after=mark)
        assert_connected(visitor, service)
        started.our_client.wait_until_connected(after=mark)
        started.assert_works()
        assert_connected(visitor, service)


def test_a_client_may_start_before_its_server(stack: contextlib.ExitStack) -> None:
    first = free_port(2)
    target = stack.enter_context(Target())
    client = stack.enter_context(OurClient(("127.0.0.1", first), target.address))
    client.wait_for("server.unreachable", level="warn", server=f"127.0.0.1:{first}", reason="unreachable")
    server = stack.enter_context(server_at(first))
    client.wait_until_connected()
    Tunnel(server, client, target).assert_works()


def test_a_name_that_does_not_resolve_yet_is_tried_again(stack: contextlib.ExitStack) -> None:
    client = stack.enter_context(
        OurClient(("nowhere.invalid", 10101), ("127.0.0.1", 9), env={"SERVICE_COOLDOWN": "200ms"})
    )
    client.wait_for("server.unreachable", level="warn", server="nowhere.invalid:10101", reason="unreachable")
    assert client.is_running
    assert client.stop() == 0


@pytest.mark.programs
def test_a_client_that_is_turned_away_pauses_between_its_attempts(
    stack: contextlib.ExitStack,
) -> None:
    """Retries begin at 0.1 s and double: two seconds have room for about five and never for fifty."""
    attempts = 0
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    stack.enter_context(OurClient(listener.getsockname(), ("127.0.0.1", 9), env={"SERVICE_COOLDOWN": "5s"}))
    listener.settimeout(PATIENCE)
    listener.accept()[0].close()
    deadline = time.monotonic() + 2
    while (left := deadline - time.monotonic()) > 0:
        listener.settimeout(left)
        with contextlib.suppress(TimeoutError):
            listener.accept()[0].close()
            attempts += 1
    assert 1 <= attempts < 12


@pytest.mark.programs
def test_a_data_port_that_refuses_does_not_make_the_client_spin(
    stack: contextlib.ExitStack,
) -> None:
    server = stack.enter_context(V1Server(greeting=b"//%d#0\n" % free_port()))
    client = stack.enter_context(OurClient(server.tunnel_address, ("127.0.0.1", 9)))
    client.wait_until_connected()
    client.wait_for("data.dial_failed", reason="unreachable")
    before, began = cpu_seconds(client.pid), time.monotonic()
    with contextlib.suppress(AssertionError):
        client.wait_for("server.disconnected", timeout=1.0)
    assert cpu_seconds(client.pid) - before < 0.6 * (time.monotonic() - began)
    assert len(client.lines) < 100


@pytest.mark.programs
def test_a_server_that_breaks_off_its_greeting_is_tried_again(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(V1Server(greeting=b"//no greeting at all\n"))
    client = stack.enter_context(OurClient(server.tunnel_address, ("127.0.0.1", 9)))
    client.wait_for("server.unreachable", level="warn", reason="protocol")
    until(lambda: server.connects >= 2 or dropped(server))
    assert client.is_running


def dropped(server: V1Server) -> bool:
    """Let the next connection in: a v1 server notices by itself only at its next heartbeat."""
    server.drop_client()
    return False


@pytest.mark.programs
def test_a_server_without_heartbeats_keeps_its_client(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(V1Server(heartbeat=None))
    target = stack.enter_context(Target())
    client = stack.enter_context(
        OurClient(server.tunnel_address, target.address, env={**CALM, "REPORT_INTERVAL": "100ms"})
    )
    client.wait_until_connected()
    with contextlib.suppress(AssertionError):
        client.wait_for("server.disconnected", timeout=1.0)
    assert not client.find("server.disconnected")
    Tunnel(server, client, target).assert_works()

"""Shutdown: running sessions may finish, the rest is cut and counted, a second signal ends at once."""

from __future__ import annotations

import signal
import time

import pytest

from tests.e2e.conftest import TunnelFactory
from tests.support.process import Nodepass
from tests.support.sockets import connect, is_over, receive_exactly, until
from tests.support.tunnel import CALM, OurServer, Tunnel, assert_connected

PATIENT = {**CALM, "SHUTDOWN_TIMEOUT": "60s"}
HASTY = {**CALM, "SHUTDOWN_TIMEOUT": "200ms"}


def side(tunnel: Tunnel, name: str) -> Nodepass:
    return tunnel.our_server if name == "server" else tunnel.our_client


def test_a_signal_ends_an_idle_process_with_success_and_its_peer_notices(tunnel: TunnelFactory) -> None:
    started = tunnel(server_env=PATIENT, client_env=PATIENT)
    assert_stops(started.our_client, signal.SIGTERM)
    started.our_server.wait_for("client.disconnected", reason="shutdown")
    assert_stops(started.our_server, signal.SIGINT)


def assert_stops(run: Nodepass, number: signal.Signals) -> None:
    assert run.stop(number) == 0
    assert run.find("process.stopping", sessions=0)
    assert run.entries[-1].event == "process.stopped"


@pytest.mark.parametrize(("name", "tls"), [("server", 0), pytest.param("client", 1, marks=pytest.mark.programs)])
def test_a_running_session_may_finish(tunnel: TunnelFactory, name: str, tls: int) -> None:
    started = tunnel(tls, server_env=PATIENT, client_env=PATIENT)
    run = side(started, name)
    with started.session() as (visitor, service):
        assert_connected(visitor, service)
        run.send(signal.SIGTERM)
        run.wait_for("process.stopping", sessions=1)
        for _ in range(3):
            assert_connected(visitor, service)
        assert run.is_running
        visitor.sendall(b"the end")
        visitor.close()
        assert receive_exactly(service, 7) == b"the end"
        assert service.recv(1) == b""
    assert run.wait() == 0
    assert not run.find("process.cut")


def test_what_still_runs_after_the_grace_is_cut_and_counted(tunnel: TunnelFactory) -> None:
    started = tunnel(server_env=HASTY, client_env=HASTY)
    run = started.our_server
    with started.session() as first, started.session() as second:
        for pair in (first, second):
            assert_connected(*pair)
        run.send(signal.SIGTERM)
        run.wait_for("process.stopping", sessions=2)
        run.wait_for("process.cut", sessions=2)
        assert all(is_over(end) for pair in (first, second) for end in pair)
    assert run.wait() == 0
    started.our_client.wait_for("server.disconnected", reason="shutdown")


@pytest.mark.programs
def test_a_second_signal_ends_it_at_once(tunnel: TunnelFactory) -> None:
    started = tunnel(server_env=PATIENT, client_env=PATIENT)
    run = started.our_client
    with started.session() as (visitor, service):
        assert_connected(visitor, service)
        run.send(signal.SIGTERM)
        run.wait_for("process.stopping", sessions=1)
        began = time.monotonic()
        run.stop(signal.SIGINT)
        assert time.monotonic() - began < 20
        assert is_over(visitor)


@pytest.mark.programs
def test_a_stopping_server_takes_no_new_visitors(tunnel: TunnelFactory) -> None:
    started = tunnel(server_env=PATIENT, client_env=PATIENT)
    server = started.our_server
    with started.session() as (visitor, service):
        assert_connected(visitor, service)
        server.send(signal.SIGTERM)
        server.wait_for("process.stopping")
        until(lambda: refuses(server), what="still takes visitors")
        started.target.drain()  # of those that came before the port was closed
        assert_connected(visitor, service)
    assert server.wait() == 0


def refuses(server: OurServer) -> bool:
    try:
        with connect(server.visitor_address) as visitor:
            visitor.settimeout(0.2)
            return is_over(visitor)
    except (ConnectionRefusedError, ConnectionResetError):
        return True
    except TimeoutError:
        return False


def test_a_client_is_stopped_while_it_waits_for_its_server() -> None:
    with Nodepass("client://127.0.0.1:9/127.0.0.1:9", env={"SERVICE_COOLDOWN": "1h"}) as client:
        client.wait_for("server.unreachable")
        assert client.stop() == 0


@pytest.mark.programs
def test_a_server_is_stopped_while_a_visitor_waits() -> None:
    env = {**PATIENT, "POOL_GET_TIMEOUT": "50s", "SHUTDOWN_TIMEOUT": "300ms"}
    with OurServer(env=env) as server, connect(server.visitor_address) as visitor:
        assert server.stop() == 0
        assert is_over(visitor)

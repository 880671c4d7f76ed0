"""What the program tells systemd, which the test plays: readiness, status, watchdog, reload and stop."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.log import parse
from tests.support.process import Environment, Nodepass, run
from tests.support.sockets import free_port
from tests.support.systemd import NotifySocket
from tests.support.target import Target
from tests.support.tunnel import BRISK, CALM, STEADY, OurClient, OurServer, Tunnel
from tests.support.wire2.server import V2Server


@pytest.fixture
def notified() -> Iterator[NotifySocket]:
    with NotifySocket() as opened:
        yield opened


def told(notified: NotifySocket, **more: str) -> Environment:
    """The environment in which a program finds whom to notify."""
    return {**BRISK, "NOTIFY_SOCKET": notified.address, **more}


def test_a_server_is_ready_once_it_listens_and_says_when_it_reloads_and_stops(
    stack: contextlib.ExitStack, notified: NotifySocket
) -> None:
    """It asks for as long as the stop may take."""
    server = stack.enter_context(OurServer(1, env=told(notified, SHUTDOWN_TIMEOUT="100s", SHUTDOWN_DELAY="10ms")))
    notified.wait_for("READY=1")
    assert server.is_running
    server.send(signal.SIGHUP)
    notified.wait_for("RELOADING=1")
    since = int(notified.wait_for("MONOTONIC_USEC=").partition("=")[2])
    assert 0 < time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000 - since < 20e6
    notified.wait_for("READY=1")
    assert server.stop() == 0
    notified.wait_for("STOPPING=1")
    assert notified.wait_for("EXTEND_TIMEOUT_USEC=") == "EXTEND_TIMEOUT_USEC=110010000"
    notified.wait_for("STATUS=stopping: ")


@pytest.mark.programs
def test_the_socket_of_notifications_may_be_a_file(stack: contextlib.ExitStack, tmp_path: Path) -> None:
    notified = stack.enter_context(NotifySocket(tmp_path))
    stack.enter_context(OurServer(env=told(notified)))
    notified.wait_for("READY=1")


def test_a_client_is_ready_once_its_first_handshake_has_succeeded(
    stack: contextlib.ExitStack, notified: NotifySocket
) -> None:
    port = free_port()
    stack.enter_context(OurClient(("127.0.0.1", port), ("127.0.0.1", 9), env=told(notified)))
    assert "refused" in notified.wait_for("STATUS=not connected: cannot reach")
    assert "READY=1" not in notified.heard
    stack.enter_context(OurServer(tunnel=f"127.0.0.1:{port}"))
    notified.wait_for("READY=1")


@pytest.mark.programs
def test_a_process_is_ready_once_all_its_tunnels_are(stack: contextlib.ExitStack, notified: NotifySocket) -> None:
    port = free_port()
    urls = "server://127.0.0.1:0/127.0.0.1:0?tls=0", f"client://127.0.0.1:{port}/127.0.0.1:9"
    both = stack.enter_context(Nodepass(*urls, env=told(notified)))
    both.wait_for("server.listening")
    text = notified.wait_for("STATUS=")
    assert re.search(r"STATUS=server:\d+: client none, .*; client:\d+: not connected: ", text)
    assert "READY=1" not in notified.heard
    stack.enter_context(OurServer(tunnel=f"127.0.0.1:{port}"))
    notified.wait_for("READY=1")


@pytest.mark.programs
def test_the_status_names_peer_round_trip_pool_and_sessions(
    stack: contextlib.ExitStack, notified: NotifySocket
) -> None:
    server = stack.enter_context(OurServer(env=told(notified, **STEADY)))
    assert notified.wait_for("STATUS=") == "STATUS=client none, pool 0 idle of 16, 0 sessions, 0 flows, security: none"
    target = stack.enter_context(Target())
    client = stack.enter_context(OurClient(server.tunnel_address, target.address))
    full = r"client 127\.0\.0\.1:\d+ \(wire v2, round trip [\d.]+ ms\), pool 16 idle of 16, "
    wait_for_status(notified, f"{full}0 sessions, 0 flows")
    with Tunnel(server, client, target).session():
        wait_for_status(notified, f"{full}1 sessions, 0 flows")
    client.kill()
    wait_for_status(notified, "client none, ")


def wait_for_status(notified: NotifySocket, pattern: str) -> None:
    while not re.fullmatch(f"STATUS={pattern}.*", notified.wait_for("STATUS=")):
        pass


@pytest.mark.programs
def test_a_status_of_very_many_tunnels_is_cut_to_what_systemd_takes(
    stack: contextlib.ExitStack, notified: NotifySocket
) -> None:
    urls = ["server://127.0.0.1:0/127.0.0.1:0?tls=0"] * 40
    stack.enter_context(Nodepass(*urls, env=told(notified)))
    notified.wait_for("READY=1")
    text = notified.wait_for("STATUS=")
    assert text.endswith("…")
    assert len(text.encode()) < 2000


def test_the_watchdog_hears_of_a_healthy_process_again_and_again(
    stack: contextlib.ExitStack, notified: NotifySocket
) -> None:
    env = {"NOTIFY_SOCKET": notified.address, "WATCHDOG_USEC": "300000"}  # rarer than the statistics
    server = stack.enter_context(OurServer(env=env))
    notified.wait_for("READY=1")
    began = time.monotonic()
    for _ in range(4):
        notified.wait_for("WATCHDOG=1")
    assert time.monotonic() - began > 0.3
    server.send(signal.SIGSTOP)
    notified.forget()
    with pytest.raises(AssertionError, match="no 'WATCHDOG=1' within"):
        notified.wait_for("WATCHDOG=1", 1)
    server.send(signal.SIGCONT)
    notified.wait_for("WATCHDOG=1")


@pytest.mark.programs
def test_a_client_in_search_of_its_server_is_healthy(stack: contextlib.ExitStack, notified: NotifySocket) -> None:
    with V2Server() as server:
        client = stack.enter_context(OurClient(server.tunnel_address, ("127.0.0.1", 9), env=told(notified)))
        notified.wait_for("READY=1")
    wait_for_status(notified, "not connected: ")
    notified.forget()
    for _ in range(5):
        notified.wait_for("WATCHDOG=1")
    assert not client.find("tunnel.unhealthy")


@pytest.mark.programs
def test_a_server_that_falls_silent_is_given_up_and_the_client_stays_healthy(
    stack: contextlib.ExitStack, notified: NotifySocket
) -> None:
    server = stack.enter_context(V2Server(heartbeat=None, announced=0.2))
    client = stack.enter_context(OurClient(server.tunnel_address, ("127.0.0.1", 9), env=told(notified)))
    client.wait_for("server.disconnected", reason="silent")
    notified.forget()
    notified.wait_for("WATCHDOG=1")
    assert not client.find("tunnel.unhealthy")


@pytest.mark.programs
def test_another_process_s_watchdog_is_not_ours(stack: contextlib.ExitStack, notified: NotifySocket) -> None:
    env = {"NOTIFY_SOCKET": notified.address, "WATCHDOG_USEC": "1", "WATCHDOG_PID": str(os.getpid())}
    stack.enter_context(OurServer(env=env))
    notified.wait_for("READY=1")  # with a watchdog of a microsecond it would be all that it does


@pytest.mark.programs
def test_a_reload_does_not_make_a_starting_client_ready(stack: contextlib.ExitStack, notified: NotifySocket) -> None:
    client = stack.enter_context(OurClient(("127.0.0.1", free_port()), ("127.0.0.1", 9), env=told(notified)))
    client.wait_for("server.unreachable", reason="unreachable")
    client.send(signal.SIGHUP)
    client.wait_for("process.reloading")
    notified.forget()
    notified.wait_for("WATCHDOG=1")
    assert client.stop() == 0
    notified.wait_for("STOPPING=1")
    assert "READY=1" not in notified.heard


@pytest.mark.programs
def test_a_client_that_reaches_no_server_in_time_ends_and_says_what_fails(notified: NotifySocket) -> None:
    port = free_port()
    done = run(f"client://127.0.0.1:{port}/127.0.0.1:9", env=told(notified, START_TIMEOUT="2s"))
    assert done.code == 1
    for part in ("START_TIMEOUT (2s)", f"client:{port}: ", f"127.0.0.1:{port}", os.strerror(errno.ECONNREFUSED)):
        assert part in done.lines[-1]
    assert notified.wait_for("EXTEND_TIMEOUT_USEC=") == "EXTEND_TIMEOUT_USEC=12000000"
    notified.wait_for("STOPPING=1")
    assert "READY=1" not in notified.heard


@pytest.mark.programs
def test_the_deadline_counts_without_systemd_and_for_a_refusal_too(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(OurServer(env={**CALM, "TUNNEL_KEY": "a key that the client has not got"}))
    host, port = server.tunnel_address
    done = run(f"client://{host}:{port}/127.0.0.1:9", env={**CALM, "START_TIMEOUT": "2s"})
    assert done.code == 1
    rejected = [entry for entry in map(parse, done.lines) if entry.event == "server.rejected"]
    assert rejected[0]["reason"] == "key_required"
    assert rejected[0]["error"] in done.lines[-1]


@pytest.mark.programs
def test_nobody_who_listens_does_not_keep_the_program_from_its_work(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(OurServer(env={**CALM, "NOTIFY_SOCKET": "/nonexistent/notify"}))
    server.wait_for("systemd.notify_failed", level="warn", error=os.strerror(errno.ENOENT))
    client = stack.enter_context(OurClient(server.tunnel_address, ("127.0.0.1", 9)))
    client.wait_until_connected()
    assert server.stop() == 0

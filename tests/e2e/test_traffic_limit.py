"""TRAFFIC_LIMIT on either end: what is counted, over restarts and kills, and what visitors get when it is used up."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command import call, refusals
from tests.support.process import run
from tests.support.sockets import connect, datagram_socket, is_over, is_refused, receive_exactly, until
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, OurServer, Tunnel, assert_connected

LIMIT = "name=web&traffic_limit=100kB/month"
SERVER = "server://127.0.0.1:0/127.0.0.1:0?tls=0"


def move(source: socket.socket, sink: socket.socket, size: int) -> None:
    """Bytes through a session, until they have arrived."""
    source.sendall(bytes(size))
    receive_exactly(sink, size)


def counted(file: Path) -> int:
    """The bytes in a state file."""
    return sum(json.loads(file.read_text())["bytes"].values()) if file.exists() else 0


@pytest.fixture
def target() -> Iterator[Target]:
    with Target() as target:
        yield target


def refuses_tcp(tunnel: Tunnel) -> bool:
    """Whether a new visitor is reset."""
    with contextlib.suppress(ConnectionError), connect(tunnel.visitor_address) as visitor:
        visitor.sendall(b"?")
        return is_over(visitor)
    return True


def test_a_server_counts_over_restarts_and_refuses_new_visitors(target: Target, tmp_path: Path) -> None:
    file, env = tmp_path / "traffic-server-web.json", {**CALM, "STATE_DIRECTORY": str(tmp_path)}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(OurServer(query=LIMIT, env=env))
        client = stack.enter_context(OurClient(server.tunnel_address, target.address, query="tls=0&name=web"))
        client.wait_until_connected()
        tunnel = Tunnel(server, client, target)
        visitor, service = stack.enter_context(tunnel.session())
        move(visitor, service, 50_000)
        move(service, visitor, 29_000)
        move(service, visitor, 6_000)  # in one piece: between two pieces the count may be looked at
        assert server.wait_for("traffic.nearly_used")["percent"] == 85
        second = run(f"{SERVER}&{LIMIT}", env={"STATE_DIRECTORY": str(tmp_path)})
        assert second.code == 1
        assert second.lines[-1].startswith("nodepass: TRAFFIC_LIMIT: the traffic of server-web is counted already in ")

        flow = stack.enter_context(datagram_socket())
        flow.sendto(bytes(5_000), tunnel.visitor_address)
        assert len(target.udp.recv(1 << 16)) == 5_000
        move(visitor, service, 10_000)
        server.wait_for("traffic.used_up")
        assert refuses_tcp(tunnel)
        server.wait_for("visitor.refused", reason="traffic_limit")
        mark = server.mark()
        with datagram_socket() as other:
            other.sendto(b"question", tunnel.visitor_address)
            server.wait_for("visitor.refused", after=mark, reason="traffic_limit")
        flow.sendto(b"goes on", tunnel.visitor_address)
        assert target.udp.recv(1 << 16) == b"goes on"
        assert_connected(visitor, service)

        until(lambda: counted(file) == 100_015, what="the count in the file")
        server.kill()
    with OurServer(query=LIMIT, env=env) as server:
        assert is_refused(lambda: connect(server.visitor_address))
        assert server.wait_for("traffic.used_up")["used"] == 100_015
        server.wait_for("visitor.refused", reason="traffic_limit")
        assert server.stop() == 0
    assert counted(file) == 100_015


@pytest.mark.programs  # takes more than 3 s
def test_a_server_that_is_killed_loses_a_second_of_its_count(target: Target, tmp_path: Path) -> None:
    file, env = tmp_path / "traffic-server-web.json", {**CALM, "STATE_DIRECTORY": str(tmp_path)}
    moved: list[tuple[float, int]] = []  # when, and how much by then
    late = 0.5  # of a machine that is busy, beyond the second

    def settled() -> int:
        """How much had moved a second ago."""
        now = time.monotonic()
        return max((size for when, size in moved if when < now - 1.0 - late), default=0)

    with contextlib.ExitStack() as stack:
        server = stack.enter_context(OurServer(query="name=web&traffic_limit=1TB/day", env=env))
        client = stack.enter_context(OurClient(server.tunnel_address, target.address, query="tls=0&name=web"))
        client.wait_until_connected()
        visitor, service = stack.enter_context(Tunnel(server, client, target).session())
        began = time.monotonic()
        while time.monotonic() - began < 3.7:
            move(visitor, service, 100)
            moved.append((time.monotonic(), 100 * (len(moved) + 1)))
            expected = settled()
            assert counted(file) >= expected, "if it were killed now"
            time.sleep(0.005)  # to spare CPU time; nothing is waited for
        expected = settled()
        server.kill()
    assert counted(file) >= expected > 0


def test_a_client_counts_until_it_stops_and_refuses_launches_and_new_flows(target: Target, tmp_path: Path) -> None:
    file, env = tmp_path / "traffic-client-web.json", {**CALM, "STATE_DIRECTORY": str(tmp_path)}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(OurServer(query="name=web"))
        client = OurClient(server.tunnel_address, target.address, query=f"tls=0&{LIMIT}", env=env)
        stack.enter_context(client).wait_until_connected()
        tunnel = Tunnel(server, client, target)
        flow = stack.enter_context(datagram_socket())
        flow.sendto(b"first", tunnel.visitor_address)
        assert target.udp.recv(1 << 16) == b"first"
        visitor, service = stack.enter_context(tunnel.session())
        move(visitor, service, 100_000)
        client.wait_for("traffic.used_up")
        assert refuses_tcp(tunnel)
        client.wait_for("launch.dropped", reason="traffic_limit")
        with datagram_socket() as other:
            other.sendto(b"question", tunnel.visitor_address)
            client.wait_for("datagram.dropped", reason="traffic_limit")
        flow.sendto(b"goes on", tunnel.visitor_address)
        assert target.udp.recv(1 << 16) == b"goes on"
        assert_connected(visitor, service)
        visitor.close()
        service.close()
        assert client.stop() == 0
        assert counted(file) == 100_000 + len(b"first") + len(b"goes on") + 8


@pytest.mark.parametrize(
    ("directory", "parts"),
    [
        ("", ["TRAFFIC_LIMIT=1GB/day", "STATE_DIRECTORY", "not set", "allowed"]),
        ("/proc/self/missing", ["TRAFFIC_LIMIT", "/proc/self/missing/traffic-server-web.lock", "allowed"]),
    ],
    ids=["none", "not there"],
)
def test_a_limit_without_a_usable_directory_is_bad_input(directory: str, parts: list[str]) -> None:
    done = call(f"{SERVER}&name=web&traffic_limit=1GB/day&log=error", env={"STATE_DIRECTORY": directory})
    assert not refusals(done, *parts)

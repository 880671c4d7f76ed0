"""The metrics endpoint itself: where it listens, who may reach it, and what strangers who do cannot do."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodepass.config.kinds import Listen
from nodepass.log import Log
from nodepass.metrics.endpoint import MetricsEndpoint
from nodepass.metrics.http import read_request
from nodepass.stats import Stats
from tests.support.process import Finished, Nodepass, run
from tests.support.scrape import WATCHED, get, metrics_of, parse, reach, value, wait_for_value
from tests.support.sockets import connect, format_address, has_ipv6, is_over, receive_all, until
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, OurServer, Tunnel

URL = "server://127.0.0.1:0/127.0.0.1:0?tls=0"
AT_ONCE = 32
"""Connections that the endpoint has at a time."""


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A path that is short enough for a socket."""
    return tmp_path_factory.mktemp("m") / "metrics.sock"


@pytest.fixture(scope="module")
def server() -> Iterator[OurServer]:
    with OurServer(env=WATCHED) as running:
        yield running


def refused(listen: str, status: int, **env: str) -> str:
    """The one line with which a start on this address ends."""
    done: Finished = run(URL, env={**CALM, **env, "METRICS_LISTEN": listen})
    assert done.code == status
    assert len(done.lines) == 1, done.errors
    return done.lines[0]


@contextlib.contextmanager
def watched_at(listen: str) -> Iterator[Nodepass]:
    with Nodepass(URL, env={**CALM, "METRICS_LISTEN": listen}) as running:
        running.wait_for("server.listening")
        yield running


def test_by_default_there_is_no_endpoint() -> None:
    with OurServer() as server:
        assert not server.find("metrics.listening")
        own = {server.tunnel_address[1], server.data_address[1], server.visitor_address[1]}
        assert len(own) == 3


def test_a_port_alone_is_for_this_machine_only() -> None:
    with watched_at(":0") as running:
        address = running.wait_for("metrics.listening")["address"]
        places = re.findall(r"http://(\S+):\d+/metrics", address)
        assert places
        assert all(place == "[::1]" or place.startswith("127.") for place in places)


@pytest.mark.programs
@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on this machine")
def test_an_ipv6_address_stands_in_brackets() -> None:
    with watched_at("[::1]:0") as running:
        place = metrics_of(running)
        assert place[0] == "::1"
        assert get(place, "/healthz").body == "ok\n"


@pytest.mark.programs
def test_an_address_in_use_ends_the_start_with_one_line(server: OurServer) -> None:
    taken = format_address(metrics_of(server))
    line = refused(taken, 1)
    assert "METRICS_LISTEN" in line
    assert taken in line
    assert "in use" in line


@pytest.mark.programs
def test_without_prometheus_client_the_line_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "prometheus_client.py").write_text(
        "raise ModuleNotFoundError('No module named prometheus_client', name='prometheus_client')"
    )
    line = refused(":0", 2, PYTHONPATH=str(tmp_path))
    assert "METRICS_LISTEN" in line
    assert " -m pip install prometheus-client" in line


def test_a_unix_socket_is_for_user_and_group_and_removed_at_the_end(path: Path) -> None:
    with watched_at(f"unix:{path}") as running:
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert value(path, "nodepass_ready") == 0
        assert running.stop() == 0
    assert not path.exists()


@pytest.mark.programs
def test_the_socket_of_a_killed_process_is_replaced(path: Path) -> None:
    with watched_at(f"unix:{path}") as running:
        running.kill()
    assert path.exists()
    with watched_at(f"unix:{path}"):
        assert get(path, "/healthz").status == 200


@pytest.mark.programs
def test_the_socket_of_a_living_process_is_respected(path: Path) -> None:
    with watched_at(f"unix:{path}"):
        assert "another process listens there" in refused(f"unix:{path}", 1)
        assert get(path, "/healthz").status == 200


@pytest.mark.programs
def test_a_file_that_is_no_socket_is_left_alone(path: Path) -> None:
    path.write_text("precious")
    assert "not a socket" in refused(f"unix:{path}", 1)
    assert path.read_text() == "precious"


@pytest.mark.programs
def test_another_process_that_took_the_path_keeps_it(path: Path) -> None:
    with watched_at(f"unix:{path}") as running:
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
            assert running.stop() == 0
            assert path.exists()


@pytest.mark.programs
def test_a_directory_that_is_not_there_ends_the_start_with_one_line(path: Path) -> None:
    assert "No such file" in refused(f"unix:{path}/not/there", 1)


@pytest.mark.programs
def test_a_start_that_fails_for_another_reason_leaves_no_socket(path: Path, server: OurServer) -> None:
    env = {**CALM, "METRICS_LISTEN": f"unix:{path}"}
    assert run(f"server://{format_address(server.tunnel_address)}/127.0.0.1:0?tls=0", env=env).code == 1
    assert not path.exists()


class Hidden(OurServer):
    """A server that sees of /proc what the unit lets it see: processes only."""

    prefix = ("unshare", "--mount", "sh", "-c", 'mount -t proc -o subset=pid proc /proc && exec "$0" "$@"')


@pytest.mark.programs("mount namespaces")
def test_the_process_is_measured_also_where_proc_shows_processes_only() -> None:
    with Hidden(env=WATCHED) as server:
        seen = {sample.name: sample.value for sample in parse(get(metrics_of(server)).body)}
    own = {name.removeprefix("process_"): seen[name] for name in seen if name.startswith("process_")}
    assert set(own) == {
        *("cpu_seconds_total", "resident_memory_bytes", "virtual_memory_bytes"),
        *("start_time_seconds", "open_fds", "max_fds"),
    }
    assert 0 < own["cpu_seconds_total"] < 1000
    assert 5e6 < own["resident_memory_bytes"] < own["virtual_memory_bytes"]
    assert abs(time.time() - own["start_time_seconds"]) < 600
    assert 5 < own["open_fds"] < own["max_fds"]


def test_only_what_is_there_is_served(server: OurServer) -> None:
    place = metrics_of(server)
    assert get(place, "/healthz").body == "ok\n"
    assert get(place, "/metrics?a=b").status == 200
    assert get(place, "/").status == 404
    assert "/metrics" in get(place, "/../../etc/passwd").body
    assert get(place, method="POST").status == 405
    head = get(place, method="HEAD")
    assert (head.status, head.body) == (200, "")
    assert "Content-Type: text/plain; version=0.0.4; charset=utf-8" in head.head


NAMES = [
    ("127.0.0.1:9464", 200),
    ("[::1]:9464", 200),
    ("[fe80::1%25eth0]", 200),
    ("LocalHost.:9464", 200),
    ("", 200),
    ("attacker.example:9464", 421),
    ("127.0.0.1.attacker.example", 421),
    ("localhost.attacker.example", 421),
    ("[attacker.example]:9464", 421),
    ("[::1]attacker.example", 421),
    ("[::1", 421),
]


@pytest.mark.parametrize(("host", "status"), NAMES)
def test_metrics_are_not_shown_to_a_page_whose_name_points_here(server: OurServer, host: str, status: int) -> None:
    """A browser takes the endpoint for that page's own server: DNS rebinding."""
    for path, expected in (("/metrics", status), ("/healthz", 200), ("/readyz", 503)):
        with connect(metrics_of(server)) as sock:
            sock.sendall(f"GET {path} HTTP/1.1\r\nhost: {host}\r\n\r\n".encode())
            answer = receive_all(sock)
        assert answer.startswith(f"HTTP/1.1 {expected} ".encode()), path


def test_a_page_of_another_name_is_told_what_is_allowed(server: OurServer) -> None:
    with connect(metrics_of(server)) as sock:
        sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: attacker.example\r\n\r\n")
        assert b"allowed: an address, localhost, or the name in METRICS_LISTEN" in receive_all(sock)


def test_the_name_in_metrics_listen_is_its_own() -> None:
    text = b"GET /metrics HTTP/1.1\r\nHost: Nodepass.Test.:1\r\n\r\n"
    endpoint = MetricsEndpoint(Listen("nodepass.test", 0), list, Log("test"), Stats())
    mine, peers = socket.socketpair()
    with mine, peers:
        peers.sendall(text)
        assert endpoint._answer(read_request(mine)).status == 200


TWO_HOSTS = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nHost: attacker.example\r\n\r\n"


@pytest.mark.parametrize(
    "request_", [TWO_HOSTS, b"\r\n\r\n", b"GET\r\n\r\n", b"GET /metrics\r\n\r\n", b"\x16\x03\x01\r\n\r\n"]
)
def test_what_is_no_request_is_answered_with_400(server: OurServer, request_: bytes) -> None:
    with connect(metrics_of(server)) as sock:
        sock.sendall(request_)
        assert receive_all(sock).startswith(b"HTTP/1.1 400 ")


def test_an_endless_request_is_answered_with_431(server: OurServer) -> None:
    with connect(metrics_of(server)) as sock:
        sock.sendall(b"GET /metrics HTTP/1.1\r\n" + b"x: y\r\n" * 2000)
        assert receive_all(sock).startswith(b"HTTP/1.1 431 ")


def test_silent_connections_keep_nobody_out(server: OurServer) -> None:
    place = metrics_of(server)
    before = server.settled_descriptors()
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(reach(place)) for _ in range(3 * AT_ONCE)]
        assert get(place, "/healthz").status == 200
        assert is_over(silent[0])  # the oldest had to go
        assert server.count_descriptors() <= before + AT_ONCE + 1
    server.wait_for_descriptors(before)


@pytest.mark.programs
def test_who_holds_a_connection_open_is_given_up(server: OurServer) -> None:
    before = server.settled_descriptors()
    with reach(metrics_of(server)) as slow, reach(metrics_of(server)) as lingering:
        slow.sendall(b"GET /metrics")
        lingering.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        until(lambda: server.count_descriptors() == before + 2, what="they have been accepted")
        server.wait_for_descriptors(before)  # though this end of both is open


@pytest.mark.programs
def test_a_flood_of_scrapes_does_not_keep_a_tunnel_from_working() -> None:
    with contextlib.ExitStack() as stack:
        target, server = stack.enter_context(Target()), stack.enter_context(OurServer(env=WATCHED))
        client = stack.enter_context(OurClient(server.tunnel_address, target.address))
        client.wait_until_connected()
        tunnel, place = Tunnel(server, client, target), metrics_of(server)
        for _ in range(200):
            sock = stack.enter_context(reach(place))
            with contextlib.suppress(ConnectionError):  # this one was too slow, and dropped for a later one
                sock.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        tunnel.assert_works()
        wait_for_value(place, 1, "nodepass_sessions_total", protocol="tcp", outcome="completed")


@pytest.mark.programs
def test_a_second_signal_removes_the_socket_too(path: Path) -> None:
    env = {**CALM, "METRICS_LISTEN": f"unix:{path}", "SHUTDOWN_TIMEOUT": "60s"}
    with contextlib.ExitStack() as stack:
        target, server = stack.enter_context(Target()), stack.enter_context(OurServer(env=env))
        client = stack.enter_context(OurClient(server.tunnel_address, target.address))
        client.wait_until_connected()
        visitor, _ = stack.enter_context(Tunnel(server, client, target).session())
        server.send(signal.SIGTERM)
        server.wait_for("process.stopping", sessions=1)
        server.send(signal.SIGTERM)
        assert is_over(visitor)
        assert server.wait() == 0
    assert not path.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may listen everywhere")
def test_a_path_that_may_not_be_written_ends_the_start_with_one_line() -> None:
    assert "ermission denied" in refused("unix:/metrics.sock", 1)

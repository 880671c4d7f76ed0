"""The access log of whole tunnels: its sums are those of the metrics, and it follows its file's rotation."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.process import REPOSITORY, scrubbed
from tests.support.programs import installed, running_nginx
from tests.support.scrape import WATCHED, metrics_of, scrape
from tests.support.sockets import (
    PATIENCE,
    Address,
    connect,
    datagram_socket,
    format_address,
    free_port,
    is_refused,
    parse_address,
    receive_all,
    receive_exactly,
    reset,
    until,
)
from tests.support.target import Target
from tests.support.tunnel import OurClient, OurServer, Tunnel, assert_connected
from tests.support.v1_client import V1Client
from tests.support.wire2.ours import OurClients, OurServers

BULK = bytes(1 << 20)
COUNTED = ("up", "down")


@dataclass
class Log:
    """The access log of one process, whose lines are of several tunnels, and where its metrics are."""

    path: Path
    metrics: Address
    tunnels: dict[str, str]  # names in the log, by label

    def lines(self, label: str) -> list[dict[str, Any]]:
        """Those of a tunnel so far, also from before a rotation."""
        texts = [path.read_text() for path in sorted(self.path.parent.glob(f"{self.path.name}*"), reverse=True)]
        lines = [json.loads(line) for text in texts for line in text.splitlines()]
        return [line for line in lines if line["tunnel"] == self.tunnels[label]]

    def wait_for(self, count: int, label: str) -> list[dict[str, Any]]:
        """All lines of a tunnel, once there are so many."""
        until(lambda: len(self.lines(label)) >= count)
        lines = self.lines(label)
        assert len(lines) == count
        return lines

    def sums(self, label: str) -> dict[tuple[str, str], float]:
        """Sessions by protocol and outcome, and bytes by protocol and direction."""
        sums: Counter[tuple[str, str]] = Counter()
        for line in self.lines(label):
            sums[line["protocol"], line["outcome"]] += 1
            for way in COUNTED:
                sums[line["protocol"], way] += line[way]
        return {key: value for key, value in sums.items() if value}

    def counted(self, label: str) -> dict[tuple[str, str], float]:
        """The same as the metrics have it."""
        found = {}
        for each in scrape(self.metrics):
            if each.labels.get("tunnel") == self.tunnels[label] and each.value:
                if each.name == "nodepass_sessions_total":
                    found[each.labels["protocol"], each.labels["outcome"]] = each.value
                if each.name == "nodepass_bytes_total":
                    found[each.labels["protocol"], each.labels["direction"]] = each.value
        return found

    def assert_equal_sums(self, label: str) -> None:
        until(lambda: self.sums(label) == self.counted(label), what=f"{self.sums(label)} == {self.counted(label)}")


@dataclass
class Logged:
    """Running tunnels by label, and the logs of both processes of ours."""

    tunnels: dict[str, Tunnel]
    servers: OurServers
    clients: OurClients
    of_servers: Log
    of_clients: Log


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logged]:
    """Four tunnels in two processes: ours, one to a v1 client, one whose target is closed, and one without a client."""
    with contextlib.ExitStack() as stack:
        folder = tmp_path_factory.mktemp("access")
        paths = [folder / name for name in ("servers.log", "clients.log")]
        queries = {"ours": "tls=1&udp_session_timeout=300ms", "v1": "tls=0", "closed": "tls=0", "alone": "tls=0"}
        queries["alone"] += "&pool_get_timeout=10ms"
        servers = stack.enter_context(OurServers(queries, env={**WATCHED, "ACCESS_LOG": str(paths[0])}))
        targets = {label: stack.enter_context(Target()) for label in ("ours", "v1")}
        where = {label: (servers[label].tunnel_address, "") for label in ("ours", "closed")}
        addresses = {"ours": targets["ours"].address, "closed": ("127.0.0.1", free_port())}
        # The client's flows end with the lane: by its own clock a flow would end in another way than at the server.
        env = {**WATCHED, "ACCESS_LOG": str(paths[1])}
        clients = stack.enter_context(OurClients(where, addresses, env=env))
        old = stack.enter_context(V1Client(servers["v1"].tunnel_address, targets["v1"].address))
        for label in where:
            clients.wait_in(label, "server.connected")
            servers.wait_in(label, "client.connected")
        old.wait_until_full()
        tunnels = {label: Tunnel(servers[label], clients, target) for label, target in targets.items()}
        logs = [Log(path, metrics_of(run), run.log_names) for path, run in zip(paths, (servers, clients), strict=True)]
        yield Logged(tunnels, servers, clients, *logs)


def test_the_sums_of_a_mixed_run_are_those_of_the_metrics_on_both_ends(logged: Logged) -> None:
    ours = logged.tunnels["ours"]
    for bulk in (b"", BULK):
        with ours.session() as (visitor, service):
            assert_connected(visitor, service)
            service.sendall(bulk)
            receive_exactly(visitor, len(bulk))
    with ours.session() as (visitor, service):
        assert_connected(visitor, service)
        reset(visitor)
    with datagram_socket() as visitor, datagram_socket() as silent:
        silent.sendto(b"hello?", ours.visitor_address)
        assert ours.target.udp.recvfrom(100)[0] == b"hello?"
        for size in (10, 0, 30_000):
            visitor.sendto(bytes(size), ours.visitor_address)
            _, source = ours.target.udp.recvfrom(65536)
            ours.target.udp.sendto(bytes(size // 2), source)
            assert len(visitor.recv(65536)) == size // 2
    for log in (logged.of_servers, logged.of_clients):
        log.wait_for(5, "ours")
        log.assert_equal_sums("ours")
    outcomes = {key for key in logged.of_servers.sums("ours") if key[1] not in COUNTED}
    assert outcomes == {("tcp", "completed"), ("tcp", "reset"), ("udp", "completed"), ("udp", "unanswered")}


def test_sessions_that_reached_nothing_have_a_line_and_so_have_those_of_a_v1_peer(logged: Logged) -> None:
    v1 = logged.tunnels["v1"]
    v1.assert_works()
    assert v1.exchange(b"question", b"answer") == (b"question", b"answer")
    for label in ("closed", "alone"):
        assert is_refused(partial(connect, logged.servers[label].visitor_address))
    for log, label, count in (
        (logged.of_servers, "v1", 2),
        (logged.of_servers, "closed", 1),
        (logged.of_servers, "alone", 1),
        (logged.of_clients, "closed", 1),
    ):
        log.wait_for(count, label)
        log.assert_equal_sums(label)
    [unserved] = logged.of_servers.lines("alone")
    assert (unserved["outcome"], unserved["session"], unserved["client"]) == ("unserved", None, None)
    assert parse_address(unserved["local"]) == logged.servers["alone"].visitor_address
    [unreachable] = logged.of_clients.lines("closed")
    assert (unreachable["outcome"], unreachable["dial"]) == ("unreachable", "unreachable")


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_both_ends_tell_of_the_same_session_what_each_knows(logged: Logged, protocol: str) -> None:
    tunnel = logged.tunnels["ours"]
    known = [len(log.lines("ours")) for log in (logged.of_servers, logged.of_clients)]
    if protocol == "tcp":
        with tunnel.session() as (visitor, service):
            assert_connected(visitor, service)
            own = visitor.getsockname()
    else:
        with datagram_socket() as visitor:
            visitor.sendto(b"ping", tunnel.visitor_address)
            _, source = tunnel.target.udp.recvfrom(100)
            tunnel.target.udp.sendto(b"pong", source)
            assert visitor.recv(100) == b"pong"
            own = visitor.getsockname()
    server = logged.of_servers.wait_for(known[0] + 1, "ours")[-1]
    client = logged.of_clients.wait_for(known[1] + 1, "ours")[-1]
    for line in (server, client):
        assert (line["protocol"], line["visitor"]) == (protocol, format_address(own[:2]))
        assert line["local"] == format_address(tunnel.visitor_address)
        assert (line["up"], line["down"], line["outcome"]) == (4, 4, "completed")
        assert 0 < line["first_byte"] < line["seconds"]
    assert server["session"] == client["session"]
    connected = logged.servers.find_in("ours", "client.connected")[-1]
    assert (server["client"], server["target"], server["dial"]) == (connected["client"], None, None)
    assert (client["client"], client["target"]) == (None, format_address(tunnel.target.address))
    assert client["dial"] == ("ok" if protocol == "tcp" else None)


ROTATE = """\
#!/bin/sh
kill -HUP {pid}
"""


@pytest.mark.programs("logrotate")
def test_logrotate_rotates_it_and_no_line_is_lost(logged: Logged, tmp_path: Path) -> None:
    """With the file in contrib; what it asks of systemd is done here."""
    log, mark = logged.of_servers, logged.servers.mark()
    known = len(log.lines("ours"))
    logged.tunnels["ours"].assert_works()
    log.wait_for(known + 1, "ours")
    (tmp_path / "systemctl").write_text(ROTATE.format(pid=logged.servers.process.pid))
    (tmp_path / "systemctl").chmod(0o755)
    asked = (REPOSITORY / "contrib" / "logrotate" / "nodepass").read_text()
    assert "/var/log/nodepass/*/access.log" in asked
    (tmp_path / "conf").write_text(asked.replace("/var/log/nodepass/*/access.log", str(log.path)))
    env = scrubbed({"PATH": f"{tmp_path}:{scrubbed()['PATH']}"})
    command = [installed("logrotate"), "--force", "--state", str(tmp_path / "state"), str(tmp_path / "conf")]
    subprocess.run(command, env=env, timeout=60, check=True)
    logged.servers.wait_for("process.reloading", after=mark)
    until(log.path.exists)
    assert log.path.stat().st_size == 0
    logged.tunnels["ours"].assert_works()
    log.wait_for(known + 2, "ours")
    assert log.path.stat().st_size > 0


NGINX = """
user root;
http {{
    log_format bytes "$proxy_protocol_addr $request_length $bytes_sent";
    access_log {root}/served bytes;
    server {{
        listen 127.0.0.1:{port} proxy_protocol;
        location / {{ root {root}; log_not_found off; }}
    }}
}}
"""

SERVED = {"small": 10, "large": 3_000_000, "page": 20_000}


def visit_nginx(address: Address, source: str, names: list[str]) -> None:
    """Request these files over one connection from an address."""
    with socket.create_connection(address, PATIENCE, (source, 0)) as visitor:
        for left, name in zip(range(len(names))[::-1], names, strict=True):
            last = "" if left else "Connection: close\r\n"
            visitor.sendall(f"GET /{name} HTTP/1.1\r\nHost: x\r\n{last}\r\n".encode())
        receive_all(visitor)


def by_visitor(rows: Iterable[tuple[str, int, int]]) -> dict[str, tuple[int, int]]:
    """Bytes up and down of each visitor's address."""
    sums: dict[str, tuple[int, int]] = {}
    for visitor, up, down in rows:
        before = sums.get(visitor, (0, 0))
        sums[visitor] = (before[0] + up, before[1] + down)
    return sums


@pytest.mark.programs("nginx")
def test_access_log_metrics_and_nginx_have_the_same_sums(stack: contextlib.ExitStack, tmp_path: Path) -> None:
    """nginx has each visitor's address by the PROXY protocol, whose header is not payload."""
    port, paths = free_port(), [tmp_path / "server.log", tmp_path / "client.log"]
    for name, size in SERVED.items():
        (tmp_path / name).write_bytes(bytes(size))
    nginx = stack.enter_context(running_nginx(tmp_path, port, NGINX.format(root=tmp_path, port=port)))
    server = stack.enter_context(OurServer(1, query=f"access_log={paths[0]}", env=WATCHED))
    query = f"tls=1&proxy_protocol=v2&access_log={paths[1]}"
    client = stack.enter_context(OurClient(server.tunnel_address, nginx, query=query, env=WATCHED))
    client.wait_until_connected()
    visits = [
        (f"127.0.1.{visitor}", random.Random(visitor + number).choices([*SERVED, "missing"], k=1 + number % 3))
        for visitor in range(1, 13)
        for number in range(8)
    ]
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda visit: visit_nginx(server.visitor_address, *visit), visits))

    requests = sum(len(names) for _, names in visits)
    until(lambda: len((tmp_path / "served").read_text().splitlines()) == requests)
    rows = [line.split() for line in (tmp_path / "served").read_text().splitlines()]
    served = by_visitor((visitor, int(up), int(down)) for visitor, up, down in rows)
    assert len(served) == 12
    assert sum(down for _, down in served.values()) > sum(SERVED.get(name, 0) for _, names in visits for name in names)
    for run, path, role in ((server, paths[0], "server"), (client, paths[1], "client")):
        log = Log(path, metrics_of(run), {"": f"{role}:{server.tunnel_address[1]}"})
        lines = log.wait_for(len(visits), "")
        assert by_visitor((parse_address(line["visitor"])[0], line["up"], line["down"]) for line in lines) == served
        log.assert_equal_sums("")
        assert log.sums("")["tcp", "completed"] == len(visits)

"""One client of several servers: each fails and returns by itself, and the visitors of the others notice nothing."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from tests.e2e.test_several_clients import Service
from tests.support.load import load
from tests.support.names import ClientWithNames
from tests.support.process import Nodepass, run
from tests.support.scrape import get, metrics_of, scrape, value, wait_for_value
from tests.support.sockets import Address, connect, datagram_socket, format_address, free_port, receive_all, until
from tests.support.target import Target
from tests.support.tunnel import BRISK, CALM, STEADY, OurServer, assert_connected
from tests.support.v1_server import V1Server

SMALL = {"MIN_POOL_CAPACITY": "4", "METRICS_LISTEN": "127.0.0.1:0"}
OLD, NEW = "a secret that is long enough", "another secret that is long enough"
BOTH = "127.0.0.1 localhost\n127.0.0.1 both.example\n127.0.0.2 both.example\n"
ONE = "127.0.0.1 localhost\n127.0.0.1 both.example\n"


def client_url(servers: Sequence[Address], target: Address, query: str = "") -> str:
    """The URL of a client of these servers."""
    return f"client://{','.join(map(format_address, servers))}/{format_address(target)}?log=debug{query}"


def ask(visitors: Address) -> str:
    """What the service says to a visitor."""
    with connect(visitors) as visitor:
        visitor.sendall(b"?")
        return receive_all(visitor).decode()


def ask_by_udp(visitors: Address) -> str:
    with datagram_socket() as visitor:
        visitor.sendto(b"?", visitors)
        return visitor.recv(100).decode()


class Pair:
    """Two servers on ports that stay, and their client."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self.service = stack.enter_context(Service("service"))
        self._ports = [(free_port(), free_port()) for _ in range(2)]
        self.servers = [self.start(number) for number in range(2)]
        url = client_url(self.tunnels, self.service.address)
        self.client = stack.enter_context(Nodepass(url, env={**STEADY, **SMALL}))
        self.metrics = metrics_of(self.client)
        self.wait_until_complete()

    @property
    def tunnels(self) -> list[Address]:
        return [("127.0.0.1", tunnel) for tunnel, _ in self._ports]

    def start(self, number: int) -> OurServer:
        """Start a server, on the ports that it had before."""
        tunnel, target = self._ports[number]
        server = OurServer(tunnel=f"127.0.0.1:{tunnel}", target=f"127.0.0.1:{target}", env=STEADY)
        return self._stack.enter_context(server)

    def restart(self, number: int) -> None:
        self.servers[number] = self.start(number)
        self.wait_until_complete()

    def wait_until_complete(self) -> None:
        wait_for_value(self.metrics, 2, "nodepass_peers_connected")
        for server in self.servers:
            assert ask(server.visitor_address) == "service"


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with contextlib.ExitStack() as stack:
        yield Pair(stack)


def test_visitors_of_each_server_reach_the_one_service_by_tcp_and_udp(pair: Pair) -> None:
    for server in pair.servers:
        assert ask(server.visitor_address) == "service"
        assert ask_by_udp(server.visitor_address) == "service"


def test_metrics_and_status_count_the_servers_and_sum_their_pools(pair: Pair) -> None:
    assert value(pair.metrics, "nodepass_peers") == 2
    peers = {sample.labels["peer"] for sample in scrape(pair.metrics) if sample.name == "nodepass_peer_info"}
    assert peers == {format_address(each) for each in pair.tunnels}
    assert value(pair.metrics, "nodepass_pool_capacity_connections") >= 8
    mark = pair.client.mark()
    pair.client.send(signal.SIGUSR1)
    report = pair.client.wait_for("tunnel.report", after=mark, level="info")
    assert "2 of 2 servers: " in report["message"]
    assert sorted(report["peer"].split(", ")) == sorted(peers)


def test_each_line_about_a_server_says_which_one_it_is(pair: Pair) -> None:
    for event in ("server.connected", "pool.added", "launch.received", "session.closed", "tunnel.security"):
        found = {entry["server"] for entry in pair.client.find(event) if "server" in entry.fields}
        assert found == {format_address(each) for each in pair.tunnels}, event


@pytest.mark.parametrize(
    "fault", ["killed", *(pytest.param(each, marks=pytest.mark.programs) for each in ("stopped", "suspended"))]
)
def test_visitors_and_flows_of_one_server_notice_nothing_when_the_other_is(pair: Pair, fault: str) -> None:
    mark, first = pair.client.mark(), pair.servers[0]
    reconnects = value(pair.metrics, "nodepass_reconnects_total")
    visitors = pair.servers[1].visitor_address
    with datagram_socket() as flow, load(partial(ask, visitors), 1) as found:
        flow.connect(visitors)
        flow.send(b"?")
        assert flow.recv(100) == b"service"
        opened = len(pair.client.find("flow.opened", after=mark))
        if fault == "killed":
            first.kill()
        elif fault == "stopped":
            assert first.stop() == 0
        else:
            first.send(signal.SIGSTOP)
        gone = pair.client.wait_for("server.disconnected", after=mark)
        assert gone["server"] == format_address(pair.tunnels[0])
        assert gone["reason"] == {"killed": "closed", "stopped": "shutdown", "suspended": "silent"}[fault]
        assert get(pair.metrics, "/readyz").status == 200
        first.send(signal.SIGCONT) if fault == "suspended" else pair.restart(0)
        pair.wait_until_complete()
        flow.send(b"?")
        assert flow.recv(100) == b"service"
        assert len(pair.client.find("flow.opened", after=mark)) == opened, "its lane was cut"
    assert not found.failed()
    assert found.answers() == {"service"}
    assert value(pair.metrics, "nodepass_reconnects_total") == reconnects + 1


def test_the_client_is_unready_only_without_any_server_and_leaves_all_at_once_when_it_stops() -> None:
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(Service("service"))
        server = stack.enter_context(OurServer(env=BRISK))
        missing = ("127.0.0.1", free_port())
        url = client_url([missing, server.tunnel_address], service.address)
        client = stack.enter_context(Nodepass("--start-timeout", "20s", url, env={**BRISK, **SMALL}))
        assert client.wait_for("server.unreachable")["server"] == format_address(missing)
        metrics = metrics_of(client)
        until(lambda: get(metrics, "/readyz").status == 200)
        assert ask(server.visitor_address) == "service"
        server.kill()
        client.wait_for("server.disconnected")
        assert "not connected to any server" in get(metrics, "/readyz").body
        assert client.stop() == 0


@pytest.mark.programs
def test_two_addresses_of_one_server_leave_each_other_alone() -> None:
    """The second connection is rejected, quietly, unless the server has a place for it."""
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(Service("service"))
        for clients in ("1", "2"):
            server = stack.enter_context(OurServer(tunnel="0.0.0.0:0", env={**BRISK, "CLIENTS": clients}))
            port = server.tunnel_address[1]
            url = client_url([("127.0.0.1", port), ("127.0.0.2", port)], service.address)
            client = stack.enter_context(Nodepass(url, env={**BRISK, "SERVICE_COOLDOWN": "20ms", **SMALL}))
            metrics = metrics_of(client)
            if clients == "1":
                failures = {"connection": "control", "reason": "busy"}
                until(lambda: value(metrics, "nodepass_handshake_failures_total", **failures) > 10)  # noqa: B023
                (line,) = client.find("server.rejected")
                assert (line["level"], line["reason"]) == ("warn", "busy")
                assert "CLIENTS" in line["message"]
            wait_for_value(metrics, int(clients), "nodepass_peers_connected")
            assert value(metrics, "nodepass_reconnects_total") == 0
            assert not server.find("client.disconnected")
            assert ask(server.visitor_address) == "service"


@pytest.mark.programs
def test_a_v1_server_is_one_of_them() -> None:
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(Target())
        old, new = stack.enter_context(V1Server()), stack.enter_context(OurServer())
        url = client_url([old.tunnel_address, new.tunnel_address], target.address)
        stack.enter_context(Nodepass(url, env=CALM))
        for server in (old, new):
            with connect(server.visitor_address) as visitor, target.accept() as service:
                assert_connected(visitor, service)


@pytest.mark.programs
def test_each_server_has_its_own_tls_mode_and_a_new_key_reconnects_to_all(tmp_path: Path) -> None:
    keys, own = tmp_path / "keys", tmp_path / "own"
    keys.write_text(f"- {OLD}\n- {NEW}\n")
    own.write_text(f"- {OLD}\n")
    for file in (keys, own):
        file.chmod(0o600)
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(Service("service"))
        env = {**CALM, "TUNNEL_KEYS_FILE": str(keys)}
        servers = [stack.enter_context(OurServer(tls, env=env)) for tls in (0, 1)]
        addresses = [server.tunnel_address for server in servers]
        url = client_url(addresses, service.address, "&tls=0")
        client = stack.enter_context(Nodepass(url, env={**CALM, **SMALL, "TUNNEL_KEYS_FILE": str(own)}))
        modes = {format_address(address): tls for tls, address in enumerate(addresses)}
        for server, tls in modes.items():
            assert client.wait_for("server.connected", server=server)["tls"] == tls
            client.wait_for("tunnel.security", server=server, tls=tls)
        assert value(metrics_of(client), "nodepass_tunnel_info", tls="0", tls_version="") == 1, "the lowest one"
        mark = client.mark()
        own.write_text(f"- {NEW}\n")
        client.send(signal.SIGHUP)
        for server in modes:
            assert client.wait_for("server.disconnected", after=mark, server=server)["reason"] == "reload"
            client.wait_for("server.connected", after=mark, server=server)
        assert {ask(server.visitor_address) for server in servers} == {"service"}


@pytest.mark.programs
def test_a_check_tries_each_server_and_says_which_one_fails() -> None:
    missing = ("127.0.0.1", free_port())
    with Service("service") as service, OurServer() as server:
        result = run("--check", client_url([server.tunnel_address, missing], service.address))
    assert result.code == 1
    assert f"server {format_address(server.tunnel_address)}: handshake complete" in result.output
    (failed,) = (line for line in result.output.splitlines() if line.startswith("fail"))
    assert f"server {format_address(missing)}: cannot be reached" in failed


class ClientOfAName(ClientWithNames):
    """A client of all addresses of `both.example`."""

    def __init__(self, hosts: Path, port: int, target: Address) -> None:
        super().__init__(hosts, ("both.example", port), target, query="servers=all", env={**BRISK, **SMALL})


@pytest.mark.programs("mount namespaces")
def test_every_address_of_a_name_is_a_server_that_comes_and_goes_with_the_name(tmp_path: Path) -> None:
    hosts, port = tmp_path / "hosts", free_port()
    hosts.write_text(BOTH)
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(Service("service"))
        one, two = (stack.enter_context(OurServer(tunnel=f"127.0.0.{last}:{port}", env=BRISK)) for last in (1, 2))
        client = stack.enter_context(ClientOfAName(hosts, port, service.address))
        metrics = metrics_of(client)
        wait_for_value(metrics, 2, "nodepass_peers_connected")
        for server in (one, two):
            assert ask(server.visitor_address) == "service"
        hosts.write_text(ONE)
        two.kill()  # a failure has the name looked up at once
        wait_for_value(metrics, 1, "nodepass_peers")
        assert ask(one.visitor_address) == "service"

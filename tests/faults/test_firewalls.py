"""The kinds of networks in docs/firewalls.md: a client's machine, a router that filters, and a server's machine."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.support.certificates import Authority
from tests.support.machines import Machine, Machines
from tests.support.process import Environment
from tests.support.programs import installed, running_haproxy
from tests.support.proxies import tls_only
from tests.support.sockets import PATIENCE, connect, free_port, receive_exactly, until
from tests.support.target import Target
from tests.support.tunnel import CALM, STEADY, OurClient, OurServer, assert_arrives, assert_connected
from tests.support.v2_network import Namespace

TUNNEL = 443
FORGETS_AFTER = 3
"""Seconds without a packet after which the NAT has forgotten a connection."""

MTU = 1280
"""Bytes of a packet that pass the router's links; the machines' own links take 1,500."""

pytestmark = pytest.mark.programs("network namespaces", "nft")


class Place:
    """A client's machine, a router, and a server's machine."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._machines = stack.enter_context(Machines(2))
        self.router: Namespace = self._machines.hub
        self.near, self.far = self._machines.others
        self.target = self._machines.start(stack, self.near.namespace, Target)

    def route(self) -> None:
        """Let packets pass the router."""
        set_kernel(self.router, {"net.ipv4.ip_forward": 1})

    def start_server(self, tls: int = 1, query: str = "data_port=tunnel") -> OurServer:
        address = f"{self.far.address}:{TUNNEL}"
        return self._machines.start(
            self._stack, self.far.namespace, lambda: OurServer(tls, tunnel=address, query=query, env=STEADY)
        )

    def start_client(self, query: str = "tls=1", env: Environment = CALM) -> OurClient:
        tunnel = self.far.address, TUNNEL
        return self._machines.start(
            self._stack, self.near.namespace, lambda: OurClient(tunnel, self.target.address, query=query, env=env)
        )

    def start_on_router(self, make: Callable[[], AbstractContextManager[object]]) -> None:
        self._machines.start(self._stack, self.router, make)

    @contextlib.contextmanager
    def session(self, server: OurServer) -> Iterator[tuple[socket.socket, socket.socket]]:
        """Both ends of a new session: the visitor's, who is on the server's machine, and the service's."""
        visitor = self.far.namespace.inside(lambda: connect(server.visitor_address))
        with visitor, self.target.accept() as service:
            yield visitor, service

    def assert_works(self, server: OurServer) -> None:
        with self.session(server) as ends:
            assert_connected(*ends)


@pytest.fixture
def place() -> Iterator[Place]:
    with contextlib.ExitStack() as stack:
        yield Place(stack)


def set_kernel(namespace: Namespace, values: Mapping[str, int]) -> None:
    """Set what sysctl sets, in a namespace."""

    def write() -> None:
        for name, value in values.items():
            Path("/proc/sys", name.replace(".", "/")).write_text(str(value))

    namespace.inside(write)


def filter_packets(namespace: Namespace, rules: str) -> None:
    """Rules of nftables in a namespace."""
    command = [installed("ip"), "netns", "exec", namespace.name, installed("nft"), "-f", "-"]
    subprocess.run(command, input=rules, text=True, check=True, timeout=PATIENCE)


def let_out(machine: Machine, allowed: str) -> None:
    """Drop what leaves a machine, unless a rule allows it."""
    filter_packets(
        machine.namespace,
        f"""
        table inet out {{
            chain output {{
                type filter hook output priority 0; policy drop;
                oifname "lo" accept
                {allowed} accept
            }}
        }}
        """,
    )


def test_one_open_port_is_enough_for_a_server_that_has_data_connections_there(place: Place) -> None:
    place.route()
    let_out(place.near, f"tcp dport {TUNNEL}")
    with_data_port = place.start_server(query="data_port=0")
    client = place.start_client()
    assert "DATA_PORT=tunnel" in client.wait_for("data.missing").line
    with_data_port.stop()
    server = place.start_server()
    client.wait_for("server.connected", data_port=TUNNEL)
    place.assert_works(server)


@pytest.mark.programs("squid", "squid's ssl-bump")
def test_where_only_a_proxy_lets_only_tls_pass_a_tunnel_that_begins_with_tls_works(
    place: Place, authority: Authority
) -> None:
    proxy = place.near.hub_address
    let_out(place.near, f"ip daddr {proxy} tcp dport 443")
    place.start_on_router(lambda: tls_only(443, proxy, authority.local))
    server = place.start_server()
    env = {**CALM, "TUNNEL_PROXY": f"http://{proxy}:443"}
    clear = place.start_client("tls=0", env)
    failed = clear.wait_for("server.unreachable")
    assert "began in the clear" in failed["error"]
    assert "tls=1" in failed["error"]
    clear.stop()
    client = place.start_client("tls=1", env)
    client.wait_until_connected()
    place.assert_works(server)


@pytest.mark.programs("haproxy")
def test_a_firewall_that_lets_only_tls_pass_lets_a_tunnel_pass_that_begins_with_it(tmp_path: Path) -> None:
    port = free_port()
    with OurServer(1, query="data_port=tunnel") as server, Target() as target:
        sections = f"""
frontend firewall
    bind 127.0.0.1:{port}
    tcp-request inspect-delay 5s
    tcp-request content reject if !{{ req.ssl_hello_type 1 }}
    default_backend server
backend server
    server server 127.0.0.1:{server.tunnel_address[1]}
"""
        with running_haproxy(tmp_path, port, sections) as firewall:
            with OurClient(firewall, target.address, query="tls=0") as clear:
                clear.wait_for("server.unreachable")
            with OurClient(firewall, target.address, query="tls=1") as client:
                client.wait_until_connected()
                with connect(server.visitor_address) as visitor, target.accept() as service:
                    assert_connected(visitor, service)


def test_a_nat_that_forgets_idle_connections_keeps_those_that_are_probed_in_time(place: Place) -> None:
    place.route()
    timeouts = {"established": FORGETS_AFTER, "max_retrans": FORGETS_AFTER, "unacknowledged": FORGETS_AFTER}
    filter_packets(
        place.router,
        """
        table ip nat {
            chain forward { type filter hook forward priority 0; ct state invalid drop; }
            chain post { type nat hook postrouting priority 100; oifname "cable1" masquerade; }
        }
        """,
    )
    set_kernel(
        place.router, {f"net.netfilter.nf_conntrack_tcp_timeout_{name}": each for name, each in timeouts.items()}
    )
    set_kernel(place.router, {"net.netfilter.nf_conntrack_tcp_loose": 0})
    server = place.start_server()
    client = place.start_client(env={**CALM, "KEEPALIVE": "1s"})
    client.wait_until_connected()
    with place.session(server) as (visitor, service):
        assert_connected(visitor, service)
        quiet_until = time.monotonic() + 2 * FORGETS_AFTER
        until(lambda: time.monotonic() > quiet_until)
        service.sendall(b"late")
        assert receive_exactly(visitor, 4) == b"late"
        place.assert_works(server)  # over a data connection that was idle meanwhile
    assert not client.find("pool.dead_connections")


def test_a_source_address_that_comes_later_is_used_then(place: Place) -> None:
    later = "10.77.0.9"
    place.route()
    server = place.start_server()
    client = place.start_client(env={**CALM, "SOURCE_ADDRESS": later, "TARGET_SOURCE_ADDRESS": "dev:lo"})
    client.wait_for("source.missing")
    failed = client.wait_for("server.unreachable")
    assert f"SOURCE_ADDRESS={later}: this machine has no such address" in failed["error"]
    place.near.namespace.ip("address", "add", f"{later}/24", "dev", "cable0")
    client.wait_until_connected()
    assert server.wait_for_client()["client"].startswith(f"{later}:")
    place.assert_works(server)


SILENT = """
table ip silent {
    chain output {
        type filter hook output priority 0
        ip protocol icmp drop
    }
}
"""


@pytest.mark.parametrize("has_icmp", [True, False])
def test_large_answers_pass_a_link_with_a_small_mtu(place: Place, has_icmp: bool) -> None:
    """Where no ICMP message says so, the machine at one end has to know: each end then sends small segments."""
    place.route()
    for number in range(2):
        place.router.ip("link", "set", f"cable{number}", "mtu", str(MTU))
    if not has_icmp:
        filter_packets(place.router, SILENT)
        place.near.namespace.ip("link", "set", "cable0", "mtu", str(MTU))
    server = place.start_server()
    client = place.start_client()
    client.wait_until_connected()
    for number in range(2):
        with place.session(server) as ends:
            source, sink = ends[::-1] if number else ends
            assert_arrives(os.urandom(1 << 20), source, sink)

"""The PROXY protocol to the target: the service sees the visitor's address, whatever carries it."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from proxyprotocol.v1 import ProxyProtocolV1
from proxyprotocol.v2 import ProxyProtocolV2

from nodepass.wire.proxy_protocol import TUNNEL_NAME
from tests.support.certificates import Authority
from tests.support.process import scrubbed
from tests.support.programs import running, running_haproxy, running_nginx, tunnel_to
from tests.support.shared_tunnels import Ends, Shared, open_tunnels
from tests.support.sockets import (
    Address,
    connect,
    datagram_socket,
    free_port,
    has_ipv6,
    parse_address,
    receive_all,
    receive_exactly,
    until,
)
from tests.support.target import Target
from tests.support.tunnel import OurClient, OurServer, Tunnel
from tests.support.v1_server import V1Server

needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
HOSTS = ["127.0.0.1", pytest.param("::1", marks=[pytest.mark.programs, needs_ipv6])]


@pytest.fixture(scope="module")
def shared(authority: Authority) -> Iterator[Shared]:
    """Tunnels named web that tell their targets who visits, by the version of the headers."""
    query = {"v1": "tls=0&name=web", "v2": "tls=1&name=web"}
    ends = {version: Ends(each, f"{each}&proxy_protocol={version}") for version, each in query.items()}
    with open_tunnels(ends, authority) as running:
        yield running


@contextlib.contextmanager
def tunnel_over_ipv6(version: str) -> Iterator[Tunnel]:
    """Such a tunnel, whose visitors come over IPv6."""
    with Target() as target, OurServer(1, target="[::1]:0", query="name=web") as server:
        query = f"tls=1&name=web&proxy_protocol={version}"
        with OurClient(server.tunnel_address, target.address, query=query) as client:
            client.wait_until_connected()
            server.wait_for_client()
            yield Tunnel(server, client, target)


def read_v1(service: socket.socket) -> Any:
    line = b""
    while not line.endswith(b"\r\n"):
        line += receive_exactly(service, 1)
    return ProxyProtocolV1().unpack(line)


def read_v2(service: socket.socket) -> Any:
    start = receive_exactly(service, 16)
    return ProxyProtocolV2().unpack(start + receive_exactly(service, int.from_bytes(start[14:], "big")))


def ends(header: Any) -> tuple[Address, Address]:
    """Source and destination of a header, as addresses of sockets."""
    return (str(header.source[0]), header.source[1]), (str(header.dest[0]), header.dest[1])


VERSIONS = pytest.mark.parametrize(("version", "read"), [("v1", read_v1), ("v2", read_v2)])


@VERSIONS
def test_a_connection_begins_with_the_visitors_addresses(shared: Shared, version: str, read: Any) -> None:
    assert_connection_told(shared.tunnels[version], version, read)


@pytest.mark.programs
@needs_ipv6
@VERSIONS
def test_a_connection_over_ipv6_does_too(version: str, read: Any) -> None:
    with tunnel_over_ipv6(version) as tunnel:
        assert_connection_told(tunnel, version, read)


def assert_connection_told(tunnel: Tunnel, version: str, read: Any) -> None:
    with connect(tunnel.visitor_address) as visitor:
        visitor.sendall(b"hello")
        with tunnel.target.accept() as service:
            header = read(service)
            assert ends(header) == (visitor.getsockname()[:2], tunnel.visitor_address)
            assert receive_exactly(service, 5) == b"hello"
            service.sendall(b"welcome")
            assert receive_exactly(visitor, 7) == b"welcome"
        if version == "v2":
            assert header.tlv[TUNNEL_NAME] == b"web"


def test_with_v2_every_datagram_begins_with_them_and_answers_do_not(shared: Shared) -> None:
    assert_datagrams_told(shared.tunnels["v2"], "127.0.0.1")


@pytest.mark.programs
@needs_ipv6
def test_with_v2_every_datagram_over_ipv6_does_too() -> None:
    with tunnel_over_ipv6("v2") as tunnel:
        assert_datagrams_told(tunnel, "::1")


def assert_datagrams_told(tunnel: Tunnel, host: str) -> None:
    with datagram_socket(host) as visitor, datagram_socket(host) as other:
        for speaker, payload in ((visitor, b"one"), (other, b"other"), (visitor, b""), (visitor, bytes(60_000))):
            speaker.sendto(payload, tunnel.visitor_address)
            received, source = tunnel.target.udp.recvfrom(65536)
            header = ProxyProtocolV2().unpack(received)
            length = 16 + int.from_bytes(received[14:16], "big")
            assert received[length:] == payload
            assert ends(header) == (speaker.getsockname()[:2], tunnel.visitor_address)
            assert header.protocol == socket.SOCK_DGRAM
            tunnel.target.udp.sendto(b"answer to " + payload[:5], source)
            assert speaker.recv(100) == b"answer to " + payload[:5]


def test_a_datagram_that_is_too_long_with_its_header_is_dropped_and_counted(shared: Shared) -> None:
    tunnel = shared.tunnels["v2"]
    with datagram_socket() as visitor:
        visitor.sendto(bytes(65_500), tunnel.visitor_address)
        dropped = shared.clients.wait_in("v2", "datagram.dropped", reason="too_large")
        assert dropped["size"] == 65_500
        visitor.sendto(b"next", tunnel.visitor_address)
        assert tunnel.target.udp.recv(65536).endswith(b"next")


def test_with_v1_datagrams_have_no_header(shared: Shared) -> None:
    tunnel = shared.tunnels["v1"]
    with datagram_socket() as visitor:
        visitor.sendto(b"hello", tunnel.visitor_address)
        assert tunnel.target.udp.recv(65536) == b"hello"


def test_a_server_of_wire_v1_knows_no_address_which_is_said_once(stack: contextlib.ExitStack) -> None:
    target, server = stack.enter_context(Target()), stack.enter_context(V1Server(0))
    client = stack.enter_context(OurClient(server.tunnel_address, target.address, query="tls=0&proxy_protocol=v2"))
    client.wait_until_connected(wire=1)
    tunnel = Tunnel(server, client, target)
    for _ in range(2):
        with connect(tunnel.visitor_address) as visitor, target.accept() as service:
            visitor.sendall(b"hello")
            assert not read_v2(service).proxied
            assert receive_exactly(service, 5) == b"hello"
    assert len(client.find("server.no_addresses", level="warn")) == 1


# Real services

NGINX = """
http {{
    access_log off;
    server {{
        listen 127.0.0.1:{port} proxy_protocol;
        location / {{ return 200 "$proxy_protocol_addr $proxy_protocol_port $proxy_protocol_server_port"; }}
    }}
}}
"""

HAPROXY = """
frontend front
    mode http
    bind 127.0.0.1:{port} accept-proxy
    http-request return status 200 content-type text/plain lf-string "%[src] %[src_port] %[dst_port]"
"""

UNBOUND = """
server:
    directory: "{root}"
    chroot: ""
    username: ""
    pidfile: "{root}/unbound.pid"
    use-syslog: no
    logfile: "{root}/queries"
    log-queries: yes
    interface: 127.0.0.1@{port}
    proxy-protocol-port: {port}
    do-not-query-localhost: no
    local-zone: "test." static
    local-data: "host.test. A 192.0.2.7"
remote-control:
    control-enable: no
"""


def ask_for_addresses(visitors: Address) -> tuple[list[str], Address]:
    """What the service says that the visitor's address is; and what it is."""
    with connect(visitors) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = receive_all(sock)
        own = sock.getsockname()
    return answer.rpartition(b"\r\n\r\n")[2].decode().split(), own[:2]


@pytest.mark.programs("nginx", "haproxy")
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_nginx_and_haproxy_see_the_visitors_address(tmp_path: Path, version: str, host: str) -> None:
    port = free_port()
    other = free_port()
    haproxy = running_haproxy(tmp_path, other, HAPROXY.format(port=other))
    with running_nginx(tmp_path, port, NGINX.format(port=port)) as first, haproxy as second:
        for service in (first, second):
            with tunnel_to(service, 1, host, PROXY_PROTOCOL=version) as visitors:
                for _ in range(3):
                    (address, source_port, local_port), own = ask_for_addresses(parse_address(visitors))
                    assert (ipaddress.ip_address(address), int(source_port)) == (ipaddress.ip_address(own[0]), own[1])
                    assert int(local_port) == parse_address(visitors)[1]


def running_unbound(root: Path, port: int) -> contextlib.AbstractContextManager[Address]:
    """unbound, which requires headers and logs whose questions it gets."""
    (root / "unbound.conf").write_text(UNBOUND.format(root=root, port=port))
    return running(port, "unbound", "-d", "-c", str(root / "unbound.conf"), protocol="udp")


def dig(server: Address, *options: str) -> str:
    """What a DNS server says that the address of host.test is."""
    place = [f"@{server[0]}", "-p", str(server[1])]
    command = ["dig", *place, "+short", "+tries=1", "+time=20", *options, "host.test", "A"]
    done = subprocess.run(command, env=scrubbed(), capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


@pytest.mark.programs("unbound", "dig")
def test_unbound_sees_the_visitors_address_in_datagrams_and_connections(tmp_path: Path) -> None:
    port = free_port()
    with running_unbound(tmp_path, port) as service, tunnel_to(service, 1, PROXY_PROTOCOL="v2") as visitors:
        for options, source in (
            (["+notcp"], "127.0.0.1"),
            (["+tcp"], "127.0.0.1"),
            (["+notcp", "-b", "127.0.0.9"], "127.0.0.9"),
        ):
            assert dig(parse_address(visitors), *options) == "192.0.2.7"
            until(lambda source=source: f"{source} host.test. A IN" in (tmp_path / "queries").read_text())

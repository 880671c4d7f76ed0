"""ACCEPT_PROXY: real proxies in front of a server, and two tunnels in a row, keep the visitor's first address.

The proxies connect from an address of their own, so that the others on this machine need no header.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from proxyprotocol.result import ProxyResultIPv4
from proxyprotocol.v1 import ProxyProtocolV1
from proxyprotocol.v2 import ProxyProtocolV2

from tests.e2e.test_proxy_protocol import HOSTS, dig, ends, read_v2, running_unbound
from tests.support.programs import running, running_haproxy, running_nginx
from tests.support.sockets import (
    PATIENCE,
    Address,
    connect,
    datagram_socket,
    format_address,
    free_port,
    has_ipv6,
    is_over,
    receive_exactly,
    until,
)
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, OurServer, Tunnel, assert_connected

PROXY = "127.0.0.5"
ACCEPT = f"accept_proxy={PROXY}"
FRONT = "127.0.0.7"  # where clients find a tunnel port that is behind a proxy

VISITOR, LOCAL = (ip_address("192.0.2.1"), 51000), (ip_address("198.51.100.1"), 443)


def written(version: Any, protocol: int) -> bytes:
    """Headers as an independent writer has them."""
    result = ProxyResultIPv4(VISITOR, LOCAL, protocol=protocol)  # type: ignore[arg-type]
    header = version().pack(result)
    assert isinstance(header, bytes)
    return header


def proxy_connection(address: Address, said: bytes) -> socket.socket:
    """A connection of a proxy that has said something."""
    sock = socket.create_connection(address, PATIENCE, (PROXY, 0))
    sock.sendall(said)
    return sock


@contextlib.contextmanager
def tunnel_behind(query: str) -> Iterator[Tunnel]:
    """A tunnel with these settings of its server, whose target is told the visitors' addresses."""
    with contextlib.ExitStack() as stack:
        target, server = stack.enter_context(Target()), stack.enter_context(OurServer(query=query))
        client = stack.enter_context(OurClient(server.tunnel_address, target.address, query="proxy_protocol=v2"))
        client.wait_until_connected()
        server.wait_for_client()
        yield Tunnel(server, client, target)


def test_headers_of_a_proxy_say_who_visits_and_those_of_others_are_data() -> None:
    """Also where a header arrives byte by byte; a proxy without one is reset."""
    with tunnel_behind(f"{ACCEPT}&deny=192.0.2.9") as tunnel:
        server = tunnel.our_server
        for header in (written(ProxyProtocolV1, socket.SOCK_STREAM), written(ProxyProtocolV2, socket.SOCK_STREAM)):
            with proxy_connection(tunnel.visitor_address, b"") as visitor:
                visitor.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for byte in header:
                    visitor.sendall(bytes([byte]))
                with tunnel.target.accept() as service:
                    assert ends(read_v2(service)) == (("192.0.2.1", 51000), ("198.51.100.1", 443))
                    assert_connected(visitor, service)
                server.wait_for("visitor.connected", visitor="192.0.2.1:51000")
            with connect(tunnel.visitor_address) as spoofer, tunnel.target.accept() as service:
                spoofer.sendall(header)
                assert ends(read_v2(service))[0] == spoofer.getsockname()
                assert receive_exactly(service, len(header)) == header
        with proxy_connection(tunnel.visitor_address, b"PROXY TCP4 192.0.2.9 192.0.2.9 1 2\r\n") as denied:
            assert is_over(denied)
            server.wait_for("visitor.refused", visitor="192.0.2.9:1", reason="denied")
        with proxy_connection(tunnel.visitor_address, b"GET / HTTP/1.1\r\n") as refused:
            assert is_over(refused)
            server.wait_for("proxy.refused", proxy=format_address(refused.getsockname()), reason="header_missing")


def test_datagrams_of_a_proxy_are_the_visitors_and_their_answers_have_no_header() -> None:
    header = written(ProxyProtocolV2, socket.SOCK_DGRAM)
    with tunnel_behind(ACCEPT) as tunnel, datagram_socket(PROXY) as first, datagram_socket(PROXY) as second:
        sources = set()
        for proxy in (first, second):
            proxy.sendto(header + b"question", tunnel.visitor_address)
            received, source = tunnel.target.udp.recvfrom(65536)
            assert received.endswith(b"question")
            assert ends(ProxyProtocolV2().unpack(received)) == (("192.0.2.1", 51000), ("198.51.100.1", 443))
            tunnel.target.udp.sendto(b"answer", source)
            assert proxy.recv(100) == b"answer"
            sources.add(source)
        assert len(sources) == 1, "it is one flow"
        first.sendto(b"no header", tunnel.visitor_address)
        tunnel.our_server.wait_for("proxy.refused", reason="header_missing", place="target address")


@pytest.mark.programs
@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_two_tunnels_in_a_row_keep_the_visitors_first_address(stack: contextlib.ExitStack, host: str) -> None:
    """The first tunnel's client is the second server's proxy; the second client comes by the other family."""
    other = "::1" if host == "127.0.0.1" else "127.0.0.1"
    target = stack.enter_context(Target())
    second = stack.enter_context(
        OurServer(tunnel=format_address((other, 0)), target=format_address((host, 0)), query=f"accept_proxy={host}")
    )
    last = stack.enter_context(OurClient(second.tunnel_address, target.address, query="proxy_protocol=v2"))
    first = stack.enter_context(OurServer(1, target=format_address((host, 0))))
    middle = stack.enter_context(
        OurClient(first.tunnel_address, second.visitor_address, query="tls=1&proxy_protocol=v2")
    )
    for client in (last, middle):
        client.wait_until_connected()
    with connect(first.visitor_address) as visitor, target.accept() as service:
        assert ends(read_v2(service)) == (visitor.getsockname()[:2], first.visitor_address)
        assert_connected(visitor, service)
        second.wait_for("visitor.connected", visitor=format_address(visitor.getsockname()[:2]))
    with datagram_socket(host) as visitor:
        for _ in range(2):
            visitor.sendto(b"question", first.visitor_address)
            received, source = target.udp.recvfrom(65536)
            assert ends(ProxyProtocolV2().unpack(received)) == (visitor.getsockname()[:2], first.visitor_address)
            assert received.endswith(b"question")
            target.udp.sendto(b"answer", source)
            assert visitor.recv(100) == b"answer"


# Real proxies

Front = Callable[[Path, int, str, Address], AbstractContextManager[Address]]


CHECKS = "check inter 5s fastinter 50ms fall 1000"
"""A check every 50 ms. `inter` is also the time that a check may take, and one that fails at the start is enough."""


def in_haproxy(options: str) -> Front:
    """haproxy in front of a server, with these options towards it; it checks the server's health all the time."""

    def start(root: Path, port: int, host: str, server: Address) -> AbstractContextManager[Address]:
        to = f"server one {format_address(server)} {options} {CHECKS} source {PROXY}"
        bind = f"bind {format_address((host, port))}"
        return running_haproxy(root, port, f"listen front\n    {bind}\n    {to}\n")

    return start


def in_nginx(root: Path, port: int, host: str, server: Address) -> AbstractContextManager[Address]:
    """nginx in front of a server, which writes version 1."""
    to = f"proxy_pass {format_address(server)}; proxy_protocol on; proxy_bind {PROXY};"
    stream = f"stream {{ server {{ listen {format_address((host, port))}; {to} }} }}"
    return running_nginx(root, port, stream, has_streams=True)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    "front",
    [
        pytest.param(in_haproxy("send-proxy"), marks=pytest.mark.programs("haproxy"), id="haproxy v1"),
        pytest.param(in_haproxy("send-proxy-v2"), marks=pytest.mark.programs("haproxy"), id="haproxy v2"),
        pytest.param(
            in_haproxy("send-proxy-v2 proxy-v2-options crc32c,unique-id"),
            marks=pytest.mark.programs("haproxy"),
            id="haproxy v2 with a checksum",
        ),
        pytest.param(in_nginx, marks=pytest.mark.programs("nginx", "nginx's stream module"), id="nginx"),
    ],
)
def test_a_real_proxy_in_front_of_the_target_address(tmp_path: Path, front: Front, host: str) -> None:
    """The proxy takes visitors by IPv4 or IPv6; the server has IPv4."""
    port = free_port()
    with tunnel_behind(ACCEPT) as tunnel, front(tmp_path, port, host, tunnel.visitor_address):
        for _ in range(3):
            with connect((host, port)) as visitor, contextlib.ExitStack() as stack:
                visitor.sendall(b"hello")
                service = until(lambda: next_with(tunnel.target, b"hello", stack))
                assert service == (visitor.getsockname()[:2], (host, port))
        assert not tunnel.our_server.find("proxy.refused")


def next_with(target: Target, said: bytes, stack: contextlib.ExitStack) -> tuple[Address, Address] | None:
    """The ends in the header of the next session, if its visitor says this: a health check says nothing, and may have
    been reset before the header was written.
    """
    service = stack.enter_context(target.accept())
    with contextlib.suppress(AssertionError, ConnectionError):
        header = read_v2(service)
        if receive_exactly(service, len(said)) == said:
            return ends(header)
    return None


@pytest.mark.programs("haproxy")
@pytest.mark.parametrize("version", ["send-proxy", "send-proxy-v2"])
@pytest.mark.parametrize(("tls", "data_port"), [(0, "0"), (1, "0"), (1, "tunnel")])
def test_a_real_proxy_in_front_of_the_tunnel_port(
    stack: contextlib.ExitStack, tmp_path: Path, version: str, tls: int, data_port: str
) -> None:
    """TLS passes through; without a key, data connections must have the client's address."""
    target = stack.enter_context(Target())
    query = f"{ACCEPT}&data_port={data_port}"
    server = stack.enter_context(OurServer(tls, query=query))
    ports = {server.tunnel_address[1], server.data_address[1]}
    sections = "".join(
        f"listen port-{port}\n    bind {FRONT}:{port}\n    server one 127.0.0.1:{port} {version} source {PROXY}\n"
        for port in sorted(ports)
    )
    stack.enter_context(running_haproxy(tmp_path, max(ports), sections))
    front = (FRONT, server.tunnel_address[1])
    client = stack.enter_context(OurClient(front, target.address, query=f"tls={tls}", env=CALM))
    client.wait_until_connected()
    connected = server.wait_for_client()
    assert connected["client"].startswith("127.0.0.1:")
    for _ in range(3):
        with connect(server.visitor_address) as visitor, target.accept() as service:
            assert_connected(visitor, service)
    assert not server.find("proxy.refused")
    assert not server.find("data.rejected")


DNSDIST = """
setLocal("127.0.0.1:{port}")
setACL("127.0.0.0/8")
newServer({{address="{server}", source="{proxy}", useProxyProtocol=true}}):setUp()
"""


@pytest.mark.programs("dnsdist", "unbound", "dig")
@pytest.mark.parametrize("protocol", ["+notcp", "+tcp"])
def test_dnsdist_in_front_of_a_tunnel_to_unbound(stack: contextlib.ExitStack, tmp_path: Path, protocol: str) -> None:
    """Headers go in and come out in front of datagrams, whose answers have none, and of connections."""
    first = free_port(2)
    service = stack.enter_context(running_unbound(tmp_path, first))
    server = stack.enter_context(OurServer(1, query=ACCEPT))
    client = stack.enter_context(OurClient(server.tunnel_address, service, query="tls=1&proxy_protocol=v2"))
    client.wait_until_connected()
    front = ("127.0.0.1", first + 1)
    text = DNSDIST.format(port=front[1], server=format_address(server.visitor_address), proxy=PROXY)
    (tmp_path / "dnsdist.conf").write_text(text)
    command = ("dnsdist", "--supervised", "--disable-syslog", "-C", str(tmp_path / "dnsdist.conf"))
    stack.enter_context(running(front[1], *command, protocol="udp"))
    for source in ("127.0.0.8", "127.0.0.9"):
        assert dig(front, protocol, "-b", source) == "192.0.2.7"
        until(lambda source=source: f"{source} host.test. A IN" in (tmp_path / "queries").read_text())
    assert not server.find("proxy.refused")

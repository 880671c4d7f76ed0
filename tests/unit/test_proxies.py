"""Headers that proxies send: each is read exactly, however it arrives, and refused at once where it cannot be one."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import ExitStack

import gevent
import pytest
from gevent import socket

from nodepass.config.settings import rows
from nodepass.errors import ProxyHeaderError
from nodepass.log import Log
from nodepass.net.sockets import Endpoint, Socket, as_plain
from nodepass.net.udp import ReplyAddress
from nodepass.visitors.proxies import Proxies, Visitor, all_networks
from nodepass.wire.proxy_protocol import LARGEST, Ends, encode_v1, encode_v2
from tests.support.table import each_row
from tests.unit.controls import run
from tests.unit.streams import reset, tcp_pair

PROXY = Endpoint(socket.AF_INET, ("127.0.0.5", 40000))
SOON = 0.1  # seconds
PATIENT = 60.0  # seconds
V4 = Ends.parse("192.0.2.1:51000", "198.51.100.1:443")
V6 = Ends.parse("[2001:db8::1]:51000", "[2001:db8::2]:443")
MAPPED = Ends.parse("192.0.2.1:51000", "[2001:db8::2]:443")
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"


def proxies(seconds: float = PATIENT, networks: str = "127.0.0.4/31") -> Proxies:
    return Proxies(rows()["accept_proxy"].kind.parse(networks), seconds, "target address", Log("test"))


def connection(stack: ExitStack) -> tuple[Socket, socket.socket]:
    """A connection as it is accepted, and the proxy's end."""
    stream, peer = stack.enter_context(tcp_pair())
    assert isinstance(stream.sock, socket.socket)
    sock = as_plain(stream.sock)
    stack.callback(sock.close)
    return sock, peer


def read(stack: ExitStack, said: bytes, seconds: float = PATIENT) -> tuple[Visitor, bytes]:
    """What a header that has arrived says, and what is left behind it."""
    sock, peer = connection(stack)
    peer.sendall(said)
    visitor = proxies(seconds).read(sock, PROXY, time.monotonic())
    try:
        return visitor, sock.recv(100)
    except BlockingIOError:
        return visitor, b""


def test_the_networks_of_a_proxy_are_found_as_the_kernel_writes_its_address() -> None:
    found = proxies(networks="192.0.2.0/24,fe80::/10")
    for host in ("192.0.2.7", "::ffff:192.0.2.7", "fe80::1%lo"):
        assert found.trusts(host)
    for host in ("192.0.3.7", "::ffff:192.0.3.7", "2001:db8::1"):
        assert not found.trusts(host)


def test_a_common_port_has_the_proxies_of_all_its_tunnels() -> None:
    parse = rows()["accept_proxy"].kind.parse
    assert all_networks([parse("127.0.0.1"), parse("none"), parse("::1")]) == parse("127.0.0.1,::1")
    assert not all_networks([parse("none")])


@pytest.mark.parametrize("ends", [V4, V6, MAPPED], ids=["IPv4", "IPv6", "both"])
@pytest.mark.parametrize("behind", [b"", b"\x16\x03\x01", b"PROXY UNKNOWN\r\n"], ids=["nothing", "TLS", "another"])
def test_a_header_is_read_and_nothing_behind_it(stack: ExitStack, ends: Ends, behind: bytes) -> None:
    for header in (encode_v1(ends), encode_v2(ends, "web", datagram=False)):
        (peer, local), left = read(stack, header + behind)
        assert local
        assert left == behind
        assert peer.sockaddr[:2] == (str(ends.source[0]), ends.source[1])
        assert local.sockaddr[:2] == (str(ends.destination[0]), ends.destination[1])
        assert peer.family == (socket.AF_INET6 if ends is V6 else socket.AF_INET)


@pytest.mark.parametrize(
    "header",
    [
        b"PROXY UNKNOWN\r\n",
        b"PROXY UNKNOWN 192.0.2.1 192.0.2.2 1 2\r\n",
        encode_v2(None, "web", datagram=False),
        SIGNATURE + b"\x20\x11\x00\x0c" + bytes(12),
        SIGNATURE + b"\x21\x00\x00\x00",
        SIGNATURE + b"\x21\x31\x00\xd8" + bytes(216),
    ],
    ids=["UNKNOWN", "UNKNOWN with more", "LOCAL", "LOCAL with addresses", "unspecified", "Unix"],
)
def test_without_addresses_the_connections_own_count(stack: ExitStack, header: bytes) -> None:
    assert read(stack, header + b"x") == (Visitor(PROXY, None), b"x")


@pytest.mark.parametrize("size", [1, 7])
def test_a_header_may_arrive_in_pieces(stack: ExitStack, size: int) -> None:
    for header in (encode_v1(V6), encode_v2(V6, "web", datagram=False)):
        sock, peer = connection(stack)
        reading = run(stack, proxies().read, sock, PROXY, time.monotonic())
        said = header + b"data"
        for place in range(0, len(said), size):
            peer.sendall(said[place : place + size])
            gevent.sleep(0.001)
        visitor = reading.get(timeout=10)
        assert isinstance(visitor, Visitor)
        assert visitor.peer.sockaddr[0] == "2001:db8::1"
        assert sock.recv(1) == b"d"


def test_half_a_header_costs_no_time_while_it_is_waited_for(stack: ExitStack) -> None:
    sock, peer = connection(stack)
    run(stack, proxies().read, sock, PROXY, time.monotonic())
    peer.sendall(encode_v1(V6)[:20])
    began = time.process_time()
    gevent.sleep(0.3)
    assert time.process_time() - began < 0.1


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"GET / HTTP/1.1\r\n", "header_missing"),
        (b"P", "header_late"),
        (b"PROXY TCP4 192.0.2.1", "header_late"),
        (SIGNATURE, "header_late"),
        (encode_v2(V4, "web", datagram=False)[:-1], "header_late"),
        (b"", "header_late"),
        (b"\r\n\r\nx", "header_missing"),
        (b"PROXYX", "header_missing"),
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\n", "header_malformed"),
        (b"PROXY TCP4 192.0.2.1 ::1 1 2\r\n", "header_malformed"),
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 65536\r\n", "header_malformed"),
        (b"PROXY TCP4  192.0.2.1 192.0.2.2 1 2\r\n", "header_malformed"),
        (b"PROXY TCP6 ::1%1 ::1 1 2\r\n", "header_malformed"),
        (b"PROXY " + b"x" * 101, "header_malformed"),
        (SIGNATURE + b"\x31\x11\x00\x0c" + bytes(12), "header_malformed"),
        (SIGNATURE + b"\x22\x11\x00\x0c" + bytes(12), "header_malformed"),
        (SIGNATURE + b"\x21\x41\x00\x0c" + bytes(12), "header_malformed"),
        (SIGNATURE + b"\x21\x13\x00\x0c" + bytes(12), "header_malformed"),
        (SIGNATURE + b"\x21\x11\x00\x0b" + bytes(11), "header_malformed"),
        (SIGNATURE + b"\x21\x21\x00\x0c" + bytes(12), "header_malformed"),
        (SIGNATURE + b"\x21\x11\x00\x0e" + bytes(14), "header_malformed"),
        (SIGNATURE + b"\x21\x11\x00\x0f" + bytes(12) + b"\x04\0\x01", "header_malformed"),
        (SIGNATURE + b"\x21\x11\xff\xff", "header_malformed"),
    ],
)
def test_what_is_no_header_is_refused_without_waiting_for_more(stack: ExitStack, said: bytes, reason: str) -> None:
    """Only one that may still become a header is waited for."""
    with pytest.raises(ProxyHeaderError) as caught:
        read(stack, said, SOON if reason == "header_late" else PATIENT)
    assert caught.value.reason == reason


def test_the_largest_header_is_read_and_a_larger_one_is_not_waited_for(stack: ExitStack) -> None:
    """Fields of 64 KiB would be memory that an attacker fills."""
    length = LARGEST - 16
    filler = b"\x04" + (length - 12 - 3).to_bytes(2, "big") + bytes(length - 12 - 3)
    start = SIGNATURE + b"\x21\x11"
    visitor, left = read(stack, start + length.to_bytes(2, "big") + bytes(12) + filler + b"x")
    assert (visitor.peer.host, left) == ("0.0.0.0", b"x")
    with pytest.raises(ProxyHeaderError, match="allowed: up to 4096"):
        read(stack, start + (length + 1).to_bytes(2, "big"))


def test_a_proxy_that_leaves_within_its_header_is_refused_at_once(stack: ExitStack) -> None:
    for leave in (socket.socket.close, reset):
        sock, peer = connection(stack)
        peer.sendall(b"PROXY ")
        reading = run(stack, pytest.raises, ProxyHeaderError, proxies().read, sock, PROXY, time.monotonic())
        gevent.sleep(0.01)
        leave(peer)
        assert reading.get(timeout=10).value.reason == "header_missing"  # type: ignore[attr-defined]


def test_a_slow_header_does_not_get_more_time_with_each_byte(stack: ExitStack) -> None:
    sock, peer = connection(stack)
    reading = run(stack, pytest.raises, ProxyHeaderError, proxies(SOON).read, sock, PROXY, time.monotonic())
    for byte in encode_v1(V4)[:-1]:
        if reading.ready():
            break
        peer.sendall(bytes([byte]))
        gevent.sleep(SOON / 5)
    else:
        pytest.fail("it was waited for until its last byte but one")
    assert reading.get().value.reason == "header_late"  # type: ignore[attr-defined]


def test_each_refusal_is_counted() -> None:
    counter: Counter[str] = Counter()
    for _ in range(2):
        proxies().refuse(PROXY, ProxyHeaderError("header_late", "no header"), counter)
    assert counter == {"header_late": 2}


# Datagrams


def test_a_datagram_is_its_visitors_and_is_answered_through_the_proxy() -> None:
    one, two = (ReplyAddress(("127.0.0.5", port), ()) for port in (1, 2))
    payload, visitor = proxies().unwrap(encode_v2(V4, "", datagram=True) + b"hello", one)
    assert (payload, str(visitor), visitor.local(1)) == (b"hello", "192.0.2.1:51000", ("198.51.100.1", 443))
    assert visitor.via is one
    _, again = proxies().unwrap(encode_v2(V4, "web", datagram=True) + b"more", two)
    assert again.via is two
    assert again == visitor
    assert hash(again) == hash(visitor)
    assert visitor != ReplyAddress(visitor.sockaddr, ()), "another visitor says that it has this address"


def test_a_local_datagram_is_the_proxys_own() -> None:
    proxy = ReplyAddress(("127.0.0.5", 1), ())
    assert proxies().unwrap(encode_v2(None, "", datagram=True), proxy) == (b"", proxy)


@each_row(
    ("datagram", "reason"),
    [
        (b"", "header_missing"),
        (b"hello", "header_missing"),
        (encode_v1(V4) + b"hello", "header_missing"),
        (SIGNATURE, "header_malformed"),
        (encode_v2(V4, "web", datagram=True)[:-1], "header_malformed"),
    ],
)
def test_a_datagram_without_a_whole_header_of_version_2_is_refused(datagram: bytes, reason: str) -> None:
    with pytest.raises(ProxyHeaderError) as caught:
        proxies().unwrap(datagram, ReplyAddress(("127.0.0.5", 1), ()))
    assert caught.value.reason == reason

"""Addresses as text, and what waits on a socket."""

from __future__ import annotations

import gevent
import pytest
from gevent import socket

from nodepass.net.sockets import Endpoint, format_sockaddr, format_without_zone, peek_byte, peek_bytes, plain_host
from tests.support.table import each_row
from tests.unit.streams import reset, tcp_pair


@each_row("first", [b"/", b"\x16\x03\x01", b"\0", b"\xff"])
def test_the_first_byte_is_looked_at_and_left(first: bytes) -> None:
    with tcp_pair() as (stream, peer), gevent.Timeout(10):
        assert peek_byte(stream._raw) is None
        peer.sendall(first)
        for _ in range(2):
            stream.wait_readable()
            assert peek_byte(stream._raw) == first[0]
        assert stream.read(memoryview(bytearray(100))) == len(first)
        assert peek_byte(stream._raw) is None


@pytest.mark.parametrize("leave", [socket.socket.close, reset], ids=["end", "reset"])
def test_a_connection_that_is_over_has_no_first_byte(leave: object) -> None:
    for size in (1, 100):
        with tcp_pair() as (stream, peer), gevent.Timeout(10):
            leave(peer)  # type: ignore[operator]
            stream.wait_readable()
            if size == 1:
                assert peek_byte(stream._raw) == -1
            else:
                assert peek_bytes(stream._raw, size) == b""


@each_row(
    ("sockaddr", "text", "without_zone"),
    [
        (("192.0.2.7", 80), "192.0.2.7:80", "192.0.2.7:80"),
        (("::ffff:192.0.2.7", 80, 0, 0), "192.0.2.7:80", "192.0.2.7:80"),
        (("2001:db8::1", 443, 0, 0), "[2001:db8::1]:443", "[2001:db8::1]:443"),
        (("fe80::1%eth0", 443, 0, 2), "[fe80::1%eth0]:443", "[fe80::1]:443"),
    ],
)
def test_an_address_is_written_with_and_without_its_zone(
    sockaddr: tuple[object, ...], text: str, without_zone: str
) -> None:
    assert format_sockaddr(sockaddr) == text
    assert format_without_zone(sockaddr) == without_zone


def test_an_endpoint_is_the_same_host_with_another_port() -> None:
    endpoint = Endpoint(socket.AF_INET6, ("::ffff:192.0.2.7", 80, 0, 0))
    assert str(endpoint.with_port(81)) == "192.0.2.7:81"
    assert endpoint.host == endpoint.with_port(81).host == plain_host(endpoint.sockaddr) == "192.0.2.7"

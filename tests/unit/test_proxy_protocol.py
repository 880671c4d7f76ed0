"""The headers of the PROXY protocol, as an independent parser reads them."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from proxyprotocol.v1 import ProxyProtocolV1
from proxyprotocol.v2 import ProxyProtocolV2

from nodepass.wire.proxy_protocol import LONGEST, TUNNEL_NAME, Ends, ProxyHeaders, encode_v1, encode_v2

V4, V6 = "192.0.2.1:51000", "[2001:db8::1]:443"

ends = st.builds(
    Ends,
    st.tuples(st.ip_addresses(), st.integers(0, 65535)),
    st.tuples(st.ip_addresses(), st.integers(0, 65535)),
)


def parse(header: bytes) -> Any:
    return (ProxyProtocolV2() if header.startswith(b"\r\n") else ProxyProtocolV1()).unpack(header)


@given(ends, st.booleans(), st.from_regex(r"\A[A-Za-z0-9._-]{0,64}\Z"))
def test_every_pair_of_addresses_is_read_as_it_was(given_ends: Ends, datagram: bool, tunnel: str) -> None:
    same = given_ends.unified()
    for header in (encode_v1(given_ends), encode_v2(given_ends, tunnel, datagram)):
        read = parse(header)
        assert read.source == same.source
        assert read.dest == same.destination
        assert len(header) <= LONGEST
    assert read.protocol == (socket.SOCK_DGRAM if datagram else socket.SOCK_STREAM)
    assert read.tlv.get(TUNNEL_NAME) == (tunnel.encode() or None)


def test_the_line_of_version_1() -> None:
    headers = ProxyHeaders("v1", "web")
    assert headers.of_connection(V4, "198.51.100.1:443") == b"PROXY TCP4 192.0.2.1 198.51.100.1 51000 443\r\n"
    assert headers.of_connection(V6, V6) == b"PROXY TCP6 2001:db8::1 2001:db8::1 443 443\r\n"
    assert headers.of_connection("", "") == b"PROXY UNKNOWN\r\n"
    assert headers.of_datagram(V4, V4) == b""


@pytest.mark.parametrize(("visitor", "local"), [("", ""), (V4, ""), ("", V6), ("name:1", V4), ("192.0.2.1", V4)])
def test_addresses_that_are_not_known_are_those_of_the_connection(visitor: str, local: str) -> None:
    headers = ProxyHeaders("v2", "web")
    for header in (headers.of_connection(visitor, local), headers.of_datagram(visitor, local)):
        read = parse(header)
        assert not read.proxied


def test_off_has_no_headers() -> None:
    headers = ProxyHeaders("off", "web")
    assert headers.of_connection(V4, V4) == headers.of_datagram(V4, V4) == b""

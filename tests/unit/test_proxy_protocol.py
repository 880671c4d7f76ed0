"""The headers of the PROXY protocol, as an independent parser reads them."""

from __future__ import annotations

import socket
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from proxyprotocol.result import ProxyResultIPv4, ProxyResultIPv6
from proxyprotocol.tlv import ProxyProtocolTLV
from proxyprotocol.v1 import ProxyProtocolV1
from proxyprotocol.v2 import ProxyProtocolV2

from nodepass.errors import ProxyHeaderError
from nodepass.wire.proxy_protocol import (
    CRC32C,
    LONGEST,
    TUNNEL_NAME,
    Ends,
    ProxyHeaders,
    crc32c,
    encode_v1,
    encode_v2,
    find_length,
    parse_header,
)
from tests.support.table import each_row

V4, V6 = "192.0.2.1:51000", "[2001:db8::1]:443"

ends = st.builds(
    Ends,
    st.tuples(st.ip_addresses(), st.integers(0, 65535)),
    st.tuples(st.ip_addresses(), st.integers(0, 65535)),
)
names = st.text(string.ascii_letters + string.digits + "._-", max_size=64)


def parse(header: bytes) -> Any:
    return (ProxyProtocolV2() if header.startswith(b"\r\n") else ProxyProtocolV1()).unpack(header)


@given(ends, st.booleans(), names)
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


@each_row(("visitor", "local"), [("", ""), (V4, ""), ("", V6), ("name:1", V4), ("192.0.2.1", V4)])
def test_addresses_that_are_not_known_are_those_of_the_connection(visitor: str, local: str) -> None:
    headers = ProxyHeaders("v2", "web")
    for header in (headers.of_connection(visitor, local), headers.of_datagram(visitor, local)):
        read = parse(header)
        assert not read.proxied


def test_off_has_no_headers() -> None:
    headers = ProxyHeaders("off", "web")
    assert headers.of_connection(V4, V4) == headers.of_datagram(V4, V4) == b""


# Read


@given(ends, st.booleans(), st.booleans())
def test_headers_of_an_independent_writer_are_read(given_ends: Ends, datagram: bool, has_checksum: bool) -> None:
    same = given_ends.unified()
    family = socket.AF_INET if same.source[0].version == 4 else socket.AF_INET6
    protocol = socket.SOCK_DGRAM if datagram else socket.SOCK_STREAM
    tlv = ProxyProtocolTLV({0x01: b"h2", 0x02: b"host.test"})
    result = ProxyResultIPv4 if family == socket.AF_INET else ProxyResultIPv6
    read = result(same.source, same.destination, protocol=protocol, tlv=tlv)  # type: ignore[arg-type]
    header = ProxyProtocolV2().pack(read)
    if has_checksum:
        header = with_checksum(header)
    plain = plain_ends(given_ends)
    for written in (header, ProxyProtocolV1().pack(read)):
        assert find_length(written + b"behind") == len(written)
        assert parse_header(written) == plain


def plain_ends(given_ends: Ends) -> Ends:
    """The same with IPv4-mapped IPv6 as IPv4."""
    (source, port), (destination, local_port) = given_ends.source, given_ends.destination
    return Ends(
        (getattr(source, "ipv4_mapped", None) or source, port),
        (getattr(destination, "ipv4_mapped", None) or destination, local_port),
    )


def with_checksum(header: bytes) -> bytes:
    """The header with a checksum as its last field."""
    longer = header[:14] + (len(header) - 16 + 7).to_bytes(2, "big") + header[16:] + bytes([CRC32C, 0, 4])
    return longer + crc32c(longer + bytes(4))


def test_the_checksum_is_that_of_rfc_3720() -> None:
    assert crc32c(b"123456789").hex() == "e3069283"
    assert crc32c(bytes(32)).hex() == "8a9136aa"


def test_a_header_that_does_not_fit_its_checksum_is_refused() -> None:
    header = with_checksum(encode_v2(Ends.parse(V4, V4), "web", datagram=False))
    assert parse_header(header) == Ends.parse(V4, V4)
    bent = header.replace(b"web", b"wed")
    twice = with_checksum(header)
    short = encode_v2(Ends.parse(V4, V4), "web", datagram=False).replace(bytes([TUNNEL_NAME]), bytes([CRC32C]))
    for wrong in (bent, twice, short):
        with pytest.raises(ProxyHeaderError, match="checksum"):
            parse_header(wrong)

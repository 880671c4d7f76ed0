"""The PROXY protocol, versions 1 and 2: a header in front of a connection's first byte, or in front of a datagram.

It says which addresses the visitor and its first hop had, to a service that would see only the tunnel's. To and from
bytes, no I/O. A client sends it to its target (`client.launches`, `client.udp_flows`), and a server takes it from
proxies in front of it (`visitors.proxies`).

In version 1 it is a line: `PROXY TCP4 192.0.2.1 198.51.100.1 51000 443` and CR LF. In version 2 it is binary and may
have further fields (TLV); a tunnel's name is in one of type TUNNEL_NAME, a checksum in one of type CRC32C. Where the
addresses are not known, the header says so (UNKNOWN, LOCAL), and the receiver takes those of the connection.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address

from nodepass.errors import ProxyHeaderError

TUNNEL_NAME = 0xE7  # a TLV of the range for own use, 0xE0 to 0xEF: the tunnel's name in ASCII, if it has one
CRC32C = 0x03  # a TLV: the checksum of the header, with zeros in its own place
LONGEST = 16 + 36 + 3 + 64  # bytes of a header that is written here: IPv6 addresses and the longest name
LARGEST = 4096  # bytes of a header that is read, as nginx has it; a visitor's certificate fits in
LONGEST_LINE = 107  # bytes of one of version 1, as its specification has it

_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_LOCAL, _PROXY = 0x20, 0x21  # version 2, command
_FAMILIES = {4: 0x10, 6: 0x20}
_STREAM, _DATAGRAM = 1, 2
_START = struct.Struct(">12sBBH")  # signature, version and command, family and transport, bytes that follow
_PORTS = struct.Struct(">HH")
_TLV = struct.Struct(">BH")  # type, length
_HIGHEST_FAMILY, _HIGHEST_TRANSPORT = 3, 2  # Unix sockets; datagrams
# Bytes of both addresses and their ports, by family; none of an unspecified one.
_SIZES = {0x10: 12, 0x20: 36, 0x30: 216}
_LINE_START = b"PROXY "
_LINE = re.compile(
    rb"PROXY (?:UNKNOWN(?: [^\r\n]*)?|TCP([46]) ([\dA-Fa-f.:]+) ([\dA-Fa-f.:]+) (\d{1,5}) (\d{1,5}))\r\n"
)

IPAddress = IPv4Address | IPv6Address


@dataclass(frozen=True)
class Ends:
    """The two ends of a visitor's connection, or of its datagrams: the visitor, and the address that it spoke to."""

    source: tuple[IPAddress, int]
    destination: tuple[IPAddress, int]

    @classmethod
    def parse(cls, source: str, destination: str) -> Ends | None:
        """Of `ip:port` or `[ip]:port` texts; None where one is no such address."""
        try:
            return cls(_parse(source), _parse(destination))
        except ValueError:
            return None

    def unified(self) -> Ends:
        """The same in one family, as a header has it: IPv4 is mapped into IPv6 where the other end is IPv6."""
        versions = {self.source[0].version, self.destination[0].version}
        if len(versions) == 1:
            return self
        return Ends(_mapped(self.source), _mapped(self.destination))


class ProxyHeaders:
    """The headers that a client sends, by PROXY_PROTOCOL: off, v1 or v2. Version 1 has none for datagrams."""

    def __init__(self, version: str, tunnel: str) -> None:
        """`tunnel`: its name."""
        self._version = version
        self._tunnel = tunnel

    def of_connection(self, visitor: str, local: str) -> bytes:
        """In front of a connection's first byte; the addresses are `ip:port`, empty where they are not known."""
        if self._version == "off":
            return b""
        ends = Ends.parse(visitor, local)
        return encode_v1(ends) if self._version == "v1" else encode_v2(ends, self._tunnel, datagram=False)

    def of_datagram(self, visitor: str, local: str) -> bytes:
        """In front of each datagram."""
        return encode_v2(Ends.parse(visitor, local), self._tunnel, datagram=True) if self._version == "v2" else b""


def encode_v1(ends: Ends | None) -> bytes:
    """The header of a TCP connection; None: the addresses are not known."""
    if ends is None:
        return b"PROXY UNKNOWN\r\n"
    ends = ends.unified()
    (source, port), (destination, local_port) = ends.source, ends.destination
    return f"PROXY TCP{source.version} {source} {destination} {port} {local_port}\r\n".encode()


def encode_v2(ends: Ends | None, tunnel: str, datagram: bool) -> bytes:
    """The header of a TCP connection or of a datagram, with the tunnel's name; None: the addresses are not known."""
    name = tunnel.encode()
    fields = _TLV.pack(TUNNEL_NAME, len(name)) + name if name else b""
    if ends is None:
        return _START.pack(_SIGNATURE, _LOCAL, 0, len(fields)) + fields
    ends = ends.unified()
    (source, port), (destination, local_port) = ends.source, ends.destination
    family = _FAMILIES[source.version] | (_DATAGRAM if datagram else _STREAM)
    body = source.packed + destination.packed + _PORTS.pack(port, local_port) + fields
    return _START.pack(_SIGNATURE, _PROXY, family, len(body)) + body


def find_length(start: bytes) -> int:
    """The length of the header that a connection begins with; 0 where these bytes do not say it yet.

    Raises ProxyHeaderError where they cannot be the start of one.
    """
    if _SIGNATURE.startswith(start[: len(_SIGNATURE)]):
        if len(start) < _START.size:
            return 0
        length: int = _START.size + _START.unpack_from(start)[3]
        if length > LARGEST:
            raise _malformed(f"a header of {length} bytes; allowed: up to {LARGEST}")
        return length
    if not _LINE_START.startswith(start[: len(_LINE_START)]):
        raise ProxyHeaderError("header_missing", "the first bytes are not those of a header")
    length = start.find(b"\n", 0, LONGEST_LINE) + 1
    if not length and len(start) >= LONGEST_LINE:
        raise _malformed(f"a line of more than {LONGEST_LINE} bytes")
    return length


def parse_header(header: bytes) -> Ends | None:
    """The ends that a whole header has, IPv4-mapped IPv6 as IPv4; None: those of the connection count.

    Raises ProxyHeaderError.
    """
    return _parse_v2(header) if header.startswith(_SIGNATURE) else _parse_line(header)


def split_datagram(datagram: bytes) -> tuple[Ends | None, bytes]:
    """The ends, as `parse_header`, and the payload of a datagram, whose header is of version 2.

    Raises ProxyHeaderError.
    """
    if not datagram.startswith(_SIGNATURE):
        raise ProxyHeaderError("header_missing", "the datagram does not begin with a header of version 2")
    length = find_length(datagram)
    if not length or len(datagram) < length:
        raise _malformed("the datagram ends within its header")
    return _parse_v2(datagram[:length]), datagram[length:]


def _parse_line(line: bytes) -> Ends | None:
    match = _LINE.fullmatch(line)
    if not match:
        raise _malformed("not a line of version 1")
    if not match[1]:
        return None
    kind = IPv4Address if match[1] == b"4" else IPv6Address
    try:
        source, destination = kind(match[2].decode()), kind(match[3].decode())
    except ValueError:
        raise _malformed("an address that is not of its family") from None
    port, local_port = int(match[4]), int(match[5])
    if max(port, local_port) > 0xFFFF:
        raise _malformed("a port above 65535")
    return Ends((_plain(source), port), (_plain(destination), local_port))


def _parse_v2(header: bytes) -> Ends | None:
    _, command, family, _ = _START.unpack_from(header)
    if command not in (_LOCAL, _PROXY):
        raise _malformed(f"version and command {command:#04x}")
    if family >> 4 > _HIGHEST_FAMILY or family & 15 > _HIGHEST_TRANSPORT:
        raise _malformed(f"family and transport {family:#04x}")
    if command == _LOCAL:
        return None  # the rest means nothing then
    family &= 0xF0
    size = _SIZES.get(family, 0)
    body = header[_START.size :]
    if len(body) < size:
        raise _malformed(f"{len(body)} bytes behind its start, which its addresses do not fit in")
    _check_fields(header, _START.size + size)
    if family not in _FAMILIES.values():
        return None
    port, local_port = _PORTS.unpack_from(body, size - _PORTS.size)
    width = (size - _PORTS.size) // 2
    return Ends((_plain(ip_address(body[:width])), port), (_plain(ip_address(body[width : 2 * width])), local_port))


def _check_fields(header: bytes, place: int) -> None:
    """Raise ProxyHeaderError where the fields from `place` on do not end with the header, or its checksum is wrong."""
    checksum = 0  # its place
    while place < len(header):
        if len(header) - place < _TLV.size:
            raise _malformed("a field is cut short")
        kind, length = _TLV.unpack_from(header, place)
        place += _TLV.size
        if kind == CRC32C:
            if checksum or length != 4:
                raise _malformed("not one checksum of 4 bytes")
            checksum = place
        place += length
    if place > len(header):
        raise _malformed("a field is longer than the header")
    if checksum and crc32c(header[:checksum] + bytes(4) + header[checksum + 4 :]) != header[checksum : checksum + 4]:
        raise _malformed("wrong checksum")


def crc32c(data: bytes) -> bytes:
    """The checksum of Castagnoli, as the field has it. A byte takes 0.2 microseconds."""
    table, crc = _crc_table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return (crc ^ 0xFFFFFFFF).to_bytes(4, "big")


@cache
def _crc_table() -> Sequence[int]:
    """What each byte does to the checksum; made only where a header has one."""
    table = list(range(256))
    for _ in range(8):
        table = [(each >> 1) ^ (0x82F63B78 if each & 1 else 0) for each in table]
    return table


def _malformed(words: str) -> ProxyHeaderError:
    return ProxyHeaderError("header_malformed", words)


def _plain(address: IPAddress) -> IPAddress:
    """IPv4-mapped IPv6 as IPv4."""
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


def _parse(text: str) -> tuple[IPAddress, int]:
    """`ip:port` or `[ip]:port`, each part of which is checked; quicker than what a user writes, once a session."""
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 0xFFFF):
        raise ValueError("not a port")
    return _parse_host(host), int(port)


@lru_cache(maxsize=512)  # ipaddress takes 20 us; 100 KiB
def _parse_host(host: str) -> IPAddress:
    if host.startswith("[") and host.endswith("]"):
        return IPv6Address(host[1:-1])
    return IPv4Address(host)


def _mapped(end: tuple[IPAddress, int]) -> tuple[IPAddress, int]:
    address, port = end
    return (IPv6Address(f"::ffff:{address}") if address.version == 4 else address), port

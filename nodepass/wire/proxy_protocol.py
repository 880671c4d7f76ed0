"""The PROXY protocol, versions 1 and 2: a header in front of a connection's first byte, or in front of a datagram.

It says which addresses the visitor and its first hop had, to a service that would see only the tunnel's. To and from
bytes, no I/O. A client sends it to its target (`client.launches`, `client.udp_flows`).

In version 1 it is a line: `PROXY TCP4 192.0.2.1 198.51.100.1 51000 443` and CR LF. In version 2 it is binary and may
have further fields (TLV); a tunnel's name is in one of type TUNNEL_NAME. Where the addresses are not known, the header
says so (UNKNOWN, LOCAL), and the receiver takes those of the connection.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from nodepass.config.hostport import split_host_port

TUNNEL_NAME = 0xE7  # a TLV of the range for own use, 0xE0 to 0xEF: the tunnel's name in ASCII, if it has one
LONGEST = 16 + 36 + 3 + 64  # bytes of a header that is written here: IPv6 addresses and the longest name

_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_LOCAL, _PROXY = 0x20, 0x21  # version 2, command
_FAMILIES = {4: 0x10, 6: 0x20}
_STREAM, _DATAGRAM = 1, 2
_START = struct.Struct(">12sBBH")  # signature, version and command, family and transport, bytes that follow
_PORTS = struct.Struct(">HH")
_TLV = struct.Struct(">BH")  # type, length

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


def _parse(text: str) -> tuple[IPAddress, int]:
    host, port = split_host_port(text)
    return ip_address(host), port


def _mapped(end: tuple[IPAddress, int]) -> tuple[IPAddress, int]:
    address, port = end
    return (IPv6Address(f"::ffff:{address}") if address.version == 4 else address), port

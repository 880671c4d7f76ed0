"""UDP sockets: datagrams answered from the address they were sent to, and sockets connected to one endpoint."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import Any

from nodepass.net.sockets import Endpoint, format_sockaddr

IP_PKTINFO = 8  # <linux/in.h>; the standard library names it from Python 3.14 on
_IN_PKTINFO = struct.Struct("@i4s4s")  # interface index, local address, header destination
_IN6_PKTINFO = struct.Struct("@16si")  # local address, interface index


@dataclass(frozen=True)
class ReplyAddress:
    """Where a datagram came from and which local address it was sent to: what the answer must swap."""

    sockaddr: tuple[Any, ...]
    control: tuple[tuple[int, int, bytes], ...]

    def __str__(self) -> str:
        return format_sockaddr(self.sockaddr)


def receive_datagram(sock: socket.socket) -> tuple[bytes, ReplyAddress]:
    """One datagram of any size. What is cut short of what is said beside it is left out: routing chooses then."""
    payload, ancillary, _, sockaddr = sock.recvmsg(65536, 64)
    control: list[tuple[int, int, bytes]] = []
    for level, kind, data in ancillary:
        if (level, kind, len(data)) == (socket.IPPROTO_IP, IP_PKTINFO, _IN_PKTINFO.size):
            _, local, _ = _IN_PKTINFO.unpack(data)
            control.append((level, kind, _IN_PKTINFO.pack(0, local, bytes(4))))
        elif (level, kind, len(data)) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, _IN6_PKTINFO.size):
            local, interface = _IN6_PKTINFO.unpack(data)
            # Only a link-local address needs its interface; elsewhere routing chooses.
            control.append((level, kind, _IN6_PKTINFO.pack(local, interface if local[:2] == b"\xfe\x80" else 0)))
    return payload, ReplyAddress(sockaddr, tuple(control))


def send_datagram(sock: socket.socket, payload: bytes, visitor: ReplyAddress) -> None:
    """Answer a visitor from the address it spoke to. Raises OSError."""
    sock.sendmsg([payload], visitor.control, 0, visitor.sockaddr)


def dial_udp(endpoint: Endpoint) -> socket.socket:
    """A UDP socket connected to an endpoint, so that only its answers arrive and its refusals are heard."""
    sock = socket.socket(endpoint.family, socket.SOCK_DGRAM)
    try:
        sock.connect(endpoint.sockaddr)
    except OSError:
        sock.close()
        raise
    return sock

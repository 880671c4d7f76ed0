"""UDP sockets: datagrams answered from the address they were sent to, and sockets connected to one endpoint.

A host with several addresses must answer from the one that the peer has spoken to, so the kernel reports it beside each
datagram (IP_PKTINFO, which `listen.listen_udp` switches on), and the answer states it. The sockets are the standard
library's, which gevent has patched: `receive_datagram` suspends its greenlet only. Errors are OSErrors.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import Any

from nodepass.net.sockets import Endpoint, format_sockaddr

IP_PKTINFO = 8  # <linux/in.h>; in the standard library from Python 3.14 on
LARGEST = 65536  # bytes: more than any datagram has
_IN_PKTINFO = struct.Struct("@i4s4s")  # interface index, local address, header destination
_IN6_PKTINFO = struct.Struct("@16si")  # local address, interface index
_CONTROL = 64  # bytes of control data that fit beside a datagram


@dataclass(frozen=True)
class ReplyAddress:
    """Where a datagram came from, and the local address it was sent to: an answer goes the other way."""

    sockaddr: tuple[Any, ...]
    control: tuple[tuple[int, int, bytes], ...]

    def __str__(self) -> str:
        return format_sockaddr(self.sockaddr)

    def local(self, port: int) -> tuple[object, ...]:
        """The local address, as far as the kernel has reported it, with this port."""
        for level, _, data in self.control:
            if level == socket.IPPROTO_IP:
                return socket.inet_ntop(socket.AF_INET, _IN_PKTINFO.unpack(data)[1]), port
            return socket.inet_ntop(socket.AF_INET6, _IN6_PKTINFO.unpack(data)[0]), port
        return "::", port


def receive_datagram(sock: socket.socket) -> tuple[bytes, ReplyAddress]:
    """Wait for one datagram of any size. Raises OSError.

    Control data that is cut short or of another kind is left out; then routing chooses the address of the answer.
    """
    payload, ancillary, _, sockaddr = sock.recvmsg(LARGEST, _CONTROL)
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


def send_datagram(sock: socket.socket, payload: bytes, to: ReplyAddress) -> None:
    """Answer a peer from the address that it has spoken to. Raises OSError."""
    sock.sendmsg([payload], to.control, 0, to.sockaddr)


def dial_udp(endpoint: Endpoint) -> socket.socket:
    """A UDP socket connected to an endpoint: only its answers arrive, and its refusals are errors. Raises OSError."""
    sock = socket.socket(endpoint.family, socket.SOCK_DGRAM)
    try:
        sock.connect(endpoint.sockaddr)
    except OSError:
        sock.close()
        raise
    return sock

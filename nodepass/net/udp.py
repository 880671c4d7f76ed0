"""UDP sockets: datagrams answered from the address they were sent to, and sockets connected to one endpoint.

A host with several addresses must answer from the one that the peer has spoken to, so the kernel reports it beside each
datagram (IP_PKTINFO, which `listen.listen_udp` switches on), and the answer states it. The sockets are the standard
library's, which gevent has patched: `receive_datagram` suspends its greenlet only. Errors are OSErrors.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import Any, ClassVar

from gevent.socket import wait_read

from nodepass.net.sockets import Bind, Endpoint, format_sockaddr, plain_host

IP_PKTINFO = 8  # <linux/in.h>; in the standard library from Python 3.14 on
LARGEST = 65536  # bytes: more than any datagram has
_IN_PKTINFO = struct.Struct("@i4s4s")  # interface index, local address, header destination
_IN6_PKTINFO = struct.Struct("@16si")  # local address, interface index
# <linux/in.h>, <linux/in6.h>: an ICMP error of an unconnected socket is an error of its next call.
_REPORTS_ERRORS: dict[int, tuple[int, int]] = {
    socket.AF_INET: (socket.IPPROTO_IP, 11),
    socket.AF_INET6: (socket.IPPROTO_IPV6, 25),
}
STRAYS_PER_TURN = 64  # datagrams of other hosts that are left out in a row, before others get their turn
_CONTROL = 64  # bytes of control data that fit beside a datagram


@dataclass(frozen=True)
class ReplyAddress:
    """Where a datagram came from, and the local address it was sent to: an answer goes the other way."""

    sockaddr: tuple[Any, ...]
    control: tuple[tuple[int, int, bytes], ...]
    via: ClassVar[ReplyAddress | None] = None  # where an answer goes instead

    def __str__(self) -> str:
        return format_sockaddr(self.sockaddr)

    def local(self, port: int) -> tuple[object, ...]:
        """The local address, as far as the kernel has reported it, with this port."""
        for level, _, data in self.control:
            if level == socket.IPPROTO_IP:
                return socket.inet_ntop(socket.AF_INET, _IN_PKTINFO.unpack(data)[1]), port
            return socket.inet_ntop(socket.AF_INET6, _IN6_PKTINFO.unpack(data)[0]), port
        return "::", port


@dataclass(frozen=True)
class ProxiedAddress(ReplyAddress):
    """The same of a datagram that a proxy has passed on, as its header has it: the answer goes to the proxy."""

    destination: tuple[Any, ...]
    via: ReplyAddress = field(compare=False)  # type: ignore[misc]  # one proxy may use several sockets for a visitor

    def local(self, port: int) -> tuple[object, ...]:  # noqa: ARG002
        """The address that the visitor has sent it to."""
        return self.destination


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


def send_datagram(sock: socket.socket, payload: bytes, to: ReplyAddress, blocking: bool = True) -> None:
    """Answer a peer from the address that it has spoken to. Raises OSError, BlockingIOError if it must not wait."""
    to = to.via or to
    sock.sendmsg([payload], to.control, 0 if blocking else socket.MSG_DONTWAIT, to.sockaddr)


def dial_udp(endpoint: Endpoint, blocking: bool = True, bind: Bind | None = None) -> socket.socket:
    """A UDP socket connected to an endpoint: only its answers arrive, and its refusals are errors. Raises OSError.

    `blocking`: whether its calls wait, in greenlets; a callback of the event loop must not. `bind`: as of `dial`.
    """
    sock = socket.socket(endpoint.family, socket.SOCK_DGRAM)
    try:
        if bind:
            bind(sock)
        sock.connect(endpoint.sockaddr)
    except OSError:
        sock.close()
        raise
    sock.setblocking(blocking)
    return sock


class AnyPort:
    """A UDP socket that speaks with one host, at the port that it last answered from, at first the endpoint's.

    For services that answer a question from a new port, at which they then expect the rest of the conversation, such as
    TFTP. Datagrams of other hosts are left out, as a connected socket does. A refusal is an error, and after it the
    endpoint's own port is used again. Reads never block. Errors are OSErrors.
    """

    def __init__(self, endpoint: Endpoint, bind: Bind | None = None) -> None:
        """`bind`: as of `dial`."""
        dial_udp(endpoint, bind=bind).close()  # without a route, this raises
        self._endpoint = endpoint
        self._peer = endpoint.sockaddr
        self._sock = socket.socket(endpoint.family, socket.SOCK_DGRAM)
        if bind:
            bind(self._sock)
        self._sock.setblocking(False)
        level, option = _REPORTS_ERRORS[self._sock.family]
        with contextlib.suppress(OSError):  # not everywhere, as in gVisor: then a refusal is silence
            self._sock.setsockopt(level, option, 1)

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    def send(self, payload: bytes) -> int:
        try:
            return self._sock.sendto(payload, self._peer)
        except ConnectionRefusedError:
            self._go_back()
            raise

    def recv(self, size: int) -> bytes:
        """The next datagram of the host. Raises BlockingIOError where there is none, or others' only for the moment."""
        for _ in range(STRAYS_PER_TURN):
            try:
                payload, source = self._sock.recvfrom(size)
            except BlockingIOError:
                raise
            except OSError:
                self._go_back()
                raise
            if plain_host(source) == self._endpoint.host:
                self._peer = source
                return payload
        raise BlockingIOError

    def wait(self, timeout: float) -> bytes:
        """As `recv`; waits for a datagram. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            wait_read(self.fileno(), left, TimeoutError())
            with contextlib.suppress(BlockingIOError):
                return self.recv(LARGEST)
        raise TimeoutError

    def _go_back(self) -> None:
        """Take the kernel's reports of errors, which keep the socket readable, and begin at the endpoint again."""
        self._peer = self._endpoint.sockaddr
        with contextlib.suppress(BlockingIOError):
            while True:
                self._sock.recvmsg(0, _CONTROL, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)

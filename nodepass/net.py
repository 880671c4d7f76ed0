"""Sockets: resolving, dialling, options, and the stream interface that the rest of the program moves bytes with.

Knows the kernel and nothing of tunnels. Sockets are the standard library's, which gevent has patched: a call that looks
blocking suspends its greenlet only. Errors are OSErrors.
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import gevent

from nodepass.errors import ClosedError
from nodepass.urls import Address

KEEPALIVE = (30, 10, 3)  # seconds idle, seconds between probes, probes: a vanished peer is found in a minute
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER with no time: close sends RST
_GRACEFUL = struct.pack("ii", 0, 0)
_MOST_KEEPALIVE = 32767  # seconds: the kernel takes no more (MAX_TCP_KEEPIDLE)
_TCP_ESTABLISHED = 1  # tcpi_state of a connection that both ends hold open
_TCP_CLOSE = 7  # tcpi_state of a connection that is gone
_LAST_ACK = struct.Struct("@56xI")  # tcpi_last_ack_recv: milliseconds since an acknowledgement came
_UNACKED = struct.Struct("@24xI")  # tcpi_unacked in struct tcp_info


@dataclass(frozen=True)
class Endpoint:
    """A resolved address: what connect(2) and bind(2) take."""

    family: int
    sockaddr: tuple[Any, ...]

    def __str__(self) -> str:
        return format_sockaddr(self.sockaddr)

    def with_port(self, port: int) -> Endpoint:
        """The same host, another port."""
        host, _, *rest = self.sockaddr
        return Endpoint(self.family, (host, port, *rest))


def format_sockaddr(sockaddr: Sequence[object]) -> str:
    """An address for people: IPv4 as IPv4 even when it came in on a dual-stack socket."""
    host = plain_host(sockaddr)
    return f"[{host}]:{sockaddr[1]}" if ":" in host else f"{host}:{sockaddr[1]}"


def plain_host(sockaddr: Sequence[object]) -> str:
    """The host of an address, IPv4-mapped IPv6 as IPv4: what two connections of one peer have in common."""
    return str(sockaddr[0]).removeprefix("::ffff:")


def resolve(address: Address, kind: int = socket.SOCK_STREAM) -> list[Endpoint]:
    """The endpoints of an address, best first; an empty host is this machine. Raises OSError naming the host."""
    try:
        found = socket.getaddrinfo(address.host or "localhost", address.port, 0, kind)
    except (OSError, UnicodeError) as error:
        raise OSError(f"cannot resolve {address.host!r}: {reason(error)}") from None
    return [Endpoint(family, sockaddr) for family, _, _, _, sockaddr in found]


def reason(error: BaseException) -> str:
    """The short words of an error, for the end of a log line."""
    if isinstance(error, OSError) and error.strerror:
        return str(error.strerror)
    return str(error) or type(error).__name__


def dial(endpoints: Sequence[Endpoint], timeout: float) -> socket.socket:
    """A TCP connection to the first endpoint that answers, all within `timeout` seconds.

    Raises OSError naming the last tried.
    """
    failure = OSError("no address to connect to")
    deadline = time.monotonic() + timeout
    for left, endpoint in zip(range(len(endpoints), 0, -1), endpoints, strict=True):
        share = max(0.001, deadline - time.monotonic()) / left
        sock = socket.socket(endpoint.family, socket.SOCK_STREAM)
        try:
            sock.settimeout(share)
            sock.connect(endpoint.sockaddr)
            sock.settimeout(None)
            set_stream_options(sock)
            return sock
        except TimeoutError:
            failure = TimeoutError(f"{endpoint}: no answer within {share:.3g}s")
        except OSError as error:
            failure = OSError(f"{endpoint}: {reason(error)}")
        except BaseException:
            sock.close()
            raise
        sock.close()
    raise failure


def dial_udp(endpoint: Endpoint) -> socket.socket:
    """A UDP socket connected to an endpoint, so that only its answers arrive and its refusals are heard."""
    sock = socket.socket(endpoint.family, socket.SOCK_DGRAM)
    try:
        sock.connect(endpoint.sockaddr)
    except OSError:
        sock.close()
        raise
    return sock


def stalled(sock: socket.socket, seconds: float) -> bool:
    """Whether something sent has gone without any acknowledgement for so long (TCP_INFO), or the connection is over."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    unacknowledged, milliseconds = _UNACKED.unpack_from(info)[0], _LAST_ACK.unpack_from(info)[0]
    return info[0] != _TCP_ESTABLISHED or bool(unacknowledged and milliseconds > 1000 * seconds)


def set_stream_options(sock: socket.socket) -> None:
    """No Nagle delay, and keepalive probes that also hold a NAT's mapping open."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    set_keepalive(sock, *KEEPALIVE)


def set_keepalive(sock: socket.socket, idle: int, interval: int, probes: int) -> None:
    """Probe a silent peer after `idle` seconds, every `interval` seconds, and give it up after so many probes."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, probes)


def bound_failure_detection(sock: socket.socket, seconds: float) -> None:
    """Let the kernel give up a peer that acknowledges nothing for about so many seconds, also while we are silent."""
    step = min(max(1, round(seconds / 3)), _MOST_KEEPALIVE)
    set_keepalive(sock, step, step, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, min(max(1, round(seconds * 1000)), 2**31 - 1))


def acknowledged(sock: socket.socket) -> bool | None:
    """Whether the peer's kernel has acknowledged all that was sent (TCP_INFO); None where the connection is over."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return not _UNACKED.unpack_from(info)[0] if info[0] == _TCP_ESTABLISHED else None


class Stream(Protocol):
    """What a data connection, a visitor and a target connection have in common; plain here, under TLS in `tls`."""

    sock: socket.socket

    @property
    def batch(self) -> int:
        """Bytes per read and write that move this kind of stream fastest, by measurement."""

    def recv_into(self, buffer: memoryview) -> int:
        """Wait for bytes; 0 at the end of the stream. No switch to other greenlets between the read and the return."""

    def write(self, data: memoryview | bytes) -> None:
        """Send all of it. `data` is not looked at after the first switch, so it may be a buffer that others share."""

    def half_close(self) -> None:
        """Say that no more bytes follow; the other direction goes on."""

    def peek(self) -> bool | None:
        """None: open and nothing to read. True: bytes wait. False: closed or broken. Never blocks."""

    def close(self) -> None:
        """Close; bytes already written are still delivered."""

    def abort(self) -> None:
        """Close with a reset, so that the peer cannot take a cut stream for a whole one."""


class TCPStream:
    """A plain connection."""

    __slots__ = ("_raw", "sock")

    batch = 256 * 1024

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        # The non-blocking socket below gevent's: gevent's own methods wait even when MSG_DONTWAIT says not to.
        self._raw: socket.socket = cast(Any, sock)._sock

    def recv_into(self, buffer: memoryview) -> int:
        return self.sock.recv_into(buffer)

    def write(self, data: memoryview | bytes) -> None:
        try:
            sent = self._raw.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self.sock.sendall(bytes(data[sent:]))

    def half_close(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def peek(self) -> bool | None:
        try:
            return bool(self._raw.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return None
        except OSError:
            return False

    def close(self) -> None:
        self.sock.close()

    def abort(self) -> None:
        reset(self.sock)


def reset(sock: socket.socket) -> None:
    """Close a connection with a TCP reset; nothing where it is closed already."""
    reset_on_close(sock, True)
    sock.close()


def reset_on_close(sock: socket.socket, on: bool) -> None:
    """Whether closing is a reset, also when it is the kernel that closes because the process is gone."""
    if sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET if on else _GRACEFUL)


def end_reading(sock: socket.socket) -> None:
    """Let reads return what has arrived and then the end of the stream, so that nobody waits on a dead connection."""
    with contextlib.suppress(OSError):  # not connected any more: reads end by themselves
        sock.shutdown(socket.SHUT_RD)


def wait_delivered(sock: socket.socket, seconds: float) -> None:
    """Wait until the peer has acknowledged all that was written, or the connection is gone; at most `seconds`."""
    deadline = time.monotonic() + seconds
    while sock.fileno() >= 0 and _unsent(sock) and time.monotonic() < deadline:
        gevent.sleep(0.01)  # the kernel has no event for this


def _unsent(sock: socket.socket) -> int:
    """Bytes not yet acknowledged (SIOCOUTQ); none on a connection that is gone, for they will never be."""
    state = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    if state == _TCP_CLOSE:
        return 0
    return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))[0])


def recv_exactly(stream: Stream, size: int) -> bytes:
    """Read so many bytes. Raises ConnectionError when the stream ends before."""
    data = bytearray(size)
    view = memoryview(data)
    done = 0
    while done < size:
        received = stream.recv_into(view[done:])
        if not received:
            raise ClosedError(f"closed by the peer after {done} of {size} bytes")
        done += received
    return bytes(data)

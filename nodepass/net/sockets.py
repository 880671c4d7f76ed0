"""Sockets: addresses and their resolution, dialling, options, and what TCP_INFO says about a connection.

This module knows the kernel and nothing about tunnels or streams. Two kinds of socket are in use:

* Listeners, control connections and UDP use the standard library's socket, which gevent has patched: a call that looks
  blocking suspends its greenlet only.
* A connection that carries a session is a `Socket`, the non-blocking one below it, and `stream` does the waiting. It
  costs a third of the time and half of the memory.

Accepted connections inherit their keepalive probes from the listener. A dialled connection gets them after it has
lasted a moment: most are closed long before a probe is due, and the four system calls are a tenth of what a short
session costs. Errors are OSErrors and keep their errno, also where they get other words.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import fcntl
import os
import socket
import struct
import termios
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gevent
from gevent.monkey import get_original
from gevent.socket import wait_write

from nodepass.config.urls import Address
from nodepass.errors import reason, with_words
from nodepass.tasks import IdleTimer

Socket = _socket.socket  # gevent does not patch it
Bind = Callable[[Any], object]  # of a new socket; raises OSError
_poll = get_original("select", "poll")  # gevent's would switch to other greenlets

LOCAL = "localhost"  # what an empty host is, to connect to
LOOKUP_TIMEOUT = 5.0  # seconds after which a lookup counts as failed; resolv.conf's default for one question
KEEPALIVE = 15.0  # seconds to the first keepalive probe and between probes; firewalls forget after 20 to 30 s at worst
PROBES = 3  # without an answer, after which the peer is gone: it is found in a minute
LASTS = 1.0  # seconds between looks at dialled connections; far less than the time to the first probe

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: close sends RST
_GRACEFUL = struct.pack("ii", 0, 0)
_MOST_KEEPALIVE = 32767  # seconds: the kernel's limit (MAX_TCP_KEEPIDLE)
_MOST_PROBES = 127  # likewise (MAX_TCP_KEEPCNT)
_TCP_ESTABLISHED = 1  # tcpi_state of a connection that both ends hold open
_TCP_CLOSE = 7  # tcpi_state of a connection that is gone
_UNACKED = struct.Struct("@24xI")  # tcpi_unacked: segments that the peer has not acknowledged
_LAST_ACK = struct.Struct("@56xI")  # tcpi_last_ack_recv: milliseconds since the last acknowledgement
_LAST_DATA = struct.Struct("@52xI")  # tcpi_last_data_recv: milliseconds since the last bytes, or since the beginning
_SO_MEMINFO = 55  # since Linux 4.12; not in the standard library
_MEMINFO = struct.Struct("@8xII4xI")  # SK_MEMINFO_WMEM_ALLOC, _SNDBUF, _WMEM_QUEUED: bytes of kernel memory
_TCP_INFO_SIZE = 104  # bytes of struct tcp_info that all supported kernels have
_TCP_INFO = struct.Struct("@B15xI4xI28xI60xQ16xI80xI")  # those and others that `TCPInfo` has, up to tcpi_snd_wnd


class Endpoint(NamedTuple):
    """A resolved address: what connect(2) and bind(2) take. Of a visitor on a Unix socket it is the listener's path."""

    family: int
    sockaddr: tuple[Any, ...]

    def __str__(self) -> str:
        return f"unix:{self.sockaddr[0]}" if self.family == socket.AF_UNIX else format_sockaddr(self.sockaddr)

    @property
    def host(self) -> str:
        """The address without its port: the same for all connections of one peer; "" of a Unix socket."""
        return "" if self.family == socket.AF_UNIX else plain_host(self.sockaddr)

    def has_host_of(self, other: Endpoint) -> bool:
        """Whether both are at one host; most are by the same text."""
        return self.sockaddr[0] == other.sockaddr[0] or self.host == other.host

    def with_port(self, port: int) -> Endpoint:
        """The same host, another port."""
        host, _, *rest = self.sockaddr
        return Endpoint(self.family, (host, port, *rest))


def format_sockaddr(sockaddr: Sequence[object]) -> str:
    """An address for the log: IPv4 as IPv4, also where it came in on a dual-stack socket."""
    host = plain_host(sockaddr)
    return f"[{host}]:{sockaddr[1]}" if ":" in host else f"{host}:{sockaddr[1]}"


def format_without_zone(sockaddr: Sequence[Any]) -> str:
    """As `format_sockaddr`, without the zone of a link-local address, which means nothing on another machine."""
    host = str(sockaddr[0])
    return format_sockaddr((host.partition("%")[0], sockaddr[1])) if ":" in host else f"{host}:{sockaddr[1]}"


def plain_host(sockaddr: Sequence[object]) -> str:
    """The host of an address, IPv4-mapped IPv6 as IPv4."""
    host = str(sockaddr[0])
    plain = host.removeprefix("::ffff:")
    return host if ":" in plain else plain  # ::ffff:0:192.0.2.1 is another one


def network_of(sockaddr: Sequence[object]) -> str:
    """The network of an address, as far as one peer is likely to have all of it: an IPv4 /24, an IPv6 /64."""
    host = plain_host(sockaddr)
    if ":" not in host:
        return f"{host.rpartition('.')[0]}.0/24"
    prefix = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])[:8]
    return f"{socket.inet_ntop(socket.AF_INET6, prefix + bytes(8))}/64"


def resolve(address: Address) -> list[Endpoint]:
    """The endpoints of an address, best first; an empty host is this machine. Raises OSError.

    Lookups take LOOKUP_TIMEOUT seconds at most. An address is its own answer.
    """
    if found := endpoint_of(address):
        return [found]
    with gevent.Timeout(LOOKUP_TIMEOUT, lookup_late(address.host or LOCAL, LOOKUP_TIMEOUT)):
        return look_up(address)


def look_up(address: Address) -> list[Endpoint]:
    """As `resolve`, for as long as the resolver takes; the host is looked up even where it is an address."""
    host = address.host or LOCAL
    try:
        # Encoded here: in its resolver's thread, gevent would print a traceback if the name cannot be encoded.
        found = socket.getaddrinfo(host.encode("ascii"), address.port, 0, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise with_words(error, f"cannot resolve {host!r}: {reason(error)}") from None
    return list(dict.fromkeys(Endpoint(family, sockaddr) for family, _, _, _, sockaddr in found))


def lookup_late(host: str, seconds: float) -> OSError:
    """The error where a lookup has not ended within so many seconds."""
    return TimeoutError(errno.ETIMEDOUT, f"cannot resolve {host!r}: no answer within {seconds:g}s")


def endpoint_of(address: Address) -> Endpoint | None:
    """The endpoint of an address that is written as such; one with a zone is looked up, because links come and go."""
    for family, rest in ((socket.AF_INET, ()), (socket.AF_INET6, (0, 0))):
        with contextlib.suppress(OSError, ValueError):
            socket.inet_pton(family, address.host)
            return Endpoint(family, (address.host, address.port, *rest))
    return None


def dial(endpoints: Sequence[Endpoint], timeout: float, keepalive: float = 0.0, bind: Bind | None = None) -> Socket:
    """Connect to the first endpoint that answers, trying all of them within `timeout` seconds.

    With `keepalive`, in seconds, the connection gets probes if it lasts; `bind` chooses where it comes from. Raises
    OSError, which names the last endpoint tried.
    """
    failure = OSError(errno.EADDRNOTAVAIL, "no address to connect to")
    deadline = time.monotonic() + timeout
    for left, endpoint in zip(range(len(endpoints), 0, -1), endpoints, strict=True):
        share = max(0.001, deadline - time.monotonic()) / left
        sock = Socket(endpoint.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            if bind:
                bind(sock)
            _connect(sock, endpoint, share)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if keepalive:
                keep_alive_if_it_lasts(sock, keepalive)
            return sock
        except TimeoutError:
            failure = TimeoutError(errno.ETIMEDOUT, f"{endpoint}: no answer within {share:.3g}s")
        except OSError as error:
            failure = with_words(error, f"{endpoint}: {reason(error)}")
        except BaseException:
            sock.close()
            raise
        sock.close()
    raise failure


def _connect(sock: Socket, endpoint: Endpoint, timeout: float) -> None:
    error = sock.connect_ex(endpoint.sockaddr)
    if error == errno.EINPROGRESS:
        error = sock.connect_ex(endpoint.sockaddr)  # on loopback it is connected by now, which saves the wait
    if error == errno.EALREADY:
        wait_write(sock.fileno(), timeout, TimeoutError())
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        raise OSError(error, os.strerror(error))


def as_blocking(sock: Socket) -> socket.socket:
    """The same connection as one of gevent's sockets, whose calls suspend the greenlet."""
    return socket.socket(sock.family, sock.type, sock.proto, fileno=sock.detach())


def as_plain(sock: socket.socket) -> Socket:
    """The reverse of `as_blocking`."""
    return Socket(sock.family, sock.type, sock.proto, sock.detach())


def peek_byte(sock: Socket) -> int | None:
    """The first byte that waits to be read; None where none does, -1 where the connection is over."""
    try:
        data = sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return None
    except OSError:
        return -1
    return data[0] if data else -1


def peek_bytes(sock: Socket, size: int) -> bytes:
    """The bytes that wait to be read, `size` of them at most; none where the connection is over."""
    try:
        return sock.recv(size, socket.MSG_PEEK)
    except OSError:
        return b""


def wait_readable(sock: Any) -> None:
    """Wait until there is something to read, at least for one iteration of the event loop. Raises OSError.

    A loop that could go on yields with this and not with `gevent.sleep(0)`, which lets ready greenlets run up to fifty
    times before the event loop looks at its sockets again.
    """
    sock._wait(sock._read_event)


def stalled(sock: Socket, seconds: float) -> bool:
    """Whether sent bytes wait and nothing was acknowledged for `seconds` (TCP_INFO), or the connection is over."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)
    unacknowledged, milliseconds = _UNACKED.unpack_from(info)[0], _LAST_ACK.unpack_from(info)[0]
    return info[0] != _TCP_ESTABLISHED or bool(unacknowledged and milliseconds > 1000 * seconds)


def set_stream_options(sock: Socket, keepalive: float = KEEPALIVE) -> None:
    """Set keepalive probes and no Nagle delay; connections accepted from a listener inherit both."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    set_keepalive(sock, keepalive, PROBES)


def bound_failure_detection(sock: Socket, seconds: float, keepalive: float) -> None:
    """Let the kernel give up a peer that acknowledges nothing for about `seconds`, also while nothing is sent.

    It sends probes at least every `keepalive` seconds, so that no firewall forgets the connection meanwhile.
    """
    step = min(seconds / 3, keepalive)
    set_keepalive(sock, step, min(round(seconds / step) - 1, _MOST_PROBES))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, min(max(1, round(seconds * 1000)), 2**31 - 1))


def acknowledge(sock: Socket) -> None:
    """Acknowledge what has been received at once, where nothing is sent back.

    The kernel takes up to 40 ms for that, and many proxies delay a small packet while the one before is not
    acknowledged (Nagle's algorithm).
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def acknowledged(sock: Socket) -> bool | None:
    """Whether the peer's kernel has acknowledged everything sent (TCP_INFO); None where the connection is over."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)
    return not _UNACKED.unpack_from(info)[0] if info[0] == _TCP_ESTABLISHED else None


def since_last_bytes(sock: Socket) -> float:
    """Seconds since bytes last arrived, or the connection began (TCP_INFO); 0 of a Unix socket, which tells nothing."""
    if sock.family == socket.AF_UNIX:
        return 0.0
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)
    return int(_LAST_DATA.unpack_from(info)[0]) / 1000


def count_waiting(listener: Socket) -> int:
    """How many connections wait in the kernel's queue of a listener (TCP_INFO)."""
    info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)
    return int(_UNACKED.unpack_from(info)[0])


def is_gone(sock: Socket) -> bool:
    """Whether the connection is over: it was reset, the kernel gave it up, or both ends closed it."""
    if sock.family == socket.AF_UNIX:
        return _is_hung_up(sock)
    return bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE)


def pending_error(sock: Socket) -> OSError | None:
    """Why the kernel has ended a connection (SO_ERROR), if no call has reported it yet; none does after this."""
    number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if number == errno.EPIPE:  # of a reset behind the end of the peer's stream
        number = errno.ECONNRESET
    return OSError(number, os.strerror(number)) if number else None


class TCPInfo(NamedTuple):
    """What the kernel knows of a connection (TCP_INFO)."""

    is_gone: bool  # as the function
    waits: bool  # bytes, or the end of the stream, wait for the peer's acknowledgement
    window_is_shut: bool  # the peer's kernel takes less than a segment at present
    silent: float  # seconds since the last acknowledgement, of a probe for example
    acknowledged: int  # bytes, since the connection began


def read_tcp_info(sock: Socket) -> TCPInfo:
    """How the peer's kernel has answered lately. Raises OSError.

    The peer of a Unix socket is on this machine: nothing waits for it to acknowledge, it takes bytes by reading them.
    """
    if sock.family == socket.AF_UNIX:
        return TCPInfo(_is_hung_up(sock), False, False, 0.0, -_unacknowledged(sock))
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    # A kernel before 5.4 does not tell the window, which then counts as shut.
    state, segment, in_flight, milliseconds, acknowledged, unsent, window = _TCP_INFO.unpack(
        info.ljust(_TCP_INFO.size, b"\0")
    )
    # Nothing is in flight either while this machine's own link is down.
    is_shut = not window if in_flight else window < segment
    return TCPInfo(state == _TCP_CLOSE, bool(in_flight or unsent), is_shut, milliseconds / 1000, acknowledged)


def _is_hung_up(sock: Socket) -> bool:
    """Whether the peer of a Unix socket has closed it."""
    asked = _poll()
    asked.register(sock.fileno(), 0)
    return bool(asked.poll(0))


def room_to_send(sock: Socket) -> int:
    """About how many bytes the kernel takes now, rather too few than too many; 0 where it does not tell, as gVisor.

    Its limit is on memory. What a byte takes depends on the peer's window: with a small one most is overhead. So what
    waits to be acknowledged is the measure, and without it a quarter.
    """
    try:
        meminfo = sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)
        allocated, limit, queued = map(int, _MEMINFO.unpack(meminfo))
        if sock.family == socket.AF_UNIX:
            queued = allocated
        waiting = _unacknowledged(sock)
    except OSError:  # also of a connection that is closed, which the next call reports
        return 0
    free = max(0, limit - queued)
    return free * waiting // queued * 15 // 16 if waiting and queued else free // 4


def set_low_water_mark(sock: Socket, size: int) -> None:
    """Have the kernel report bytes to read when there are `size` of them, at the end, or when its buffer is full."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)


def reset_on_close(sock: Socket, on: bool) -> None:
    """Set whether closing is a reset, also where the kernel closes because the process is gone."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET if on else _GRACEFUL)


def end_reading(sock: Socket) -> None:
    """Let reads return what has arrived and then the end of the stream: no read waits on a dead connection."""
    with contextlib.suppress(OSError):  # no longer connected: reads end by themselves
        sock.shutdown(socket.SHUT_RD)


def wait_delivered(sock: Socket, seconds: float) -> None:
    """Wait until the peer has acknowledged everything written, or the connection is gone; at most `seconds`."""
    deadline = time.monotonic() + seconds
    while sock.fileno() >= 0 and _unsent(sock) and time.monotonic() < deadline:
        gevent.sleep(0.01)  # the kernel has no event for this


def _unsent(sock: Socket) -> int:
    """Bytes that are not acknowledged yet (SIOCOUTQ); 0 on a connection that is gone, where they never will be."""
    if is_gone(sock):
        return 0
    return _unacknowledged(sock)


def _unacknowledged(sock: Socket) -> int:
    return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))[0])


def set_keepalive(sock: Socket, seconds: float, probes: int) -> None:
    """Probe a peer that has been silent for `seconds`, as often while it does not answer, and give it up then.

    The kernel knows whole seconds, and at least one.
    """
    step = min(max(1, round(seconds)), _MOST_KEEPALIVE)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, step)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, step)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, probes)


def keep_alive_if_it_lasts(sock: Socket, seconds: float) -> None:
    """Set keepalive probes on a connection within LASTS seconds, unless it is closed by then."""
    _dialled.append((sock, seconds))
    keepalive_timer.start()


def _set_due_keepalives() -> bool:
    for sock, seconds in _dialled:
        with contextlib.suppress(OSError):  # it was reset
            if sock.fileno() >= 0:
                set_keepalive(sock, seconds, PROBES)
    some = bool(_dialled)
    _dialled.clear()
    return some


_dialled: list[tuple[Socket, float]] = []  # since the timer ran last
keepalive_timer = IdleTimer(LASTS, _set_due_keepalives)

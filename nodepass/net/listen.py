"""Listening: TCP and UDP sockets on an address, and the loop that accepts connections.

A socket that systemd passed for an address is taken instead of a new one (see `activation`). The caller closes what it
gets. An error at opening is a `ListenError`, one line for the user, and closes what was opened before it. The listeners
of the server and the metrics endpoint use this; connections are dialled in `sockets`.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterator
from typing import Any

import gevent

from nodepass.config.kinds import Ports
from nodepass.config.urls import Address
from nodepass.errors import ListenError, reason
from nodepass.log import Limit, Log
from nodepass.net.activation import NOTHING, Share, missing_endpoints
from nodepass.net.sockets import (
    KEEPALIVE,
    Endpoint,
    Socket,
    reset_on_close,
    resolve,
    set_stream_options,
    wait_readable,
)
from nodepass.net.udp import IP_PKTINFO

BACKLOG = 4096  # connections; the kernel cuts it to net.core.somaxconn
UDP_QUEUE = 4 << 20  # bytes of datagrams that may wait in the kernel, which cuts it to net.core.rmem_max
ACCEPTS_PER_TURN = 4  # then other greenlets run: the handshake that follows may take half a millisecond
ACCEPT_PAUSES = (0.01, 1.0)  # seconds: first and longest pause after an accept error, which is mostly EMFILE
CHOICES = 10  # attempts at a port that is free for TCP and for UDP, where the kernel chooses it
PRIVILEGED = 1024  # ports below need a privilege
_CLOSED = (errno.EBADF, errno.EINVAL, errno.ENOTSOCK)  # errors of accept on a closed listener


def listen_tcp(
    address: Address, what: str, share: Share = NOTHING, keepalive: float = KEEPALIVE
) -> list[socket.socket]:
    """Listeners on every endpoint of an address; an empty host is one dual-stack socket. Raises ListenError.

    `what` names the address in the error; `keepalive`: seconds between probes, see `sockets`. Accepted connections
    inherit the options set here, which saves their system calls on each one.
    """

    def prepare(listener: socket.socket) -> None:
        set_stream_options(listener, keepalive)
        listener.listen(BACKLOG)

    return _listen_all(address, what, share, socket.SOCK_STREAM, prepare)


def listen_udp(address: Address, what: str, share: Share = NOTHING) -> list[socket.socket]:
    """UDP sockets on every endpoint of an address, which report where a datagram was sent to. Raises ListenError."""

    def prepare(sock: socket.socket) -> None:
        _lengthen_queue(sock)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)

    return _listen_all(address, what, share, socket.SOCK_DGRAM, prepare)


def listen_in_range(
    host: str, ports: Ports, what: str, share: Share = NOTHING, keepalive: float = KEEPALIVE
) -> list[socket.socket]:
    """TCP listeners on the first free port of a range, ports that systemd passed first. Raises ListenError."""
    passed = share.ports(socket.SOCK_STREAM)
    candidates = sorted(range(ports.first, ports.last + 1), key=lambda port: port not in passed)
    for port in candidates:
        try:
            return listen_tcp(Address(host, port), what, share, keepalive)
        except ListenError as error:
            if port == candidates[-1] or error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
    raise AssertionError("a range has at least one port")


def listen_both(
    address: Address,
    what: str,
    share: Share = NOTHING,
    keepalive: float = KEEPALIVE,
    *,
    tcp: bool = True,
    udp: bool = True,
) -> tuple[list[socket.socket], list[socket.socket]]:
    """TCP and UDP sockets on one port, also where the kernel chooses it; none of what is off. Raises ListenError.

    What is accepted here and closed is reset, so that no peer takes that for an empty answer.
    """
    if not tcp:
        return [], listen_udp(address, f"{what} (udp)", share)
    for attempt in range(CHOICES):
        listeners = listen_tcp(address, f"{what} (tcp)", share, keepalive)
        for listener in listeners:
            reset_on_close(listener, True)
        if not udp:
            return listeners, []
        chosen = Address(address.host, port_of(listeners))
        try:
            return listeners, listen_udp(chosen, f"{what} (udp)", share)
        except ListenError:
            close_all(listeners)
            if address.port or attempt == CHOICES - 1:
                raise
    raise AssertionError("the loop returns or raises")


def port_of(listeners: list[socket.socket]) -> int:
    """The port of these sockets, which is the same for all."""
    return int(listeners[0].getsockname()[1])


def close_all(sockets: list[socket.socket]) -> None:
    """Close all of these sockets."""
    for each in sockets:
        each.close()


def _listen_all(
    address: Address, what: str, share: Share, kind: int, prepare: Callable[[socket.socket], None]
) -> list[socket.socket]:
    opened: list[socket.socket] = []
    try:
        endpoints = _listening_endpoints(address)
        opened += share.take(kind, address, endpoints)
        for sock in opened:
            prepare(sock)
        for endpoint in missing_endpoints(address, endpoints, opened):
            try:
                opened.append(_bind(endpoint.with_port(port_of(opened)) if opened else endpoint, kind, prepare))
            except OSError as error:
                # A name may have an address of a family that this machine lacks; one is enough.
                if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL) or not opened:
                    raise
    except OSError as error:
        close_all(opened)
        text = f"cannot listen on {what} {address}: {reason(error)}{_remedy(error, address)}{share.hint()}"
        raise ListenError(text, error.errno, host=address.host, port=address.port, kind=kind) from None
    return opened


def _remedy(error: OSError, address: Address) -> str:
    """What an operator can do about an error of bind(2), for the end of a line."""
    if error.errno == errno.EADDRNOTAVAIL:
        words = f"{address.host} is not an address of this machine (behind NAT, it is the router's)"
        return f"; {words}; :{address.port} listens on all"
    if error.errno == errno.EACCES and 0 < address.port < PRIVILEGED:
        return (
            f"; ports below {PRIVILEGED} need CAP_NET_BIND_SERVICE, a socket unit (contrib/systemd), or the sysctl"
            " net.ipv4.ip_unprivileged_port_start"
        )
    return ""


def _listening_endpoints(address: Address) -> list[Endpoint]:
    if address.host:
        return list(dict.fromkeys(sorted(resolve(address), key=lambda found: found.family)))
    if socket.has_dualstack_ipv6():
        return [Endpoint(socket.AF_INET6, ("::", address.port))]
    return [Endpoint(socket.AF_INET, ("0.0.0.0", address.port))]


def _bind(endpoint: Endpoint, kind: int, prepare: Callable[[socket.socket], None]) -> socket.socket:
    sock = socket.socket(endpoint.family, kind)
    try:
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if endpoint.family == socket.AF_INET6:
            # Only the empty host is dual-stack, so `[::1]` and `127.0.0.1` can both be listened on.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, endpoint.sockaddr[0] != "::")
        sock.bind(endpoint.sockaddr)
        prepare(sock)
    except OSError:
        sock.close()
        raise
    return sock


def _lengthen_queue(sock: socket.socket) -> None:
    """Give a UDP socket the longest queue that the kernel grants, and never a shorter one than systemd gave it."""
    with socket.socket(sock.family, socket.SOCK_DGRAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UDP_QUEUE)
        granted = probe.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    if granted > sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UDP_QUEUE)


def accept_forever(
    listener: socket.socket, log: Log, ready: Callable[[], object] = lambda: None
) -> Iterator[tuple[Socket, Endpoint]]:
    """Accepted connections and their peers, until the listener is closed. `ready` may wait before each is accepted."""
    pause = ACCEPT_PAUSES[0]
    count = 0
    while True:
        ready()
        try:
            if count == ACCEPTS_PER_TURN:
                count = 0
                wait_readable(listener)
            accepted = _accept(listener)
        except OSError as error:
            if listener.fileno() < 0 or error.errno in _CLOSED:
                return
            if error.errno != errno.ECONNABORTED:  # the peer closed it before it was accepted
                words = "cannot accept connections: %(error)s"
                log.warning("accept.failed", words, Limit(error.errno, burst=1), error=reason(error), errno=error.errno)
                gevent.sleep(pause)
                pause = min(2 * pause, ACCEPT_PAUSES[1])
            continue
        pause = ACCEPT_PAUSES[0]
        yield accepted
        count += 1


def accept_waiting(listener: socket.socket, ready: Callable[[], object]) -> Iterator[tuple[Socket, Endpoint]]:
    """Connections that wait in the kernel's queue, up to the first error: closing the listener would reset them."""
    for _ in range(BACKLOG):
        ready()
        try:
            yield _accept_now(listener)
        except OSError:
            return


def _accept(listener: socket.socket) -> tuple[Socket, Endpoint]:
    while True:
        try:
            return _accept_now(listener)
        except BlockingIOError:
            wait_readable(listener)


def _accept_now(listener: Any) -> tuple[Socket, Endpoint]:
    """Accept below gevent: its own `accept` makes a socket and two watchers, 10 of its 17 microseconds."""
    fileno, sockaddr = listener._sock._accept()
    family = listener._sock.family
    if family == socket.AF_UNIX:  # a visitor's socket has no name, or any that its process likes
        sockaddr = (listener._sock.getsockname(),)
    sock = Socket(family, socket.SOCK_STREAM, 0, fileno)
    sock.setblocking(False)
    return sock, Endpoint(family, sockaddr)

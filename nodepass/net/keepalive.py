"""Keepalive: probes by which the kernel finds a vanished peer, and which hold a NAT's mapping open.

What a listener accepts inherits them. A connection that this end dials is given them when it has lasted a moment, since
most are over long before a probe is due and the four system calls are a tenth of what a short session takes.
"""

from __future__ import annotations

import _socket
import contextlib
import socket
from typing import Any

from gevent import get_hub

KEEPALIVE = (30, 10, 3)  # seconds idle, seconds between probes, probes: a vanished peer is found in a minute
LASTS = 1.0  # seconds between looks at what has been dialled; far less than until the first probe

_dialled: list[_socket.socket] = []  # since the last look
_timer: Any = None  # gevent's, which has no type; it runs while there is something to look at


def set_keepalive(sock: _socket.socket, idle: int, interval: int, probes: int) -> None:
    """Probe a silent peer after `idle` seconds, every `interval` seconds, and give it up after so many probes."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, probes)


def keep_alive_if_it_lasts(sock: _socket.socket) -> None:
    """Set KEEPALIVE on a connection once it has lasted, LASTS seconds from now at most."""
    global _timer  # noqa: PLW0603  # one timer for the process
    _dialled.append(sock)
    if _timer is None:
        _timer = get_hub().loop.timer(LASTS, LASTS)
        _timer.start(_look)


def _look() -> None:
    global _timer  # noqa: PLW0603
    for sock in _dialled:
        with contextlib.suppress(OSError):  # it is closed, or was reset
            if sock.fileno() >= 0:
                set_keepalive(sock, *KEEPALIVE)
    if not _dialled:
        _timer.close()
        _timer = None
    _dialled.clear()

"""The kernel's buffers of the connections of sessions, under a limit on memory to which they are charged.

The kernel lets the buffers of a connection grow to several MiB (`tcp_rmem`, `tcp_wmem`), which a fast and long line
needs. A cgroup pays for them: some visitors that ask for much and read nothing would use up its limit, and the process
would be killed. So a session gets a share of the memory that is set aside for buffers. The first ones get as much as
they can use, and the kernel sizes their buffers as ever; where little is left, a sixteenth of that; and at least LEAST,
which is kept free for every session that SEMAPHORE_LIMIT allows. A session gives its share back at its end.

Without such a limit nothing is set. `daemon` sets it at the start; sessions of either end take their shares.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from nodepass.net.sockets import Socket

CONNECTIONS = 2  # of a session
# Bytes of kernel memory of a connection, overhead included. A new connection has announced a window of 64 KiB. With
# less than twice as much, a segment of that size fits into no buffer, and is sent again and again in vain.
LEAST_SIZES = {socket.SO_RCVBUF: 128 << 10, socket.SO_SNDBUF: 16 << 10}
LEAST = CONNECTIONS * sum(LEAST_SIZES.values())  # bytes, of a session
PARTS = 16  # of what is left, of which a session gets one
PLENTY = 4  # times what a session's buffers can take at most: with so much left, nothing is set

_SIZES = Path("/proc/sys/net/ipv4")


class KernelBuffers:
    """The memory that is set aside for the buffers of sessions."""

    def __init__(self) -> None:
        self.left: int | None = None  # bytes beyond LEAST of every session; None: there is no limit
        self._most = 0  # bytes that the kernel lets the buffers of a session take

    def limit(self, left: int) -> None:
        """From now on allow so many bytes, beyond LEAST for each session."""
        self.left = left
        self._most = CONNECTIONS * (_largest("tcp_rmem") + _largest("tcp_wmem"))

    def share(self, *connections: Socket) -> contextlib.AbstractContextManager[object]:
        """A context in which a session with these two connections has its share."""
        return _NOTHING if self.left is None else _Share(self, connections)

    def take(self, connections: Iterable[Socket]) -> int:
        """Size the buffers of these connections; returns what that takes of `left`."""
        assert self.left is not None
        if self.left >= PLENTY * self._most:
            taken = self._most
        else:
            more = self.left // PARTS // (CONNECTIONS * len(LEAST_SIZES))
            taken = max(0, sum(_set_buffers(each, more) for each in connections) - LEAST)
        self.left -= taken
        return taken

    def give_back(self, taken: int) -> None:
        """The session whose connections took so much has ended."""
        assert self.left is not None
        self.left += taken


class _Share:
    def __init__(self, buffers: KernelBuffers, connections: Iterable[Socket]) -> None:
        self._buffers = buffers
        self._connections = connections
        self._taken = 0

    def __enter__(self) -> None:
        self._taken = self._buffers.take(self._connections)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._buffers.give_back(self._taken)


def _set_buffers(sock: Socket, more: int) -> int:
    """Let each buffer of a connection take so many bytes more than the least; returns what both take, often less."""
    taken = 0
    for option, least in LEAST_SIZES.items():
        sock.setsockopt(socket.SOL_SOCKET, option, (least + more) // 2)  # the kernel doubles it, for its overhead
        taken += sock.getsockopt(socket.SOL_SOCKET, option)
    return taken


def _largest(name: str) -> int:
    """The largest size in bytes that the kernel gives a buffer by itself."""
    return int((_SIZES / name).read_text().split()[2])


_NOTHING = contextlib.nullcontext()

kernel_buffers = KernelBuffers()

"""Streams: what a data connection, a visitor and a target connection have in common, and the plain one.

A stream sits on the kernel's non-blocking socket and has a watcher of the event loop for each direction, made when it
is first needed. Greenlets use it as if it blocked (`recv_into`, `write`); the relay and the pool, which have thousands
of them and mostly idle ones, are called back instead (`watch`, `read`, `send`). Errors are OSErrors.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import Any, Protocol

import gevent

from nodepass.errors import ClosedError
from nodepass.net.sockets import Socket, reset_on_close

Data = bytes | memoryview


def _closed() -> OSError:
    return OSError(errno.EBADF, "closed at this end")


class Stream(Protocol):
    """Plain here, under TLS in `tls`."""

    sock: Socket

    @property
    def batch(self) -> int:
        """Bytes per read and write that move this kind of stream fastest, by measurement."""

    @property
    def plain(self) -> bool:
        """Whether the bytes of the stream are those of the socket, so that the kernel may move them by itself."""

    # Blocking

    def recv_into(self, buffer: memoryview) -> int:
        """Wait for bytes; 0 at the end of the stream. No switch to other greenlets between the read and the return."""

    def write(self, data: Data) -> None:
        """Send all of it. `data` is not looked at after the first switch, so it may be a buffer that others share."""

    def half_close(self) -> None:
        """Say that no more bytes follow; the other direction goes on."""

    # Never blocking

    @property
    def pending(self) -> bool:
        """Whether `read` would find something that the socket does not tell `watch` of."""

    def watch(self, callback: Callable[..., object], *args: object) -> None:
        """Have the loop call back for as long as there is something to read. Nobody may be in `recv_into`."""

    def watch_writable(self, callback: Callable[[], object]) -> None:
        """Have the loop call back for as long as something can be written. Nobody may be in `write`."""

    def unwatch(self) -> None:
        """End `watch`; to be called before `close` and `abort`."""

    def unwatch_writable(self) -> None:
        """End `watch_writable`; to be called before `close` and `abort`."""

    def read(self, buffer: memoryview) -> int:
        """Bytes that are there now, 0 at the end of the stream. Raises BlockingIOError where there are none."""

    def send(self, data: Data) -> Data:
        """Send what goes at once; returns a copy of what is left, which `send_rest` or `try_rest` must take first."""

    def try_rest(self, rest: Data) -> Data:
        """Send what goes at once of what `send` or `end` has left; returns what is still left."""

    def end(self) -> Data:
        """`half_close` that does not wait; returns what is left, as `send` does."""

    def peek(self) -> bool | None:
        """None: open and nothing to read. True: bytes wait. False: closed or broken."""

    def reset_on_close(self, on: bool) -> None:
        """Whether closing is a reset, also when it is the kernel that closes because the process is gone."""

    def close(self) -> None:
        """Close; bytes already written are still delivered."""

    def abort(self) -> None:
        """Close with a reset, so that the peer cannot take a cut stream for a whole one."""


class SocketStream:
    """What both kinds share: waiting, and the blocking calls made of those that do not block."""

    __slots__ = ("_raw", "_readable", "_resets", "_writable", "sock")

    def __init__(self, sock: Socket, resets: bool = False) -> None:
        """`resets`: the socket is one that a reset closes, as its listener was."""
        self.sock = sock
        self._resets = resets
        # gevent's own sockets wait even when MSG_DONTWAIT says not to: take the one below.
        self._raw: Any = getattr(sock, "_sock", sock)
        self._readable: Any = None  # watchers, which have no type
        self._writable: Any = None

    def recv_into(self, buffer: memoryview) -> int:
        while True:
            try:
                return self.read(buffer)
            except BlockingIOError:
                self.wait_readable()

    def write(self, data: Data) -> None:
        self._send_all(self.send(data))

    def half_close(self) -> None:
        self._send_all(self.end())

    def watch(self, callback: Callable[..., object], *args: object) -> None:
        self._read_watcher().start(callback, *args)

    def watch_writable(self, callback: Callable[[], object]) -> None:
        self._write_watcher().start(callback)

    def unwatch(self) -> None:
        if self._readable is not None:
            self._readable.stop()

    def unwatch_writable(self) -> None:
        if self._writable is not None:
            self._writable.stop()

    def read(self, buffer: memoryview) -> int:
        raise NotImplementedError

    def send(self, data: Data) -> Data:
        raise NotImplementedError

    def end(self) -> Data:
        raise NotImplementedError

    def try_rest(self, rest: Data) -> Data:
        try:
            sent = self._raw.send(rest)
        except BlockingIOError:
            return rest
        return memoryview(rest)[sent:] if sent < len(rest) else b""  # an empty view would keep all of it alive

    def reset_on_close(self, on: bool) -> None:
        if on != self._resets and self.sock.fileno() >= 0:
            self._resets = on
            reset_on_close(self.sock, on)

    def close(self) -> None:
        self._close_watchers()
        self.sock.close()

    def abort(self) -> None:
        self.reset_on_close(True)
        self.close()

    def _close_watchers(self) -> None:
        """Whoever waits on one hears of it."""
        for watcher in (self._readable, self._writable):
            if watcher is None:
                continue
            if watcher.active:
                gevent.get_hub().cancel_wait(watcher, _closed(), True)
            else:
                watcher.close()
        self._readable = self._writable = None

    def _send_all(self, rest: Data) -> None:
        while rest:
            gevent.get_hub().wait(self._write_watcher())
            rest = self.try_rest(rest)

    def wait_readable(self) -> None:
        """Wait until the socket has something to read."""
        gevent.get_hub().wait(self._read_watcher())

    def _read_watcher(self) -> Any:
        if self._readable is None:
            self._readable = gevent.get_hub().loop.io(self._fileno(), 1)
        return self._readable

    def _write_watcher(self) -> Any:
        if self._writable is None:
            self._writable = gevent.get_hub().loop.io(self._fileno(), 2)
        return self._writable

    def _fileno(self) -> int:
        fileno: int = self.sock.fileno()
        if fileno < 0:
            raise _closed()
        return fileno


class TCPStream(SocketStream):
    """A plain connection."""

    __slots__ = ()

    batch = 256 * 1024
    plain = True
    pending = False

    @property
    def read(self) -> Any:
        """The socket's own method: no Python call per read where it is kept, no memory in a stream that only waits."""
        return self._raw.recv_into

    def send(self, data: Data) -> Data:
        try:
            sent = self._raw.send(data)
        except BlockingIOError:
            sent = 0
        return b"" if sent == len(data) else bytes(data[sent:])

    def end(self) -> Data:
        self._raw.shutdown(socket.SHUT_WR)
        return b""

    def peek(self) -> bool | None:
        try:
            return bool(self._raw.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return None
        except OSError:
            return False


def recv_exactly(stream: Stream, size: int) -> bytes:
    """Read so many bytes. Raises ClosedError when the stream ends before."""
    data = bytearray(size)
    view = memoryview(data)
    done = 0
    while done < size:
        received = stream.recv_into(view[done:])
        if not received:
            raise ClosedError(f"closed by the peer after {done} of {size} bytes")
        done += received
    return bytes(data)

"""Streams: the one interface of data connections, visitors' and target connections; and the plain one of them.

A stream owns the kernel's non-blocking socket (see `sockets.Socket`) and up to two watchers of the event loop, each
made when it is first needed. It has two sets of calls:

* Greenlets use it as if it blocked: `recv_into`, `write`, `half_close`.
* The relay and the pool, which have thousands of streams, most of them idle, never wait: the loop calls them back
  (`watch`), and then they use `read` and `send`.

The bytes are the payload's, whatever carries them: `tls.stream` has the stream under TLS. Errors are OSErrors.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable
from typing import Any, Protocol

import gevent

from nodepass.errors import ClosedError, ProtocolError
from nodepass.net.sockets import Socket, reset_on_close

Data = bytes | memoryview


def _closed() -> OSError:
    return OSError(errno.EBADF, "closed at this end")


class Stream(Protocol):
    """A connection that carries payload bytes both ways."""

    sock: Socket

    @property
    def batch(self) -> int:
        """Bytes per read and write: measured to move this kind of stream at the least cost."""

    @property
    def plain(self) -> bool:
        """Whether the bytes of the stream are those of the socket, so that the kernel can move them by itself."""

    def exporter(self) -> bytes:
        """32 bytes that only the two ends of this TLS connection know (RFC 9266); none without TLS."""

    # Blocking

    def wait_readable(self) -> None:
        """Wait until the socket has something to read."""

    def recv_into(self, buffer: memoryview) -> int:
        """Wait for bytes; 0 at the end of the stream. No other greenlet runs between the read and the return."""

    def write(self, data: Data) -> None:
        """Send all of it. `data` is not read after the first switch to another greenlet, so it may be shared."""

    def half_close(self) -> None:
        """Send the end of the stream; the other direction goes on."""

    # Never blocking

    @property
    def pending(self) -> bool:
        """Whether `read` may return bytes that make no socket readable, so that `watch` would not call."""

    def watch(self, callback: Callable[..., object], *args: object) -> None:
        """Have the loop call back for as long as there is something to read. No greenlet may be in `recv_into`."""

    def watch_writable(self, callback: Callable[[], object]) -> None:
        """Have the loop call back for as long as something can be written. No greenlet may be in `write`."""

    def unwatch(self) -> None:
        """End `watch`; required before `close` and `abort`."""

    def unwatch_writable(self) -> None:
        """End `watch_writable`; required before `close` and `abort`."""

    def read(self, buffer: memoryview) -> int:
        """Read the bytes that are there; 0 at the end of the stream. Raises BlockingIOError where there are none."""

    def send(self, data: Data) -> Data:
        """Send what the kernel takes now; returns a copy of the rest, which `try_rest` sends before anything else."""

    def try_rest(self, rest: Data) -> Data:
        """Send what the kernel takes now of the rest of `send` or `end`; returns what is still left."""

    def end(self) -> Data:
        """Send the end of the stream without waiting; returns the rest, as `send` does."""

    def peek(self) -> bool | None:
        """None: open and nothing to read. True: bytes wait. False: closed or broken."""

    def reset_on_close(self, on: bool) -> None:
        """Set whether closing is a reset, also where the kernel closes because the process is gone."""

    def close(self) -> None:
        """Close; bytes already written are still delivered."""

    def abort(self) -> None:
        """Close with a reset, so that the peer does not take a cut stream for a whole one."""


class SocketStream:
    """What both kinds of stream share: waiting, and the blocking calls, made of those that do not block."""

    __slots__ = ("_raw", "_readable", "_resets", "_writable", "sock")

    def __init__(self, sock: Socket, resets: bool = False) -> None:
        """`resets`: closing the socket is a reset already, as it inherits from its listener."""
        self.sock = sock
        self._resets = resets
        # gevent's own sockets wait even with MSG_DONTWAIT, so the one below is used.
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
        return memoryview(rest)[sent:] if sent < len(rest) else b""  # an empty view would keep all bytes alive

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
        """A greenlet that waits on one gets an error."""
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

    def exporter(self) -> bytes:
        return b""

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


def read_only_line(stream: Stream, longest: int) -> bytes:
    """Read one line, without its newline, behind which the peer must wait for an answer.

    Raises ProtocolError where it is longer than `longest` bytes, or where something follows; ClosedError at the end.
    """
    data = bytearray(longest + 1)
    view = memoryview(data)
    size = 0
    while b"\n" not in data[:size]:
        if size > longest:
            raise ProtocolError(f"a line longer than {longest} bytes")
        received = stream.recv_into(view[size:])
        if not received:
            raise ClosedError("closed by the peer")
        size += received
    line, _, rest = bytes(data[:size]).partition(b"\n")
    if rest:
        raise ProtocolError(f"{len(rest)} bytes or more follow a line that must be answered first")
    return line


def close_gently(stream: Stream, seconds: float = 1.0, most: int = 65536) -> None:
    """Send the end of the stream and read to the peer's, so that no reset overtakes what was written; then close.

    It takes at most `seconds` and `most` bytes.
    """
    waste = memoryview(bytearray(4096))
    try:
        with contextlib.suppress(OSError), gevent.Timeout(seconds, TimeoutError()):
            stream.half_close()
            while most > 0 and (received := stream.recv_into(waste)):
                most -= received
    finally:
        stream.close()


def recv_exactly(stream: Stream, size: int) -> bytes:
    """Read exactly `size` bytes. Raises ClosedError where the stream ends before."""
    data = bytearray(size)
    view = memoryview(data)
    done = 0
    while done < size:
        received = stream.recv_into(view[done:])
        if not received:
            raise ClosedError(f"closed by the peer after {done} of {size} bytes")
        done += received
    return bytes(data)

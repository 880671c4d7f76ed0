"""What both v1 peers are made of: byte streams, plain and TLS, and the relay between two.

Written from the description of the wire on blocking sockets and the standard library's `ssl`. TLS runs
on memory BIOs: `ssl.SSLSocket` cannot close one direction and go on with the other, and a v1 peer must.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
from collections import deque
from typing import Protocol

from tests.support.sockets import abort

CHUNK = 1 << 16
"""Bytes asked of the kernel at a time."""

FIRST_RECORD = 1186
"""Bytes in a TLS record of a young connection: the Go program begins with records that fit one packet."""

FULL_RECORD = 16384
"""Bytes in a TLS record once `BOOST_AFTER` bytes have been written."""

BOOST_AFTER = 128 * 1024
"""Bytes after which the Go program changes to full records."""


class Stream(Protocol):
    """Either end of a session."""

    def recv(self, size: int) -> bytes:
        """At most `size` bytes, as one read of the Go program returns them; nothing at end of stream."""

    def send(self, data: bytes) -> None:
        """Write everything."""

    def end(self) -> None:
        """Pass on an end of stream and go on reading."""

    def is_readable(self) -> bool:
        """Whether data, an end of stream or an error is there to be read now."""

    def is_ended(self) -> bool:
        """Whether the peer has closed an idle stream."""

    def abort(self) -> None:
        """Close both directions at once, from any thread."""


class PlainStream:
    """A stream that is a TCP connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def recv(self, size: int) -> bytes:
        return self.sock.recv(size)

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def end(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def is_readable(self) -> bool:
        return is_readable(self.sock)

    def is_ended(self) -> bool:
        """Whether an idle stream has been closed; only while no other thread reads it."""
        try:
            return self.is_readable() and self.sock.recv(1, socket.MSG_PEEK) == b""
        except OSError:
            return True

    def abort(self) -> None:
        abort(self.sock)


class TLSStream:
    """A stream inside TLS; one thread may read while another writes."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, server_name: str | None = None) -> None:
        """Do the handshake: as the client of the named server, or as the server where there is no name."""
        self.sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=server_name is None,
            server_hostname=server_name,
        )
        self._state = threading.Lock()
        self._writing = threading.Lock()
        self._records: deque[bytes] = deque()
        self._sent = 0
        self._ended = False
        self._handshake()

    def _handshake(self) -> None:
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                self._feed()
            except ssl.SSLError:
                self._flush()  # the alert that says why
                raise
            else:
                self._flush()
                return self._decrypt()

    def _flush(self) -> None:
        if self._outgoing.pending:
            self.sock.sendall(self._outgoing.read())

    def _feed(self) -> None:
        data = self.sock.recv(CHUNK)
        if not data:
            raise ConnectionError("the stream was cut without a close_notify")
        self._incoming.write(data)

    def _decrypt(self) -> None:
        """Take every complete record out of the BIO, so that only a close is ever left in it."""
        with contextlib.suppress(ssl.SSLWantReadError):
            while not self._ended:
                try:
                    record = self.tls.read(FULL_RECORD)
                except ssl.SSLZeroReturnError:
                    record = b""
                if record:
                    self._records.append(record)
                else:
                    self._ended = True

    def recv(self, size: int) -> bytes:
        while not self._records:
            if self._ended:
                return b""
            data = self.sock.recv(CHUNK)
            with self._state:
                if not data:
                    raise ConnectionError("the stream was cut without a close_notify")
                self._incoming.write(data)
                self._decrypt()
        record = self._records.popleft()
        if len(record) > size:
            self._records.appendleft(record[size:])
        return record[:size]

    def send(self, data: bytes) -> None:
        with self._writing:
            start = 0
            while start < len(data):
                size = FIRST_RECORD if self._sent < BOOST_AFTER else FULL_RECORD
                with self._state:
                    self.tls.write(data[start : start + size])
                self._sent += size
                start += size
            with self._state:
                encrypted = self._outgoing.read()
            self.sock.sendall(encrypted)

    def end(self) -> None:
        with self._writing:
            with self._state:
                with contextlib.suppress(ssl.SSLWantReadError):
                    self.tls.unwrap()
                encrypted = self._outgoing.read()
            self.sock.sendall(encrypted)

    def is_readable(self) -> bool:
        return bool(self._records) or self._ended or is_readable(self.sock)

    def is_ended(self) -> bool:
        """Whether an idle stream has been closed; only while no other thread reads it."""
        while not self._records and not self._ended and is_readable(self.sock):
            try:
                self._feed()
                self._decrypt()
            except OSError:
                self._ended = True
        return self._ended and not self._records

    def abort(self) -> None:
        """Close as the Go program does: with a close_notify, unless a write is stuck."""
        if self._writing.acquire(blocking=False):
            try:
                with self._state, contextlib.suppress(OSError):
                    self.tls.unwrap()
                with contextlib.suppress(OSError):
                    self.sock.send(self._outgoing.read(), socket.MSG_DONTWAIT)
            finally:
                self._writing.release()
        abort(self.sock)


def is_readable(sock: socket.socket) -> bool:
    """Whether a read would not block; a closed socket counts as readable."""
    if sock.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def receive_exactly(stream: Stream, size: int) -> bytes:
    """The next bytes of a stream; ConnectionError where it ends before."""
    received = b""
    while len(received) < size:
        data = stream.recv(size - len(received))
        if not data:
            raise ConnectionError(f"the stream ended after {len(received)} of {size} bytes")
        received += data
    return received


def pump(source: Stream, sink: Stream) -> None:
    """Copy to the end of the stream and pass the end on; an error closes both."""
    try:
        while data := source.recv(CHUNK):
            sink.send(data)
        sink.end()
    except OSError:
        source.abort()
        sink.abort()


def relay(left: Stream, right: Stream) -> None:
    """Carry bytes both ways until both directions have ended, then close both streams."""
    back = threading.Thread(target=pump, args=(right, left), daemon=True)
    back.start()
    pump(left, right)
    back.join()
    left.abort()
    right.abort()

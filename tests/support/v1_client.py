"""A v1 client as the Go program behaves, for our server to work against.

By itself it connects, adopts the data port and the TLS mode, keeps its pool of idle data connections
full, runs what the server launches and comes back when it is cut off. A test may also script it
(`automatic=False`): then it does nothing by itself, and the test calls `connect`, `open_data` and
`next_launch`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import socket
import ssl
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

from tests.support.scope import Closes
from tests.support.sockets import PATIENCE, Address, abort, connect, until
from tests.support.v1_stream import (
    PlainStream,
    Stream,
    TLSStream,
    receive_exactly,
    relay,
)
from tests.support.workers import WorkerPool

TCP, UDP = 1, 2
DATAGRAM = 8192
"""Bytes of the largest datagram."""

CLAIM_TIMEOUT = 2.0
"""Seconds that a launch waits for its data connection to appear in the pool."""

PAUSE = 0.05
"""Seconds between two looks at the pool, and between two attempts to connect."""


@functools.cache
def client_context(verifies: bool, cafile: Path | None) -> ssl.SSLContext:
    """What a client's TLS is made of. One that verifies reads the authorities, which takes longer than a handshake."""
    if verifies:
        return ssl.create_default_context(cafile=cafile)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


class V1Client(Closes):
    """One client; a context manager."""

    def __init__(
        self,
        tunnel: Address,
        target: Address = ("127.0.0.1", 0),
        *,
        cafile: Path | None = None,
        server_name: str = "localhost",
        pool: int = 8,
        answer_timeout: float = 1.0,
        automatic: bool = True,
    ) -> None:
        """pool: idle connections kept. answer_timeout: seconds to wait for the target's datagram."""
        self._tunnel = tunnel
        self._target = target
        self._cafile = cafile
        self._server_name = server_name
        self._size = pool
        self._answer_timeout = answer_timeout
        self._automatic = automatic
        self._idle: dict[str, Stream] = {}
        self._lock = threading.Lock()
        self._taken = threading.Event()
        self.connects = 0
        self.workers = WorkerPool()

    def __enter__(self) -> V1Client:
        if self._automatic:
            self.workers.spawn(self._run)
        return self

    def close(self) -> None:
        self.workers.is_closed = True
        self._taken.set()
        self.workers.close()

    # One step at a time

    def connect(self) -> None:
        """Open the control connection and adopt what the server says first."""
        self._control = self.workers.own(connect(self._tunnel))
        self._lines = self._control.makefile("rb")
        self.data_address = (self._tunnel[0], 0)
        greeting = urlsplit(self._next_line())
        if not greeting.fragment:
            raise ConnectionError(f"told no data port but {greeting.geturl()}")
        self.tls = int(greeting.fragment)
        self.data_address = (self._tunnel[0], int(greeting.netloc))
        self._control.settimeout(None)
        self.connects += 1

    def _next_line(self) -> str:
        line = self._lines.readline(4096)
        if not line.endswith(b"\n"):
            raise ConnectionError("the control connection ended")
        return line.decode(errors="replace").strip()

    def next_launch(self) -> tuple[str, int]:
        """The id and the kind of the next launch; empty lines and unknown fragments are passed over."""
        while True:
            signal = urlsplit(self._next_line())
            if signal.fragment in ("1", "2"):
                return signal.netloc, int(signal.fragment)

    def open_data(self, timeout: float = PATIENCE) -> tuple[str, Stream]:
        """Open one data connection; its id and the stream."""
        sock = self.workers.own(connect(self.data_address, timeout))
        stream = self.secure(sock)
        identity = receive_exactly(stream, 8).decode()
        sock.settimeout(None)
        return identity, stream

    def secure(self, sock: socket.socket) -> Stream:
        """The data connection as a stream, verified as the server's TLS mode demands."""
        if self.tls == 0:
            return PlainStream(sock)
        return TLSStream(sock, client_context(self.tls == 2, self._cafile), self._server_name)

    def write(self, data: bytes) -> None:
        """Write to the control connection, which no v1 client ever does."""
        self._control.sendall(data)

    def fingerprint(self) -> str:
        """SHA-256 of the certificate that a new data connection is shown."""
        _, stream = self.open_data()
        assert isinstance(stream, TLSStream)
        der = stream.tls.getpeercert(binary_form=True)
        assert der is not None
        return hashlib.sha256(der).hexdigest()

    def disconnect(self) -> None:
        """Cut the control connection; running sessions go on."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)

    # By itself

    def _run(self) -> None:
        while not self.workers.is_closed:
            try:
                self.connect()
                connection = self.connects
                self.workers.spawn(lambda number=connection: self._fill(number))  # type: ignore[misc]
                while True:
                    self._start(*self.next_launch())
            except OSError:
                self._flush()
                time.sleep(PAUSE)

    def _flush(self) -> None:
        if hasattr(self, "_control"):
            self._lines.close()
            abort(self._control)
        self.close_idle()

    def _fill(self, connection: int) -> None:
        """Keep the pool full, and without dead connections, as long as this control connection lasts."""
        while not self.workers.is_closed and self.connects == connection:
            self._drop_dead()
            while self.idle < self._size and self._control.fileno() >= 0:
                try:
                    identity, stream = self.open_data()
                except OSError:
                    break  # refused for now: again after the pause
                with self._lock:
                    self._idle[identity] = stream
            self._taken.wait(PAUSE)
            self._taken.clear()

    def _drop_dead(self) -> None:
        """Drop what has reached its end; what has data is alive: its launch is on the way."""
        with self._lock:
            dead = [key for key, stream in self._idle.items() if stream.is_ended()]
            for key in dead:
                self._idle.pop(key).abort()

    @property
    def idle(self) -> int:
        """How many idle data connections there are."""
        with self._lock:
            return len(self._idle)

    def wait_until_full(self) -> None:
        """Return once the pool is full."""
        until(lambda: self.idle >= self._size, what="the pool of the v1 client is not full")

    def close_idle(self, keep: int = 0) -> None:
        """Close idle data connections, all but the youngest `keep`."""
        with self._lock:
            keys = list(self._idle)
            for key in keys[: len(keys) - keep]:
                self._idle.pop(key).abort()

    def _claim(self, identity: str) -> Stream | None:
        with self._lock:
            stream = self._idle.pop(identity, None)
        self._taken.set()
        return stream

    def _start(self, identity: str, kind: int) -> None:
        """Run a launch; the server may name a connection an instant before its id has been read here."""

        def session() -> None:
            deadline = time.monotonic() + CLAIM_TIMEOUT
            while (stream := self._claim(identity)) is None:
                if self.workers.is_closed or time.monotonic() > deadline:
                    return
                time.sleep(0.001)
            with contextlib.suppress(OSError):
                (self._serve_stream if kind == TCP else self._serve_datagram)(stream)
            stream.abort()

        self.workers.spawn(session)

    def _serve_stream(self, stream: Stream) -> None:
        target = self.workers.own(connect(self._target))
        target.settimeout(None)
        target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        relay(PlainStream(target), stream)

    def _serve_datagram(self, stream: Stream) -> None:
        data = stream.recv(DATAGRAM)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as target:
            target.settimeout(self._answer_timeout)
            target.connect(self._target)
            target.send(data)
            stream.send(target.recv(DATAGRAM))

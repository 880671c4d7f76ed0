"""A v1 server as the Go program behaves, for our client to work against.

It listens at once and serves one client at a time. By itself it greets, sends heartbeats, keeps what
arrives at the data port as idle connections and launches a session for every visitor. A test may also
script it: replace the greeting, the ids or the whole handling of data connections, leave out
heartbeats, write any signal line, take and launch connections by hand, and cut the control connection.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable

from tests.support.certificates import Certificate
from tests.support.scope import Closes
from tests.support.sockets import PATIENCE, Address, abort, free_port
from tests.support.v1_stream import PlainStream, Stream, TLSStream, relay
from tests.support.workers import WorkerPool

TCP, UDP = 1, 2
DATAGRAM = 8192
"""Bytes of the largest datagram."""


def random_id() -> bytes:
    """The id of a data connection: 8 hex digits."""
    return secrets.token_hex(4).encode()


class V1Server(Closes):
    """One server; a context manager that listens on kernel-chosen ports of the loopback address."""

    def __init__(
        self,
        tls: int = 0,
        certificate: Certificate | None = None,
        *,
        greeting: bytes | None = None,
        heartbeat: float | None = 0.2,
        make_id: Callable[[], bytes] = random_id,
        handle_data: Callable[[socket.socket], None] | None = None,
    ) -> None:
        """heartbeat: seconds between two, None for none. greeting: instead of the tunnel signal."""
        self.tls = tls
        self._context: ssl.SSLContext | None = None
        if tls:
            assert certificate is not None, "a server with TLS needs a certificate"
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(certificate.crt, certificate.key)
        self._greeting = greeting
        self._heartbeat = heartbeat
        self._make_id = make_id
        self._handle_data = handle_data or self.admit
        self._idle: dict[bytes, Stream] = {}
        self._changed = threading.Condition()
        self._control: socket.socket | None = None
        self.connects = 0
        self.workers = WorkerPool()

    def __enter__(self) -> V1Server:
        self._tunnel = self._listen()
        self._data = self._listen()
        self._target = self._listen(free_port())
        self._udp = self.workers.own(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self._udp.bind(self._target.getsockname())
        self.tunnel_address: Address = self._tunnel.getsockname()
        self.data_address: Address = self._data.getsockname()
        self.visitor_address: Address = self._target.getsockname()
        self.workers.spawn(self._accept_clients)
        self.workers.spawn(lambda: self._accept(self._data, self._handle_data))
        self.workers.spawn(lambda: self._accept(self._target, self._serve_visitor))
        self.workers.spawn(self._receive_datagrams)
        return self

    def close(self) -> None:
        self.workers.is_closed = True
        with self._changed:
            self._control = None
            self._changed.notify_all()
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as waker:
            waker.sendto(b"", self.visitor_address)  # a shutdown does not wake who waits for datagrams
        self.workers.close()

    def _listen(self, port: int = 0) -> socket.socket:
        return self.workers.own(socket.create_server(("127.0.0.1", port), backlog=1024))

    def _accept(self, listener: socket.socket, handle: Callable[[socket.socket], None]) -> None:
        while not self.workers.is_closed:
            sock = self.workers.own(listener.accept()[0])
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.workers.spawn(lambda sock=sock: handle(sock))  # type: ignore[misc]

    # The control connection

    def _accept_clients(self) -> None:
        while not self.workers.is_closed:
            control = self.workers.own(self._tunnel.accept()[0])
            with contextlib.suppress(OSError):
                self._greet(control)
                self._beat(control)
            self._detach(control)

    def _greet(self, control: socket.socket) -> None:
        port = self.data_address[1]
        control.sendall(f"//{port}#{self.tls}\n".encode() if self._greeting is None else self._greeting)
        with self._changed:
            self._control = control
            self.connects += 1
            self._changed.notify_all()

    def _beat(self, control: socket.socket) -> None:
        """Send heartbeats until one fails: a v1 server never reads its control connection."""
        with self._changed:
            while self._control is control:
                self._changed.wait(self._heartbeat)
                if self._control is control and self._heartbeat:
                    control.sendall(b"\n")

    def _detach(self, control: socket.socket) -> None:
        with self._changed:
            if self._control is control:
                self._control = None
            idle, self._idle = self._idle, {}
            self._changed.notify_all()
        abort(control)
        for stream in idle.values():
            stream.abort()

    def wait_for_client(self, timeout: float = PATIENCE) -> None:
        """Return once a client is connected and greeted."""
        with self._changed:
            there = self._changed.wait_for(lambda: self._control or self.workers.is_closed, timeout)
        if not there:
            raise TimeoutError(f"no client came in {timeout:g} s")

    def write(self, line: bytes) -> None:
        """Write any bytes to the client's control connection."""
        self.wait_for_client()
        with self._changed:
            if self._control is None:
                raise ConnectionError("the client has gone")
            self._control.sendall(line)

    def drop_client(self) -> None:
        """Cut the control connection; sessions go on, and the client may come again."""
        self.wait_for_client()
        with self._changed:
            control, self._control = self._control, None
            self._changed.notify_all()
        assert control is not None
        with contextlib.suppress(OSError):
            control.shutdown(socket.SHUT_RDWR)

    # Data connections

    def admit(self, sock: socket.socket) -> None:
        """Give a data connection its id and keep it as idle."""
        stream = self.secure(sock)
        identity = self._make_id()
        stream.send(identity)
        with self._changed:
            self._idle[identity] = stream
            self._changed.notify_all()

    def secure(self, sock: socket.socket) -> Stream:
        """The data connection as a stream, after the handshake if there is one."""
        return TLSStream(sock, self._context) if self._context else PlainStream(sock)

    @property
    def idle(self) -> int:
        """How many live idle data connections there are."""
        with self._changed:
            return sum(not stream.is_readable() for stream in self._idle.values())

    def take(self, timeout: float = PATIENCE) -> tuple[bytes, Stream]:
        """The id and the stream of a live idle data connection; dead ones are dropped on the way."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                while self._idle:
                    identity = next(iter(self._idle))
                    stream = self._idle.pop(identity)
                    if not stream.is_readable():
                        return identity, stream
                    stream.abort()
                if self.workers.is_closed or not self._changed.wait(deadline - time.monotonic()):
                    raise TimeoutError(f"no data connection in {timeout:g} s")

    def launch(self, kind: int) -> Stream:
        """Start a session on an idle data connection and return our end of it."""
        identity, stream = self.take()
        self.write(b"//%s#%d\n" % (identity, kind))
        return stream

    def close_idle(self) -> int:
        """Close every idle data connection and say how many there were."""
        with self._changed:
            idle, self._idle = self._idle, {}
        for stream in idle.values():
            stream.abort()
        return len(idle)

    # Visitors

    def _serve_visitor(self, sock: socket.socket) -> None:
        try:
            stream = self.launch(TCP)
        except OSError:
            abort(sock)
        else:
            relay(PlainStream(sock), stream)

    def _receive_datagrams(self) -> None:
        while True:
            data, visitor = self._udp.recvfrom(DATAGRAM)
            if self.workers.is_closed:
                return
            self.workers.spawn(lambda d=data, v=visitor: self._serve_datagram(d, v))  # type: ignore[misc]

    def _serve_datagram(self, data: bytes, visitor: Address) -> None:
        stream = self.launch(UDP)
        stream.send(data)
        if answer := stream.recv(DATAGRAM):
            self._udp.sendto(answer, visitor)
        stream.abort()

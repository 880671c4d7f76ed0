"""Somebody in the middle of a tunnel: one who forwards bytes, and one who also ends TLS with a certificate
of his own.

He is reached at 127.0.0.2 on the very ports that the server has at 127.0.0.1, as an attacker who has taken
over the server's address would be.
"""

from __future__ import annotations

import socket
import ssl
from types import TracebackType

from tests.support.certificates import Certificate
from tests.support.sockets import Address, connect
from tests.support.v1_stream import PlainStream, Stream, TLSStream, relay
from tests.support.workers import WorkerPool

HERE = "127.0.0.2"


class Forwarder:
    """A port that leads to another address, as a container's mapped port does; a context manager."""

    def __init__(self, behind: Address, listen: Address = ("127.0.0.1", 0)) -> None:
        self._behind = behind
        self._listen = listen
        self.workers = WorkerPool()

    def __enter__(self) -> Forwarder:
        listener = self.workers.own(socket.create_server(self._listen, backlog=256))
        self.address: Address = listener.getsockname()
        self.workers.spawn(lambda: self._accept(listener))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.workers.close()

    def _accept(self, listener: socket.socket) -> None:
        while not self.workers.is_closed:
            sock = self.workers.own(listener.accept()[0])
            self.workers.spawn(lambda sock=sock: self._forward(sock))  # type: ignore[misc]

    def _forward(self, near: socket.socket) -> None:
        far = self.workers.own(connect(self._behind))
        far.settimeout(None)
        for sock in (near, far):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        relay(self._near(near), self._far(far))

    def _near(self, sock: socket.socket) -> Stream:
        return PlainStream(sock)

    def _far(self, sock: socket.socket) -> Stream:
        return PlainStream(sock)


class Decipherer(Forwarder):
    """A forwarder of data connections that ends TLS on both sides; `seen` is what passed in the clear."""

    def __init__(self, behind: Address, listen: Address, certificate: Certificate) -> None:
        super().__init__(behind, listen)
        self._server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._server.load_cert_chain(certificate.crt, certificate.key)
        self._client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._client.check_hostname = False
        self._client.verify_mode = ssl.CERT_NONE
        self.seen = bytearray()

    def _near(self, sock: socket.socket) -> Stream:
        return Spy(TLSStream(sock, self._server), self.seen)

    def _far(self, sock: socket.socket) -> Stream:
        return TLSStream(sock, self._client, "localhost")


class Spy:
    """A stream whose reader is overheard."""

    def __init__(self, stream: Stream, seen: bytearray) -> None:
        self._stream = stream
        self._seen = seen
        self.end, self.send, self.abort = stream.end, stream.send, stream.abort
        self.is_readable, self.is_ended = stream.is_readable, stream.is_ended

    def recv(self, size: int) -> bytes:
        data = self._stream.recv(size)
        self._seen += data
        return data


class TLSMiddle:
    """Forwards the control connection as it is and deciphers the data connections; a context manager."""

    def __init__(self, tunnel_port: int, data_port: int, certificate: Certificate) -> None:
        self._control = Forwarder(("127.0.0.1", tunnel_port), (HERE, tunnel_port))
        self._data = Decipherer(("127.0.0.1", data_port), (HERE, data_port), certificate)
        self.address: Address = (HERE, tunnel_port)

    def __enter__(self) -> TLSMiddle:
        self._data.__enter__()
        self._control.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._control.__exit__(kind, error, trace)
        self._data.__exit__(kind, error, trace)

    @property
    def seen(self) -> bytes:
        """What visitors' services wrote, in the clear."""
        return bytes(self._data.seen)

"""A minimal HTTP server for monitoring: one request per connection, GET or HEAD.

Owns each connection from accept to close and limits its bytes, its seconds, and the number of connections at once.
`endpoint` decides the answers. Nothing here knows about tunnels.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import NamedTuple

import gevent

from nodepass.errors import NodepassError, reason
from nodepass.log import Limit, Log
from nodepass.net.listen import accept_forever, close_all
from nodepass.net.sockets import Socket, as_blocking
from nodepass.stats import Stats
from nodepass.tasks import TaskGroup

AT_ONCE = 32  # connections; one more drops the oldest, so that slow clients cannot block others
WITHIN = 5.0  # seconds for a whole connection
LINGER = 1.0  # seconds for the peer to close after the answer: closing first on unread bytes would reset it
AFTER_A_BUG = 1.0  # seconds without accepting, so that a bug in every connection does not loop busily
LARGEST_REQUEST = 8192  # bytes up to the blank line
PLAIN = "text/plain; charset=utf-8"


@dataclass(frozen=True)
class Answer:
    """A response: its status, body and content type."""

    status: HTTPStatus
    body: bytes
    kind: str = PLAIN

    @classmethod
    def of(cls, status: HTTPStatus, text: str) -> Answer:
        """A plain text answer."""
        return cls(status, f"{text}\n".encode())

    def encode(self, with_body: bool) -> bytes:
        """The bytes to send; the answer to a HEAD has no body."""
        head = (
            f"HTTP/1.1 {self.status.value} {self.status.phrase}\r\n"
            f"Content-Type: {self.kind}\r\n"
            f"Content-Length: {len(self.body)}\r\n"
            "Cache-Control: no-store\r\n"
            "Connection: close\r\n\r\n"
        )
        return head.encode() + (self.body if with_body else b"")


class Request(NamedTuple):
    """What was requested, and under which name."""

    method: str  # GET or HEAD
    path: str  # without its query
    host: str  # of the Host header, without its port; empty where there is none


class BadRequest(NodepassError):
    """The request cannot be parsed or is not supported; `answer` says why."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.answer = Answer.of(status, text)


class HTTPServer:
    """Answers requests on these listeners, and closes them; `answer` maps a request to its answer."""

    def __init__(
        self, listeners: Sequence[socket.socket], answer: Callable[[Request], Answer], log: Log, stats: Stats
    ) -> None:
        self._listeners = listeners
        self._answer = answer
        self._log = log
        self._tasks = TaskGroup(log, stats)
        self._loops = TaskGroup(log, stats)
        self._open: dict[socket.socket, None] = {}  # the oldest first

    def start(self) -> None:
        """Start accepting."""
        for listener in self._listeners:
            self._loops.spawn("keep accepting requests", self._keep_accepting, listener)

    def close(self) -> None:
        """Close every listener and connection."""
        close_all(list(self._listeners))
        self._loops.kill()
        self._tasks.kill()
        for sock in self._open:
            sock.close()  # those whose greenlet had not started

    def _keep_accepting(self, listener: socket.socket) -> None:
        """Restart the accept loop after a bug: without it, connections would wait in the kernel's queue."""
        while listener.fileno() >= 0:
            self._loops.spawn("accept requests", self._accept, listener).join()
            gevent.sleep(AFTER_A_BUG)

    def _accept(self, listener: socket.socket) -> None:
        for accepted, _ in accept_forever(listener, self._log):
            self._admit(accepted)

    def _admit(self, accepted: Socket) -> None:
        if len(self._open) >= AT_ONCE:
            words = "over %(maximum)d concurrent metrics requests; dropped the oldest"
            self._log.warning("metrics.overloaded", words, Limit(), maximum=AT_ONCE)
            oldest = next(iter(self._open))
            del self._open[oldest]
            with contextlib.suppress(OSError):  # already disconnected
                oldest.shutdown(socket.SHUT_RDWR)  # wakes its greenlet, which closes it
        sock = as_blocking(accepted)
        self._open[sock] = None
        self._tasks.spawn("answer", self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        try:
            with gevent.Timeout(WITHIN, TimeoutError(f"not completed within {WITHIN:g}s")):
                self._converse(sock)
        except OSError as error:
            self._log.debug("metrics.request_failed", "metrics request failed: %(error)s", error=reason(error))
        finally:
            self._open.pop(sock, None)
            sock.close()

    def _converse(self, sock: socket.socket) -> None:
        with_body = True
        try:
            request = read_request(sock)
            with_body = request.method != "HEAD"
            answer = self._answer(request)
        except BadRequest as error:
            answer = error.answer
        sock.sendall(answer.encode(with_body))
        sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(TimeoutError), gevent.Timeout(LINGER, TimeoutError()):
            while sock.recv(LARGEST_REQUEST):
                pass


def read_request(sock: socket.socket) -> Request:
    """Read up to the blank line. Raises BadRequest, OSError."""
    received = b""
    while b"\r\n\r\n" not in received:
        if len(received) > LARGEST_REQUEST:
            raise BadRequest(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"allowed: at most {LARGEST_REQUEST} bytes")
        data = sock.recv(LARGEST_REQUEST)
        if not data:
            raise ConnectionError("closed before the end of the request")
        received += data
    first, *headers = received.partition(b"\r\n\r\n")[0].split(b"\r\n")
    words = first.split(b" ")
    if len(words) != 3 or not words[1].startswith(b"/") or not words[2].startswith(b"HTTP/1."):
        raise BadRequest(HTTPStatus.BAD_REQUEST, "not an HTTP/1.1 request")
    if words[0] not in (b"GET", b"HEAD"):
        raise BadRequest(HTTPStatus.METHOD_NOT_ALLOWED, "allowed: GET, HEAD")
    hosts = [value for name, _, value in (each.partition(b":") for each in headers) if name.lower() == b"host"]
    if len(hosts) > 1:
        raise BadRequest(HTTPStatus.BAD_REQUEST, "more than one Host")
    host = hosts[0].strip().decode("ascii", "replace").lower() if hosts else ""
    address, closed, rest = host[1:].partition("]") if host.startswith("[") else (host.partition(":")[0], "]", "")
    host = address if closed and (not rest or rest.startswith(":")) else host  # else it is refused as a name
    return Request(words[0].decode(), words[1].partition(b"?")[0].decode("ascii", "replace"), host.removesuffix("."))

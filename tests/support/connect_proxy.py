"""A small HTTP proxy that demands a user and a password, for tests that need no other package's."""

from __future__ import annotations

import base64
import contextlib
import socket
import socketserver
import threading

from tests.support.scope import Closes
from tests.support.sockets import PATIENCE, Address, parse_address

REQUIRED = b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\nContent-Length: 0\r\n\r\n"


class _Handler(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            received = self.request.recv(1)
            if not received:
                return
            head += received
        place = head.split(b" ", 2)[1].decode()
        self.server.asked.append(place)
        if self.server.expected not in head.split(b"\r\n"):
            self.request.sendall(REQUIRED)
            return
        with socket.create_connection(parse_address(place), PATIENCE) as far:
            self.request.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=_carry, args=(far, self.request), daemon=True)
            back.start()
            _carry(self.request, far)
            back.join()


def _carry(source: socket.socket, sink: socket.socket) -> None:
    """Pass bytes on until the end of the stream."""
    source.settimeout(None)
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for sock in (source, sink):  # as most proxies: the end of one direction ends both
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, user: str, password: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        pair = base64.b64encode(f"{user}:{password}".encode()).decode()
        self.expected = f"Proxy-Authorization: Basic {pair}".encode()
        self.asked: list[str] = []


class ConnectProxy(Closes):
    """Listens on `address`; `asked` is what it was asked to connect to, each time."""

    def __init__(self, user: str, password: str) -> None:
        self._server = _Server(user, password)
        self.address: Address = self._server.server_address[:2]  # type: ignore[assignment]
        self.asked = self._server.asked
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

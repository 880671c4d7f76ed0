"""The service behind a tunnel, played by the test."""

from __future__ import annotations

import contextlib
import socket
import threading

from tests.support.scope import Closes
from tests.support.sockets import PATIENCE, Address


def bind_pair(host: str) -> tuple[socket.socket, socket.socket]:
    """A TCP listener and a UDP socket on the same kernel-chosen port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    while True:
        listener = socket.create_server((host, 0), family=family, backlog=1024)
        datagrams = socket.socket(family, socket.SOCK_DGRAM)
        try:
            datagrams.bind(listener.getsockname())
        except OSError:
            listener.close()
            datagrams.close()
        else:
            return listener, datagrams


class Target(Closes):
    """The service behind a tunnel, played by the test: a TCP and a UDP socket on one address."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._listener, self.udp = bind_pair(host)
        self.udp.settimeout(PATIENCE)
        self.address: Address = self._listener.getsockname()[:2]

    def close(self) -> None:
        self._listener.close()
        self.udp.close()

    def accept(self, timeout: float = PATIENCE) -> socket.socket:
        """The next session that the client has dialled; TimeoutError if there is none in time."""
        self._listener.settimeout(timeout)
        accepted, _ = self._listener.accept()
        accepted.settimeout(PATIENCE)
        return accepted

    def drain(self) -> None:
        """Close every session that waits to be accepted."""
        with contextlib.suppress(TimeoutError):
            while True:
                self.accept(timeout=0.1).close()


class Echo(Closes):
    """A target that answers each visitor, one after another, with the bytes that it says first."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.address: Address = self._listener.getsockname()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                visitor, _ = self._listener.accept()
            except OSError:
                return
            with visitor, contextlib.suppress(OSError):
                visitor.sendall(visitor.recv(100))

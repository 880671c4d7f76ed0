"""A UDP service that answers every datagram with itself, in a thread."""

from __future__ import annotations

import socket
import threading

from tests.support.scope import Closes
from tests.support.sockets import Address, datagram_socket
from tests.support.wire2.lane import LARGEST

ROOM = 4 << 20
"""Bytes of receive buffer that are asked for: a test's burst must not be lost in the kernel."""

STOP = b"\0stop"


class DatagramEcho(Closes):
    """The service; a context manager. `sources` are the addresses that it heard from."""

    def __init__(self) -> None:
        self._socket = datagram_socket()
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, ROOM)
        self.address: Address = self._socket.getsockname()
        self.sources: set[Address] = set()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> DatagramEcho:
        self._thread.start()
        return self

    def close(self) -> None:
        with datagram_socket() as waker:
            waker.sendto(STOP, self.address)
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            data, source = self._socket.recvfrom(LARGEST)
            if data == STOP:
                return
            self.sources.add(source)
            self._socket.sendto(data, source)

"""The service next to the client: its address, resolved when it has to be, and dialled."""

from __future__ import annotations

import socket

from nodepass.net.sockets import Endpoint, Socket, dial, resolve
from nodepass.net.udp import dial_udp
from nodepass.urls import Address


class Target:
    """The service next to the client; its name is resolved at every reconnect, and again when it does not answer."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._endpoints: list[Endpoint] = []

    def __str__(self) -> str:
        return str(self._address)

    def resolve(self) -> None:
        """Look the name up. Raises OSError; the old endpoints stay then."""
        self._endpoints = resolve(self._address)

    def dial(self, timeout: float) -> Socket:
        """A TCP connection to the service. Raises OSError."""
        known = self._endpoints
        try:
            return self._dial(timeout)
        except OSError:
            self.resolve()
            if self._endpoints == known:
                raise
        return self._dial(timeout)

    def _dial(self, timeout: float) -> Socket:
        sock = dial(self._endpoints, timeout)
        if len(self._endpoints) > 1:  # of several addresses the one that answers comes first, for datagrams too
            self._endpoints.sort(key=lambda endpoint: endpoint.sockaddr != sock.getpeername())
        return sock

    def dial_udp(self) -> socket.socket:
        """A UDP socket connected to the service. Raises OSError."""
        if not self._endpoints:
            self.resolve()
        return dial_udp(self._endpoints[0])

"""The target: the service that sessions are connected to, by TCP or UDP.

Its name is resolved at every connect to the server (`connector`), and again when it cannot be reached; `launches` and
`udp_flows` dial it.
"""

from __future__ import annotations

import socket

from nodepass.net.sockets import Endpoint, Socket, dial, resolve
from nodepass.net.udp import dial_udp
from nodepass.urls import Address


class Target:
    """One address, and the endpoints that its name resolved to, the best first."""

    def __init__(self, address: Address) -> None:
        self.answers = True  # the last dial reached it; heartbeats tell the server
        self._address = address
        self._endpoints: list[Endpoint] = []

    def __str__(self) -> str:
        return str(self._address)

    def resolve(self) -> None:
        """Look the name up. Raises OSError, and keeps the endpoints then."""
        self._endpoints = resolve(self._address)

    def dial(self, timeout: float) -> Socket:
        """A TCP connection to the target. Raises OSError, after a second attempt if its endpoints have changed."""
        try:
            sock = self._dial_twice(timeout)
        except OSError:
            self.answers = False
            raise
        self.answers = True
        return sock

    def _dial_twice(self, timeout: float) -> Socket:
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
        if len(self._endpoints) > 1:  # the endpoint that answered becomes the first, for datagrams, too
            self._endpoints.sort(key=lambda endpoint: endpoint.sockaddr != sock.getpeername())
        return sock

    def dial_udp(self) -> socket.socket:
        """A UDP socket connected to the target. Raises OSError."""
        if not self._endpoints:
            self.resolve()
        return dial_udp(self._endpoints[0])

"""The service next to the client: its address, resolved when it has to be, and dialled."""

from __future__ import annotations

import socket

from nodepass.net import Endpoint, Socket, dial, dial_udp, resolve
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
            return dial(known, timeout)
        except OSError:
            self.resolve()
            if self._endpoints == known:
                raise
        return dial(self._endpoints, timeout)

    def dial_udp(self) -> socket.socket:
        """A UDP socket connected to the service. Raises OSError."""
        if not self._endpoints:
            self.resolve()
        return dial_udp(self._endpoints[0])

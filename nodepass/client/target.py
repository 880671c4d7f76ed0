"""The target: the service that sessions are connected to, by TCP or UDP.

Its name is followed (see `names`), so that a dial uses what is known. Of several endpoints the one that answered
last comes first; TCP and UDP may be served at different ones. `launches` and `udp_flows` dial it.
"""

from __future__ import annotations

import contextlib

import gevent
from gevent.event import Event

from nodepass.client.names import GRACE, Name
from nodepass.config.urls import Address
from nodepass.log import Limit, Log
from nodepass.net.sockets import KEEPALIVE, Endpoint, Socket, dial


class Target:
    """One address, and which of its endpoints answer."""

    def __init__(self, address: Address, log: Log, keepalive: float = KEEPALIVE) -> None:
        """`keepalive`: seconds between probes of its TCP connections."""
        self.name = Name(address, log)
        self._address = address
        self._keepalive = keepalive
        self._log = log
        self._lost = Event()  # the last dial has failed
        self._answered: Endpoint | None = None  # by TCP, the last one
        self._answered_udp: Endpoint | None = None

    def __str__(self) -> str:
        return str(self._address)

    @property
    def answers(self) -> bool:
        """Whether the last dial reached it, and its name can be resolved; heartbeats tell the server."""
        return not self._lost.is_set() and (self.name.has_endpoints or not self.name.failure)

    def dial(self, timeout: float) -> Socket:
        """A TCP connection to the target. Raises OSError, after a second attempt where it has moved."""
        try:
            sock = self._dial(timeout)
        except OSError:
            self._lost.set()
            raise
        if self._lost.is_set():
            self._lost.clear()
            self._log.info("target.reachable", "the target %(target)s can be reached again", Limit(), target=self)
        return sock

    def watch(self, interval: float, timeout: float) -> None:
        """While it cannot be reached, connect to it every `interval` seconds. Never returns.

        Else only a visitor would find out that it is back, and an end that is unready may get none.
        """
        while True:
            self._lost.wait()
            gevent.sleep(interval)
            if self._lost.is_set():
                with contextlib.suppress(OSError):
                    self.dial(timeout).close()

    def _dial(self, timeout: float) -> Socket:
        endpoints, version = self.name.endpoints(timeout), self.name.version
        try:
            sock = dial(_first(self._answered, endpoints), timeout, self._keepalive)
        except OSError:
            endpoints = self.name.newer()
            if self.name.version == version:
                raise
            sock = dial(endpoints, timeout, self._keepalive)
        if len(endpoints) > 1:
            self._answered = next((each for each in endpoints if each.sockaddr == sock.getpeername()), None)
        return sock

    def datagram_endpoints(self) -> list[Endpoint]:
        """Where to send the datagrams of a flow, the best first. Raises OSError; waits for a first lookup only."""
        return _first(self._answered_udp or self._answered, self.name.endpoints(GRACE))

    def note_answer(self, endpoint: Endpoint) -> None:
        """A datagram has come from this endpoint: new flows begin with it."""
        self._answered_udp = endpoint


def _first(preferred: Endpoint | None, endpoints: list[Endpoint]) -> list[Endpoint]:
    return sorted(endpoints, key=lambda each: each != preferred) if len(endpoints) > 1 else endpoints

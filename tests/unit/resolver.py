"""A resolver that a test answers for."""

from __future__ import annotations

import gevent
import pytest
from gevent.event import AsyncResult

from nodepass.client import names
from nodepass.config.urls import Address
from nodepass.net import sockets
from nodepass.net.sockets import Endpoint
from tests.unit.controls import until


class Resolver:
    """Stands in for getaddrinfo(3), and answers the last lookup when a test says so; no answer is too recent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (names, sockets):
            monkeypatch.setattr(module, "look_up", self.look_up)
        monkeypatch.setattr(names, "FRESH", 0.0)
        self.lookups: list[AsyncResult[list[Endpoint]]] = []
        self.hosts: list[str] = []

    def look_up(self, address: Address) -> list[Endpoint]:
        self.hosts.append(address.host)
        self.lookups.append(AsyncResult())
        return self.lookups[-1].get()

    def answer(self, *endpoints: Endpoint) -> None:
        """Answer the lookup that runs; there is one, now or in a moment."""
        until(self.is_asked)
        self.lookups[-1].set(list(endpoints))
        gevent.sleep(0)

    def fail(self, words: str = "no such name") -> None:
        until(self.is_asked)
        self.lookups[-1].set_exception(OSError(-2, words))
        gevent.sleep(0)

    def is_asked(self) -> bool:
        return bool(self.lookups) and not self.lookups[-1].ready()

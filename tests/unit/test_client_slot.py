"""The server's place for its client, while one client takes over from another."""

from __future__ import annotations

from contextlib import ExitStack
from typing import cast

import gevent

from nodepass.config import Settings
from nodepass.log import Log
from nodepass.server.client_slot import ClientSlot
from nodepass.stats import Stats
from nodepass.tunnel.control import ServerControl
from nodepass.wire.signals import TCP, Launch
from tests.unit.streams import tcp_pair


class Told:
    """A control connection that writes down what a client is told."""

    version = 2
    vanished = False

    def __init__(self) -> None:
        self.launches: list[str] = []

    def send(self, signal: Launch) -> None:
        self.launches.append(signal.id)

    def close(self, because: str) -> None:
        """Nothing to close."""


def test_no_client_is_told_of_a_connection_of_the_client_before_it() -> None:
    """The connection arrives for a waiting visitor, and before that one runs again the client is replaced."""
    with ExitStack() as stack, gevent.Timeout(10):
        slot = ClientSlot(None, Settings(), lambda: None, Log("test"), Stats())
        old, new = Told(), Told()
        slot.control = cast(ServerControl, old)
        visitor = gevent.spawn(slot.launch, TCP, 5.0)
        gevent.sleep(0)
        stream, _ = stack.enter_context(tcp_pair())
        slot.pool.add("00000001", stream)
        slot.lose(slot.control, "another takes over")
        slot.control = cast(ServerControl, new)
        gevent.sleep(0.01)
        assert stream.sock.fileno() < 0, "the client before would wait for it in vain"
        slot.pool.add("00000002", stack.enter_context(tcp_pair())[0])
        assert visitor.get()[0] == "00000002"
        assert (old.launches, new.launches) == ([], ["00000002"])

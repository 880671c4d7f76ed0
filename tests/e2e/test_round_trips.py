"""How often a client waits for its server before it is connected: each time is a round trip, 0.2 s from far away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.support.tunnel import CALM
from tests.support.wire2.middle import Edit, Encounter, Middle
from tests.support.wire2.ours import OurClients, OurServers
from tests.support.wire2.proofs import SECRET

ENV = {**CALM, "REPORT_INTERVAL": "1h"}  # so that no heartbeat is taken for a part of the handshake
SERVERS = {"clear": "tls=0&name=clear", "tls": "tls=1&name=tls", "adopted": "tls=1&name=adopted"}
CLIENTS = {"clear": "tls=0&name=clear", "tls": "tls=1&name=tls", "adopted": "tls=0&name=adopted"}
FURTHER = {"clear": 0, "tls": 1, "adopted": 2}
"""Round trips beyond one for the hello, and one for the challenge where there is a key."""


class Counter:
    """Carries one control connection, and counts the client's turns to speak."""

    def __init__(self) -> None:
        self.turns = 0
        self._last = ""

    def carry(self, meeting: Encounter) -> None:
        meeting.forward_edited(to_client=self._note("server"), to_server=self._note("client"))

    def _note(self, who: str) -> Edit:
        def note(data: bytes) -> bytes:
            self.turns += who == "client" and self._last != who
            self._last = who
            return data

        return note


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize(
    "is_keyed", [pytest.param(False, marks=pytest.mark.programs), True], ids=["without a key", "with a key"]
)
def test_a_handshake_takes_no_more_round_trips_than_it_must(stack: ExitStack, is_keyed: bool) -> None:
    env = {**ENV, "TUNNEL_KEY": SECRET} if is_keyed else ENV
    servers = stack.enter_context(OurServers(SERVERS, env=env))
    counters = {label: Counter() for label in SERVERS}
    where = {}
    for label, counter in counters.items():
        place = servers[label]
        middle = stack.enter_context(Middle(place.tunnel[1], place.data[1], counter.carry))
        where[label] = middle.address, CLIENTS[label]
    clients = stack.enter_context(OurClients(where, env=env))
    for label, counter in counters.items():
        clients.wait_in(label, "server.connected")
        assert counter.turns == 1 + is_keyed + FURTHER[label], label

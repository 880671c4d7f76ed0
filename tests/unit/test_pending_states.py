"""Pending connections against a model: random orders of accept, first bytes, silence, release, drop and close."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import gevent
from gevent import socket
from gevent.event import Event
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nodepass.log import Log
from nodepass.net.sockets import Endpoint, Socket
from nodepass.server import pending as module
from nodepass.server.pending import PendingConnections
from nodepass.stats import Stats

PER_NETWORK, PER_PORT, IN_ALL = 3, 5, 7
SILENCES = [0.0, 0.25, 60.0]  # seconds
HOSTS = ["203.0.113.1", "203.0.113.2", "::ffff:203.0.113.3", "198.51.100.1", "2001:db8::1", "2001:db8::2"]
NETWORKS = dict(zip(HOSTS, ["a", "a", "a", "b", "c", "c"], strict=True))


class FakeSocket(Socket):
    """An accepted connection from a host that the test names; counts how often it is closed."""

    def __init__(self, host: str) -> None:
        near, self.peer = socket.socketpair()
        super().__init__(near.family, near.type, near.proto, near.detach())
        self.setblocking(False)
        self.host = host
        self.closed = 0

    def getpeername(self) -> Any:
        return self.host, 10101

    def close(self) -> None:
        self.closed += 1
        super().close()


@dataclass(eq=False)
class Model:
    """What is expected of one connection."""

    sock: FakeSocket
    port: int
    since: float
    silence: float
    state: str = "pending"  # pending, released or closed
    spoken: bool = False
    begun: bool = False
    finish: Event = field(default_factory=Event)

    @property
    def network(self) -> str:
        return NETWORKS[self.sock.host]


class PendingMachine(RuleBasedStateMachine):
    """Plays the peers, the listeners of two ports, their work, and the clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        limits = {"PER_NETWORK": PER_NETWORK, "PER_PORT": PER_PORT, "pending_limit": lambda: IN_ALL, "AT_LEAST": 64}
        patches = [mock.patch.object(module, name, value) for name, value in limits.items()]
        patches.append(mock.patch.object(module, "time", SimpleNamespace(monotonic=lambda: self.now)))
        patches.append(mock.patch.object(logging.getLogger("nodepass"), "disabled", new=True))
        self.patches: list[Any] = patches
        for patch in self.patches:
            patch.start()
        self.stats = Stats()
        self.ports = [PendingConnections(name, Log("test"), self.stats) for name in ("tunnel", "data")]
        self.all: list[Model] = []
        self.by_socket: dict[Socket, Model] = {}
        self.dropped = 0

    def those(self, *states: str, port: int | None = None) -> list[Model]:
        return [each for each in self.all if each.state in states and port in (None, each.port)]

    def work(self, sock: Socket, _peer: Endpoint) -> None:
        model = self.by_socket[sock]
        assert not model.begun
        model.begun = True
        try:
            model.finish.wait()
        finally:
            sock.close()

    def settle(self) -> None:
        """Let the event loop look at its sockets, and greenlets run."""
        for _ in range(2):
            gevent.sleep(0.0001)

    @rule(host=st.sampled_from(HOSTS), port=st.integers(0, 1), silence=st.sampled_from(SILENCES))
    def accept(self, host: str, port: int, silence: float) -> None:
        model = Model(FakeSocket(host), port, self.now, silence)
        self.by_socket[model.sock] = model
        victims = self.may_be_dropped(model)
        self.ports[port].accept(model.sock, Endpoint(socket.AF_INET, (host, 50000)), self.work, silence=silence)
        self.settle()
        self.all.append(model)
        gone = [each for each in self.those("pending") if each.sock.closed]
        assert len(gone) == bool(victims)
        assert not set(gone) - set(victims)
        for each in gone:
            each.state = "closed"
            self.dropped += 1

    def may_be_dropped(self, new: Model) -> list[Model]:
        """The connections of which one must go for a new one."""
        here, everywhere = self.those("pending", port=new.port), self.those("pending")
        same = [each for each in here if each.network == new.network]
        if len(same) == PER_NETWORK:
            return unspoken(same)
        if len(here) == PER_PORT:
            return of_the_largest_network(unspoken(here))
        if len(everywhere) == IN_ALL:
            return of_the_largest_network(unspoken(everywhere))
        return []

    @precondition(lambda self: any(not each.spoken for each in self.those("pending")))
    @rule(data=st.data(), ends=st.booleans())
    def speak(self, data: st.DataObject, ends: bool) -> None:
        model = data.draw(st.sampled_from([each for each in self.those("pending") if not each.spoken]))
        if ends:
            model.sock.peer.shutdown(socket.SHUT_WR)
        else:
            model.sock.peer.send(b"x")
        model.spoken = True
        self.settle()

    @rule(seconds=st.sampled_from([0.1, 0.25, 60.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        for port in self.ports:
            port._end_silences()
        self.settle()

    @precondition(lambda self: any(each.begun for each in self.those("pending")))
    @rule(data=st.data())
    def authenticate(self, data: st.DataObject) -> None:
        model = data.draw(st.sampled_from([each for each in self.those("pending") if each.begun]))
        self.ports[model.port].release(model.sock)
        model.state = "released"

    @precondition(lambda self: any(each.begun for each in self.those("pending", "released")))
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        model = data.draw(st.sampled_from([each for each in self.those("pending", "released") if each.begun]))
        model.finish.set()
        self.settle()
        model.state = "closed"

    @rule(port=st.integers(0, 1))
    def close(self, port: int) -> None:
        self.ports[port].close()
        self.settle()
        for each in self.those("pending", "released", port=port):
            each.state = "closed"

    @invariant()
    def the_work_begins_with_the_first_bytes_or_after_the_silence(self) -> None:
        for each in self.those("pending"):
            assert each.begun == (each.spoken or self.now >= each.since + each.silence)

    @invariant()
    def what_is_over_is_closed_once_and_nothing_else_is(self) -> None:
        for each in self.all:
            assert each.sock.closed == (each.state == "closed"), each

    @invariant()
    def counts_are_right_and_limits_hold(self) -> None:
        assert self.stats.trouble["pending_dropped"] == self.dropped
        assert self.stats.trouble["bugs"] == 0
        for number, port in enumerate(self.ports):
            here = self.those("pending", port=number)
            assert len(port) == len(port._by_socket) == len(here) <= PER_PORT
            assert port._here.silent == sum(not each.spoken for each in here)
            counts = Counter(each.network for each in here)
            assert all(count <= PER_NETWORK for count in counts.values())
            assert (port in PendingConnections._ports) == bool(here)
        assert PendingConnections._total == len(self.those("pending")) <= IN_ALL

    def teardown(self) -> None:
        try:
            for port in self.ports:
                port.close()
            self.settle()
            assert all(each.sock.closed == 1 for each in self.all)
            assert not any(port._tasks for port in self.ports)
            assert not any(port._timer.active or port._waiting for port in self.ports)
        finally:
            for each in self.all:
                each.sock.peer.close()
            for patch in self.patches:
                patch.stop()


def unspoken(connections: list[Model]) -> list[Model]:
    """Those that have said nothing, or all if each has spoken."""
    return [each for each in connections if not each.spoken] or connections


def of_the_largest_network(connections: list[Model]) -> list[Model]:
    """On one port: each counts its own."""
    counts = Counter((each.port, each.network) for each in connections)
    return [each for each in connections if counts[each.port, each.network] == max(counts.values())]


TestPending = PendingMachine.TestCase
TestPending.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)

"""The flows of one end of UDP: which there are, how long they live, and which one makes room for another.

A flow has a rank, as in the kernel's connection tracking. One without an answer may be a scanner's or have a forged
address: it lives UNANSWERED_TIMEOUT, and leaves first where room is needed and these are more than half. Next are those
with an answer, whose question may have been the only one; last are conversations, in which the visitor has spoken after
an answer. Of equal rank, the longest idle leaves first. So a flood of datagrams from ever new ports, answered or not,
ends its own flows, and many short questions end those that have had their answer.

`server.udp_flows` and `client.udp_flows` have one table each. Only the server knows visitors' addresses, and gives one
network at most a share of its table.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, Protocol, TypeVar

import gevent
from gevent.event import Event

UNANSWERED_TIMEOUT = 10.0  # seconds after the last datagram of a flow without an answer, if the timeout is not shorter
SWEEP = 1.0  # seconds between two looks for silent flows, at most
NETWORK_SHARE = 4  # one network has at most this part of the server's table: a quarter

NEW, ANSWERED, CONVERSATION = range(3)  # ranks


class FlowLike(Protocol):
    """What a table knows of a flow."""

    last: float  # time.monotonic() of its last datagram in either direction
    rank: int

    @property
    def key(self) -> Hashable: ...

    @property
    def network(self) -> str: ...


Flow = TypeVar("Flow", bound=FlowLike)


class _Order:
    """Keys of flows in the order in which they make room."""

    __slots__ = ("ranks",)

    def __init__(self) -> None:
        self.ranks: tuple[OrderedDict[Hashable, None], ...] = (OrderedDict(), OrderedDict(), OrderedDict())

    def __len__(self) -> int:
        return sum(map(len, self.ranks))

    def first(self) -> Hashable:
        new, answered, conversations = self.ranks
        if new and (2 * len(new) > len(self) or not answered):
            return next(iter(new))
        return next(iter(answered or conversations))

    def move(self, key: Hashable, before: int, after: int) -> None:
        """Make it the one used last of the rank `after`."""
        if before == after:
            self.ranks[after].move_to_end(key)
        else:
            del self.ranks[before][key]
            self.ranks[after][key] = None


class FlowTable(Generic[Flow]):
    """At most `limit` flows, and of one network at most `share`; each ends `timeout` seconds after its last datagram.

    `on_end` is called with each flow that leaves and with how it ended, one of `stats.UDP_OUTCOMES`.
    """

    def __init__(
        self, limit: int, timeout: float, on_end: Callable[[Flow, str], object], share: int | None = None
    ) -> None:
        self._limit = limit
        self._share = share or limit
        self._timeouts = (min(timeout, UNANSWERED_TIMEOUT), timeout, timeout)  # by rank
        self._on_end = on_end
        self._flows: dict[Hashable, Flow] = {}
        self._order = _Order()
        self._networks: dict[str, _Order] = {}
        self._not_empty = Event()

    def __len__(self) -> int:
        return len(self._flows)

    def __iter__(self) -> Iterator[Flow]:
        return iter(list(self._flows.values()))

    def find(self, key: Hashable) -> Flow | None:
        """The flow to which a datagram of a visitor belongs, and which it keeps alive."""
        flow = self._flows.get(key)
        if flow is not None:
            self._use(flow, CONVERSATION if flow.rank == ANSWERED else flow.rank)
        return flow

    def count_answer(self, flow: Flow) -> None:
        """A datagram of the target: it keeps its flow alive."""
        self._use(flow, max(flow.rank, ANSWERED))

    def add(self, flow: Flow) -> None:
        """Begin a flow. Where its network or the table has no room, another one is evicted."""
        own = self._networks.get(flow.network)
        if own and len(own) >= self._share:
            self._remove(self._flows[own.first()], "evicted")
        while len(self._flows) >= self._limit:
            self._remove(self._flows[self._order.first()], "evicted")
        flow.last, flow.rank = time.monotonic(), NEW
        self._flows[flow.key] = flow
        for order in (self._order, self._networks.setdefault(flow.network, _Order())):
            order.ranks[NEW][flow.key] = None
        self._not_empty.set()

    def end(self, over: Callable[[Flow], bool], outcome: str) -> None:
        """End the flows that are `over`."""
        for flow in self:
            if over(flow):
                self._remove(flow, outcome)

    def sweep(self) -> None:
        """End the flows that have been silent for too long."""
        now = time.monotonic()
        for rank, (keys, timeout) in enumerate(zip(self._order.ranks, self._timeouts, strict=True)):
            while keys and (flow := self._flows[next(iter(keys))]).last < now - timeout:
                self._remove(flow, "unanswered" if rank == NEW else "completed")

    def sweep_forever(self) -> None:
        """Sweep until killed; sleeps while there are no flows."""
        while True:
            self._not_empty.wait()
            gevent.sleep(min(SWEEP, self._timeouts[NEW] / 4))
            self.sweep()
            if not self._flows:
                self._not_empty.clear()

    def _use(self, flow: Flow, rank: int) -> None:
        flow.last = time.monotonic()
        for order in (self._order, self._networks[flow.network]):
            order.move(flow.key, flow.rank, rank)
        flow.rank = rank

    def _remove(self, flow: Flow, outcome: str) -> None:
        own = self._networks[flow.network]
        for order in (self._order, own):
            del order.ranks[flow.rank][flow.key]
        if not own:
            del self._networks[flow.network]
        del self._flows[flow.key]
        self._on_end(flow, outcome)

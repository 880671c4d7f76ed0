"""Which of too many connections is dropped: one of the network that has most, and first of those that said nothing.

A network is what one attacker can easily have: 256 IPv4 addresses, or a /64 of IPv6. A flood from a few networks
therefore drops its own connections and not those of other peers, however long these take to authenticate. Which one is
a matter of chance: of the oldest, a flood would drop exactly those whose peers are far away.

Counts only, in constant time, and no I/O: members are any objects. `server.pending` adds its connections, and drops
what `choose` returns.
"""

from __future__ import annotations

from collections.abc import Hashable
from random import random
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Bag(Generic[T]):
    """A set that returns one of its items at random, in constant time."""

    __slots__ = ("_places", "items")

    def __init__(self) -> None:
        self.items: list[T] = []
        self._places: dict[T, int] = {}

    def add(self, item: T) -> None:
        self._places[item] = len(self.items)
        self.items.append(item)

    def remove(self, item: T) -> None:
        place, last = self._places.pop(item), self.items.pop()
        if place < len(self.items):  # it was not the last
            self.items[place] = last
            self._places[last] = place

    def choose(self) -> T:
        return self.items[int(random() * len(self.items))]


class _Ranking(Generic[T]):
    """Members by network, and which networks have most of them."""

    __slots__ = ("_by_size", "_members", "most", "size")

    def __init__(self) -> None:
        self.size = 0  # members
        self.most = 0  # members of one network
        self._members: dict[str, Bag[T]] = {}
        self._by_size: dict[int, Bag[str]] = {}  # networks, by how many members they have

    def count(self, network: str) -> int:
        return len(self._members[network].items) if network in self._members else 0

    def add(self, network: str, member: T) -> None:
        members = self._members.get(network)
        if members is None:
            members = self._members[network] = Bag()
        members.add(member)
        self.size += 1
        after = len(members.items)
        self._move(network, after - 1, after)
        self.most = max(self.most, after)

    def remove(self, network: str, member: T) -> None:
        members = self._members[network]
        members.remove(member)
        self.size -= 1
        after = len(members.items)
        self._move(network, after + 1, after)
        if self.most not in self._by_size:  # it alone had so many
            self.most = after
        if not after:
            del self._members[network]

    def choose(self, network: str | None = None) -> T:
        """A random member of a network, or else of one of those that have most."""
        return self._members[network or self._by_size[self.most].choose()].choose()

    def _move(self, network: str, before: int, after: int) -> None:
        """Note that the number of its members has changed by one."""
        by_size = self._by_size
        if before:
            same = by_size[before]
            same.remove(network)
            if not same.items:
                del by_size[before]
        if after:
            if after not in by_size:
                by_size[after] = Bag()
            by_size[after].add(network)


class Networks(Generic[T]):
    """The connections of one port by network, those that have spoken apart from those that have not."""

    def __init__(self) -> None:
        self._silent: _Ranking[T] = _Ranking()
        self._spoken: _Ranking[T] = _Ranking()

    def __len__(self) -> int:
        return self._silent.size + self._spoken.size

    @property
    def silent(self) -> int:
        """How many have said nothing so far."""
        return self._silent.size

    @property
    def most(self) -> tuple[int, int]:
        """How many of one network have said nothing, and how many of one have spoken: the order in which to drop."""
        return self._silent.most, self._spoken.most

    def count(self, network: str) -> int:
        """How many a network has."""
        return self._silent.count(network) + self._spoken.count(network)

    def add(self, network: str, member: T) -> None:
        """A new connection, which has said nothing."""
        self._silent.add(network, member)

    def note_spoken(self, network: str, member: T) -> None:
        """Its first bytes, or its end, have arrived."""
        self._silent.remove(network, member)
        self._spoken.add(network, member)

    def remove(self, network: str, member: T, spoken: bool) -> None:
        (self._spoken if spoken else self._silent).remove(network, member)

    def choose(self) -> T:
        """Which one to drop of all; there must be one."""
        return (self._silent if self._silent.size else self._spoken).choose()

    def choose_of(self, network: str) -> T:
        """Which one to drop of a network; it must have one."""
        return (self._silent if self._silent.count(network) else self._spoken).choose(network)

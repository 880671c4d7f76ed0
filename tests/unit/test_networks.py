"""Which of too many connections is dropped, against a model; and which network an address is of."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nodepass.net.networks import Networks
from nodepass.net.sockets import network_of
from tests.support.table import each_row

NETWORKS = st.sampled_from(["198.51.100.0/24", "203.0.113.0/24", "2001:db8::/64"])


@each_row(
    ("host", "network"),
    [
        ("203.0.113.7", "203.0.113.0/24"),
        ("::ffff:203.0.113.7", "203.0.113.0/24"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8::1", "2001:db8::/64"),
        ("::1", "::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:0:203.0.113.7", "::/64"),
    ],
)
def test_a_peer_has_a_network_of_256_ipv4_or_a_64_of_ipv6(host: str, network: str) -> None:
    assert network_of((host, 10101)) == network


class NetworksMachine(RuleBasedStateMachine):
    """Connections come, speak and leave in any order; the model is a list of what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.networks: Networks[int] = Networks()
        self.silent: dict[int, str] = {}
        self.spoken: dict[int, str] = {}
        self.last = 0

    @rule(network=NETWORKS)
    def add(self, network: str) -> None:
        self.last += 1
        self.networks.add(network, self.last)
        self.silent[self.last] = network

    @precondition(lambda self: self.silent)
    @rule(data=st.data())
    def speak(self, data: st.DataObject) -> None:
        member = data.draw(st.sampled_from(sorted(self.silent)))
        network = self.spoken[member] = self.silent.pop(member)
        self.networks.note_spoken(network, member)

    @precondition(lambda self: self.silent or self.spoken)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.remove(data.draw(st.sampled_from(sorted(self.silent | self.spoken))))

    @precondition(lambda self: self.silent or self.spoken)
    @rule()
    def drop_one(self) -> None:
        chosen = self.networks.choose()
        these = self.silent or self.spoken
        counts = Counter(these.values())
        assert counts[these[chosen]] == max(counts.values())
        self.remove(chosen)

    @precondition(lambda self: self.silent or self.spoken)
    @rule(data=st.data())
    def drop_one_of_a_network(self, data: st.DataObject) -> None:
        network = data.draw(st.sampled_from(sorted({*self.silent.values(), *self.spoken.values()})))
        chosen = self.networks.choose_of(network)
        assert (self.silent | self.spoken)[chosen] == network
        assert chosen in self.silent or network not in self.silent.values()
        self.remove(chosen)

    def remove(self, member: int) -> None:
        spoken = member in self.spoken
        network = (self.spoken if spoken else self.silent).pop(member)
        self.networks.remove(network, member, spoken)

    @invariant()
    def counts_are_right(self) -> None:
        silent, spoken = Counter(self.silent.values()), Counter(self.spoken.values())
        assert len(self.networks) == len(self.silent) + len(self.spoken)
        assert self.networks.silent == len(self.silent)
        assert self.networks.most == (max(silent.values(), default=0), max(spoken.values(), default=0))
        for network in {*silent, *spoken, "192.0.2.0/24"}:
            assert self.networks.count(network) == silent[network] + spoken[network]


TestNetworks = NetworksMachine.TestCase
TestNetworks.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


def test_each_of_a_network_can_be_the_one_that_is_dropped() -> None:
    """And each network, where several have most."""
    networks: Networks[int] = Networks()
    for member in range(6):
        networks.add(f"203.0.{member % 2}.0/24", member)
    assert {networks.choose() for _ in range(500)} == set(range(6))
    assert {networks.choose_of("203.0.1.0/24") for _ in range(300)} == {1, 3, 5}


def test_nothing_is_kept_of_a_network_that_has_none() -> None:
    """A flood comes from a new network each time."""
    networks: Networks[int] = Networks()
    for member in range(1000):
        networks.add(f"10.0.{member}.0/24", member)
        networks.remove(f"10.0.{member}.0/24", member, spoken=False)
    assert not networks._silent._members
    assert not networks._silent._by_size

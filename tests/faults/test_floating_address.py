"""Two servers and one address, which keepalived moves: what a fault of the machine that has it costs the visitors."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.floating import Keepalived
from tests.support.load import Load, load
from tests.support.machines import FLOATING, Lan, Machine
from tests.support.process import Nodepass
from tests.support.sockets import until
from tests.support.tunnel import OurServer
from tests.support.v2_network import enter
from tests.support.web import Nginx, ask

AT_A_TIME = 6
PAUSE = 0.02
"""Seconds between two requests of one visitor, so that the load alone does not keep the machine busy."""

GIVEN_UP = 4.0
"""Seconds after which a request has failed that nothing resets."""

SERVICE, TUNNEL, TARGET, METRICS = 8080, 10101, 8080, 9464
BOUND = 10.0
"""Seconds without an answer: three checks, a silent peer, and a visitor that gives up take 9 at most."""

pytestmark = pytest.mark.programs("network namespaces", "nginx", "keepalived", "curl")


class Node:
    """One of the two machines: a server, and keepalived."""

    def __init__(self, place: Place, name: str, machine: Machine, peer: Machine) -> None:
        self._place = place
        self.machine = machine
        self.keepalived = Keepalived(place.folder / name, machine, peer)
        self.start_server()

    def start_server(self) -> None:
        """At first, and after it has ended."""
        env = {
            "DATA_PORT": "tunnel",
            "METRICS_LISTEN": f":{METRICS}",
            "SHUTDOWN_DELAY": "5s",
        }
        make = partial(OurServer, 1, tunnel=f":{TUNNEL}", target=f":{TARGET}", log="info", env=env)
        self.server = self._place.lan.start(self._place.stack, self.machine.namespace, make)


class Place:
    """The visitors, two machines with a server, and one with a client of both and an nginx."""

    def __init__(self, stack: contextlib.ExitStack, folder: Path) -> None:
        self.stack = stack
        self.folder = folder
        self.lan = stack.enter_context(Lan(3))
        a, b, self._near = self.lan.others
        stack.enter_context(Nginx(folder / "service", f"127.0.0.1:{SERVICE}", self._near.namespace))
        self.nodes = (Node(self, "a", a, b), Node(self, "b", b, a))
        self.start_client()
        for node in self.nodes:  # at its first check, keepalived takes one answer; later two in a row
            node.server.wait_for_client()
        for node in self.nodes:
            stack.enter_context(node.keepalived)

    def start_client(self) -> None:
        """At first, and after it has ended."""
        servers = ",".join(f"{node.machine.address}:{TUNNEL}" for node in self.nodes)
        url = f"client://{servers}/127.0.0.1:{SERVICE}?log=info"
        make = partial(Nodepass, url, env={"SERVICE_COOLDOWN": "500ms"})
        self.client = self.lan.start(self.stack, self._near.namespace, make)

    def holder(self) -> Node:
        """The one that has the address, once it is the only one, and both are ready."""
        until(lambda: len(self.addressed()) == 1 and all(self.ready()))
        (holder,) = self.addressed()
        return holder

    def addressed(self) -> list[Node]:
        """Those that have the address."""
        return [node for node in self.nodes if node.keepalived.has_address()]

    def ready(self) -> list[bool]:
        """What each keepalived believes."""
        return [node.keepalived.is_ready() for node in self.nodes]

    @contextlib.contextmanager
    def under_load(self) -> Iterator[Load]:
        prepare = partial(enter, Path("/run/netns", self.lan.hub.name))
        with load(partial(ask, (FLOATING, TARGET), GIVEN_UP), AT_A_TIME, prepare, PAUSE) as found:
            serves(found)
            yield found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with contextlib.ExitStack() as stack:
        yield Place(stack, tmp_path_factory.mktemp("place"))


def serves(found: Load) -> None:
    """Wait until a request that begins from now on is answered."""
    began = time.monotonic()
    until(lambda: found.answers(after=began))


def kill_server(node: Node) -> Callable[[], None]:
    node.server.kill()
    return node.start_server


def drain_server(node: Node) -> Callable[[], None]:
    node.server.send(signal.SIGTERM)

    def restart() -> None:
        assert node.server.is_running, "it closed its ports before the address had moved"
        node.server.kill()
        node.start_server()

    return restart


def kill_keepalived(node: Node) -> Callable[[], None]:
    node.keepalived.kill()
    return node.keepalived.start


def pull_cable(node: Node) -> Callable[[], None]:
    node.machine.pull()
    return node.machine.mend


def report(fault: str, found: Load, began: float) -> None:
    """Print what it has cost."""
    failed = found.failed()
    late = max((request.began - began for request in failed), default=0.0)
    words = f"{len(failed)} of {len(found.requests)} requests failed"
    print(f"\n{fault}: {words}, the last began {late:.2f} s after it; gap {found.longest_gap():.2f} s")


@pytest.mark.parametrize("fault", [kill_server, drain_server, kill_keepalived, pull_cable])
def test_each_machine_in_turn_loses_the_address_to_the_other_one_and_does_not_take_it_back(
    place: Place, fault: Callable[[Node], Callable[[], None]]
) -> None:
    for _ in place.nodes:
        holder = place.holder()
        (other,) = (node for node in place.nodes if node is not holder)
        with place.under_load() as found:
            began = time.monotonic()
            mend = fault(holder)
            until(other.keepalived.has_address)
            serves(found)
            mend()
            assert place.holder() is other
            serves(found)
        report(fault.__name__, found, began)
        assert found.longest_gap() <= BOUND
        assert all(request.began < began + BOUND for request in found.failed())
        if fault is not kill_server:  # where nothing refuses, a visitor fails once at most
            assert len(found.failed()) <= AT_A_TIME
        if fault is not pull_cable:  # where the answer comes from the first machine, the second one resets the visitor
            assert all(request.ended - request.began < GIVEN_UP for request in found.failed())


def test_where_neither_is_ready_the_address_stays(place: Place) -> None:
    holder = place.holder()
    place.client.kill()
    until(lambda: not any(place.ready()))
    assert place.addressed() == [holder]
    place.start_client()
    assert place.holder() is holder

"""Three clients, each connected to two servers behind haproxy: what a fault of one machine costs the visitors.

The same haproxy in front of the same three services, without a tunnel, is under the same load meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.balancer import Balancer
from tests.support.load import Load, load
from tests.support.machines import Machine, Machines
from tests.support.process import Nodepass
from tests.support.sockets import Address, format_address, until
from tests.support.tunnel import OurServer
from tests.support.v2_network import enter
from tests.support.web import Nginx, ask
from tests.support.wrk import Wrk

INTERVAL = 1.0
"""Seconds between two heartbeats."""

BOUND = 3 * INTERVAL + 1
"""Seconds after which a machine that says nothing any more is given up."""

AT_A_TIME = 12
PAUSE = 0.02
"""Seconds between two requests of one visitor, so that the load alone does not keep the machine busy."""

NAMES = ("a", "b", "c")
SERVERS = ("a", "b")
SERVICE, TUNNEL, TARGET, METRICS = 8080, 10101, 8080, 9464
FRONT, DIRECT = ("127.0.0.1", 443), ("127.0.0.1", 8080)

pytestmark = pytest.mark.programs("network namespaces", "nginx", "haproxy")


class Under(NamedTuple):
    """What became of the visitors of the tunnel, and of those without a tunnel."""

    tunnel: Load
    direct: Load


class Place:
    """The visitors and haproxy in the middle; three machines with a client and an nginx, two with a server."""

    def __init__(self, stack: contextlib.ExitStack, folder: Path) -> None:
        self._stack = stack
        self._folder = folder
        self.machines = stack.enter_context(Machines(len(NAMES) + len(SERVERS)))
        self.hub = self.machines.hub
        self._near, self._far = self.machines.others[: len(NAMES)], self.machines.others[len(NAMES) :]
        self.targets: list[Nginx] = []
        for machine, name in zip(self._near, NAMES, strict=True):
            self.targets.append(stack.enter_context(Nginx(folder / name, f"0.0.0.0:{SERVICE}", machine.namespace)))
        self.servers = [self._make_server(machine) for machine in self._far]
        self.clients = [self._make_client(machine) for machine in self._near]
        servers = {name: (machine.address, TARGET) for name, machine in zip(SERVERS, self._far, strict=True)}
        services = {name: (machine.address, SERVICE) for name, machine in zip(NAMES, self._near, strict=True)}
        make = partial(Balancer, folder / "haproxy", (FRONT, DIRECT), servers, METRICS, services)
        self.balancer = self.machines.start(stack, self.hub, make)

    def _make_server(self, machine: Machine) -> OurServer:
        env = {
            "CLIENTS": "3",
            "REPORT_INTERVAL": f"{INTERVAL:g}s",
            "SERVICE_COOLDOWN": "500ms",
            "ACCEPT_PROXY": machine.hub_address,
            "METRICS_LISTEN": f"{machine.address}:{METRICS}",
            "SHUTDOWN_DELAY": "2s",
            "ACCESS_LOG": str(self._access_log(machine)),
        }
        tunnel, target = f"{machine.address}:{TUNNEL}", f"{machine.address}:{TARGET}"
        make = partial(OurServer, tunnel=tunnel, target=target, log="info", env=env)
        return self.machines.start(self._stack, machine.namespace, make)

    def _access_log(self, machine: Machine) -> Path:
        return self._folder / f"{machine.address}.access"

    def sessions(self, number: int) -> list[dict[str, str]]:
        """What a server has written about each of its sessions so far."""
        file = self._access_log(self._far[number])
        return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def _make_client(self, machine: Machine) -> Nodepass:
        servers = ",".join(f"{each.address}:{TUNNEL}" for each in self._far)
        env = {"SERVICE_COOLDOWN": "500ms", "HEALTH_CHECK": "http:/", "HEALTH_INTERVAL": "500ms"}
        make = partial(Nodepass, f"client://{servers}/127.0.0.1:{SERVICE}?log=info", env=env)
        return self.machines.start(self._stack, machine.namespace, make)

    def restart_client(self, number: int) -> None:
        """After it has ended."""
        self.clients[number] = self._make_client(self._near[number])

    def restart_server(self, number: int) -> None:
        """After it has ended."""
        self.servers[number] = self._make_server(self._far[number])

    def cable(self, *, server: bool) -> Machine:
        """A machine with a server, or one with a client."""
        return (self._far if server else self._near)[0]

    @contextlib.contextmanager
    def under_load(self) -> Iterator[Under]:
        self.wait_until_whole()
        prepare = partial(enter, Path("/run/netns", self.hub.name))
        with contextlib.ExitStack() as loads:
            under = Under(*(self._visit(loads, address, prepare) for address in (FRONT, DIRECT)))
            for found in under:
                serves_all(found)
            yield under

    def _visit(self, loads: contextlib.ExitStack, address: Address, prepare: Callable[[], None]) -> Load:
        return loads.enter_context(load(partial(ask, address), AT_A_TIME, prepare, PAUSE))

    def wait_until_whole(self) -> None:
        """Wait until each client is connected to each server, and all servers and services are up for haproxy."""
        until(self._is_whole, timeout=30)

    def _is_whole(self) -> bool:
        states = {*self.balancer.states("visitors").values(), *self.balancer.states("direct").values()}
        servers = [connected(each, "client") for each in self.servers]
        clients = [connected(each, "server") for each in self.clients]
        return states == {"UP"} and {*servers} == {len(NAMES)} and {*clients} == {len(SERVERS)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with contextlib.ExitStack() as stack:
        yield Place(stack, tmp_path_factory.mktemp("place"))


def connected(run: Nodepass, peer: str) -> int:
    """How many peers it has, as its log says."""
    return len(run.find(f"{peer}.connected")) - len(run.find(f"{peer}.disconnected"))


def serves_all(found: Load) -> None:
    """Wait until all three serve requests that begin from now on."""
    began = time.monotonic()
    until(lambda: found.answers(after=began) == set(NAMES), timeout=30)


def serve_alone(found: Load, names: set[str], mark: float) -> bool:
    """Whether these, and no others, have served requests that began after then."""
    return found.answers(after=mark) == names


def report(fault: str, under: Under, began: float) -> None:
    """Print what it has cost."""
    for name, found in under._asdict().items():
        failed = found.failed()
        late = max((request.began - began for request in failed), default=0.0)
        words = f"{len(failed)} of {len(found.requests)} requests failed"
        print(f"\n{fault}, {name}: {words}, the last began {late:.2f} s after it; gap {found.longest_gap():.2f} s")


def test_each_server_knows_by_haproxys_header_who_came_and_where(place: Place) -> None:
    with place.under_load():
        until(lambda: all(place.sessions(number) for number in range(len(SERVERS))))
    sessions = [each for number in range(len(SERVERS)) for each in place.sessions(number)]
    assert {each["visitor"].rpartition(":")[0] for each in sessions} == {"127.0.0.1"}
    assert {each["local"] for each in sessions} == {format_address(FRONT)}


# What is announced


def restart_everything(place: Place, under: Under) -> None:
    for number, name in enumerate(NAMES):
        assert place.clients[number].stop() == 0
        until(partial(serve_alone, under.tunnel, set(NAMES) - {name}, time.monotonic()))
        place.targets[number].stop()
        place.targets[number].start()
        place.restart_client(number)
        serves_all(under.tunnel)
    for number, name in enumerate(SERVERS):
        place.wait_until_whole()
        place.servers[number].send(signal.SIGTERM)
        until(lambda name=name: place.balancer.states()[name] == "NOLB")  # type: ignore[misc]
        assert place.servers[number].wait() == 0
        place.restart_server(number)
    place.wait_until_whole()


def drain_server(place: Place, under: Under) -> None:
    """By haproxy, as contrib/haproxy/README.md says."""
    place.balancer.tell("set server visitors/a state drain")
    until(lambda: place.balancer.count_sessions("a") == 0)
    mark = time.monotonic()
    place.servers[0].kill()
    until(lambda: under.tunnel.answers(after=mark) == set(NAMES))
    place.restart_server(0)
    place.balancer.tell("set server visitors/a state ready")
    place.wait_until_whole()


def reload_everything(place: Place, under: Under) -> None:
    for each in (*place.servers, *place.clients):
        mark = each.mark()
        each.send(signal.SIGHUP)
        each.wait_for("process.reloading", after=mark)
        served = len(under.tunnel.requests)
        until(lambda served=served: len(under.tunnel.requests) > served + 5 * AT_A_TIME)  # type: ignore[misc]


@pytest.mark.programs("wrk")
@pytest.mark.parametrize("change", [restart_everything, drain_server, reload_everything])
def test_what_is_announced_costs_no_visitor(place: Place, change: Callable[[Place, Under], None]) -> None:
    with place.under_load() as under, place.hub.inside(partial(Wrk, FRONT)) as wrk:
        began = time.monotonic()
        change(place, under)
        answered, failed = wrk.end()
    report(change.__name__, under, began)
    print(f"wrk: {failed} of {answered} requests failed")
    assert not under.tunnel.failed()
    assert answered
    assert not failed


# What is not


def kill_client(place: Place) -> Callable[[], None]:
    place.clients[0].kill()
    return partial(place.restart_client, 0)


def kill_server(place: Place) -> Callable[[], None]:
    place.servers[0].kill()
    return partial(place.restart_server, 0)


def kill_target(place: Place) -> Callable[[], None]:
    place.targets[0].kill()
    return place.targets[0].start


def stop_client(place: Place) -> Callable[[], None]:
    place.clients[0].send(signal.SIGSTOP)
    return partial(place.clients[0].send, signal.SIGCONT)


def stop_server(place: Place) -> Callable[[], None]:
    place.servers[0].send(signal.SIGSTOP)
    return partial(place.servers[0].send, signal.SIGCONT)


def stop_target(place: Place) -> Callable[[], None]:
    place.targets[0].send(signal.SIGSTOP)
    return partial(place.targets[0].send, signal.SIGCONT)


def pull_cable_of_client(place: Place) -> Callable[[], None]:
    machine = place.cable(server=False)
    machine.pull()
    return machine.mend


def pull_cable_of_server(place: Place) -> Callable[[], None]:
    machine = place.cable(server=True)
    machine.pull()
    return machine.mend


KILLS = (kill_client, kill_server, kill_target)
SILENCES = (stop_client, stop_server, stop_target, pull_cable_of_client, pull_cable_of_server)


@pytest.mark.parametrize(("fault", "gap"), [*((each, 1.0) for each in KILLS), *((each, BOUND) for each in SILENCES)])
def test_a_fault_of_one_machine_costs_what_was_in_flight_there(
    place: Place, fault: Callable[[Place], Callable[[], None]], gap: float
) -> None:
    with place.under_load() as under:
        found = under.tunnel
        began = time.monotonic()
        mend = fault(place)
        until(lambda: max(request.ended for request in found.requests) > began + gap + 1, timeout=30)
        mend()
        serves_all(found)
    report(fault.__name__, under, began)
    assert found.longest_gap() <= gap
    assert all(request.began < began + gap for request in found.failed())
    assert len(found.failed()) <= AT_A_TIME

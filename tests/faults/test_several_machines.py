"""Three clients of one tunnel on three machines: what a fault of one costs the visitors of the tunnel."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.load import Load, load
from tests.support.machines import Machines
from tests.support.sockets import Address, until
from tests.support.tunnel import OurClient, OurServer
from tests.support.v2_network import enter
from tests.support.web import Nginx, ask

INTERVAL = 1.0
"""Seconds between two heartbeats."""

BOUND = 3 * INTERVAL + 1
"""Seconds after which a machine that says nothing any more is given up."""

AT_A_TIME = 12
NAMES = ("a", "b", "c")
PORT = 8080

pytestmark = pytest.mark.programs("network namespaces", "nginx")


class Place:
    """A server where the visitors are, and machines with a client and an nginx each."""

    def __init__(self, stack: contextlib.ExitStack, folder: Path, **settings: str) -> None:
        self._stack = stack
        self._settings = settings
        self.machines = stack.enter_context(Machines(len(NAMES)))
        self.hub = self.machines.hub
        env = {"CLIENTS": "3", "REPORT_INTERVAL": f"{INTERVAL:g}s", "SERVICE_COOLDOWN": "500ms"}
        self.server = self.machines.start(stack, self.hub, partial(OurServer, tunnel="0.0.0.0:0", log="info", env=env))
        self.visitors: Address = self.server.visitor_address
        self.targets: list[Nginx] = []
        self.clients: list[OurClient] = []
        for machine, name in zip(self.machines.others, NAMES, strict=True):
            nginx = Nginx(folder / name, f"127.0.0.1:{PORT}", machine.namespace)
            self.targets.append(stack.enter_context(nginx))
            self.clients.append(self._make_client(len(self.clients)))
        for client in self.clients:
            client.wait_until_connected()

    def restart_client(self, number: int) -> None:
        """After it has ended."""
        self.clients[number] = self._make_client(number)
        self.clients[number].wait_until_connected()

    def _make_client(self, number: int) -> OurClient:
        machine = self.machines.others[number]
        tunnel = (machine.hub_address, self.server.tunnel_address[1])
        env = {"SERVICE_COOLDOWN": "500ms", **self._settings}
        make = partial(OurClient, tunnel, ("127.0.0.1", PORT), log="info", env=env)
        return self.machines.start(self._stack, machine.namespace, make)

    @contextlib.contextmanager
    def under_load(self) -> Iterator[Load]:
        enter_hub = partial(enter, Path("/run/netns", self.hub.name))
        with load(partial(ask, self.visitors), AT_A_TIME, enter_hub) as found:
            serves_all(found)
            yield found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with contextlib.ExitStack() as stack:
        yield Place(stack, tmp_path_factory.mktemp("nginx"), HEALTH_CHECK="http:/", HEALTH_INTERVAL="500ms")


def serves_all(found: Load) -> None:
    """Wait until all three serve requests that begin from now on."""
    began = time.monotonic()
    until(lambda: found.answers(after=began) == set(NAMES), timeout=30)


def serve_alone(found: Load, names: set[str], mark: float) -> bool:
    """Whether these, and no others, have served requests that began after then."""
    return found.answers(after=mark) == names


def report(fault: str, found: Load, began: float) -> None:
    """Print what it has cost."""
    failed = found.failed()
    late = max((request.began - began for request in failed), default=0.0)
    words = f"{len(failed)} of {len(found.requests)} requests failed"
    print(f"\n{fault}: {words}, the last began {late:.2f} s after it; no answer for {found.longest_gap():.2f} s")


def test_a_rolling_restart_of_all_clients_and_targets_loses_nothing(place: Place) -> None:
    with place.under_load() as found:
        began = time.monotonic()
        for number, name in enumerate(NAMES):
            assert place.clients[number].stop() == 0
            mark = time.monotonic()
            others = set(NAMES) - {name}
            until(partial(serve_alone, found, others, mark))
            place.targets[number].stop()
            place.targets[number].start()
            place.restart_client(number)
            serves_all(found)
    report("rolling restart", found, began)
    assert not found.failed()


def kill_client(place: Place) -> Callable[[], None]:
    place.clients[0].kill()
    return lambda: place.restart_client(0)


def stop_client(place: Place) -> Callable[[], None]:
    place.clients[0].send(signal.SIGSTOP)
    return lambda: place.clients[0].send(signal.SIGCONT)


def pull_cable(place: Place) -> Callable[[], None]:
    place.machines.others[0].pull()
    return place.machines.others[0].mend


def kill_target(place: Place) -> Callable[[], None]:
    place.targets[0].kill()
    return place.targets[0].start


def stop_target(place: Place) -> Callable[[], None]:
    place.targets[0].send(signal.SIGSTOP)
    return lambda: place.targets[0].send(signal.SIGCONT)


@pytest.mark.parametrize(
    ("fault", "gap"),
    [(kill_client, 1.0), (kill_target, 1.0), (stop_target, BOUND), (stop_client, BOUND), (pull_cable, BOUND)],
)
def test_a_fault_of_one_machine_costs_what_was_in_flight_there(
    place: Place, fault: Callable[[Place], Callable[[], None]], gap: float
) -> None:
    with place.under_load() as found:
        began = time.monotonic()
        mend = fault(place)
        until(lambda: max(request.ended for request in found.requests) > began + BOUND + 1, timeout=30)
        mend()
        mended = time.monotonic()
        until(lambda: found.answers(after=mended) == set(NAMES), timeout=60)
    report(fault.__name__, found, began)
    assert found.longest_gap() <= gap
    assert all(request.began < began + gap for request in found.failed())
    assert len(found.failed()) <= AT_A_TIME

"""The server is restarted, or either end is killed, while visitors come."""

from __future__ import annotations

import contextlib
import signal
import socket
import statistics
import threading
import time

import pytest

from tests.support.process import Nodepass
from tests.support.scope import Closes
from tests.support.sockets import Address, connect, free_port, until
from tests.support.tunnel import CALM, OurClient, OurServer
from tests.support.workers import WorkerPool

VISITORS = 1000
BACK = 1.0
"""Seconds until the service is back, once the process is."""


class Greeter(Closes):
    """A target that says `!` to everybody at once, then echoes; a context manager."""

    def __enter__(self) -> Greeter:
        self.workers = WorkerPool()
        self._listener = self.workers.own(socket.create_server(("127.0.0.1", 0), backlog=4096))
        self.address: Address = self._listener.getsockname()
        self.workers.spawn(self._accept)
        return self

    def close(self) -> None:
        self.workers.close()

    def _accept(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            self.workers.own(sock)
            self.workers.spawn(lambda sock=sock: self._serve(sock))  # type: ignore[misc]

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            sock.sendall(b"!")
            while data := sock.recv(1 << 16):
                sock.sendall(data)


def is_greeted(visitor: socket.socket) -> bool:
    """Whether the visitor reaches the target."""
    try:
        return visitor.recv(1) == b"!"
    except OSError:
        return False


@pytest.mark.programs
def test_no_visitor_is_lost_that_connected_before_the_server_was_stopped(stack: contextlib.ExitStack) -> None:
    """A thousand come as fast as they can; the server is stopped in the middle, and another takes its place."""
    port = free_port(3)
    env = {**CALM, "DATA_PORT": str(port + 1), "SHUTDOWN_TIMEOUT": "20s"}
    places = {"tunnel": f"127.0.0.1:{port}", "target": f"127.0.0.1:{port + 2}"}
    target = stack.enter_context(Greeter())
    server = stack.enter_context(OurServer(**places, env=env, log="info"))
    client = stack.enter_context(OurClient(server.tunnel_address, target.address, env=env, log="info"))
    client.wait_until_connected()
    before = [stack.enter_context(connect(server.visitor_address)) for _ in range(VISITORS // 2)]
    server.send(signal.SIGTERM)
    after = []
    for _ in range(VISITORS // 2):
        with contextlib.suppress(ConnectionError):
            after.append(stack.enter_context(connect(server.visitor_address)))
    assert sum(map(is_greeted, before)) == len(before)
    for visitor in (*before, *after):
        visitor.close()
    assert server.wait() == 0
    assert not server.find("process.cut")
    again = stack.enter_context(OurServer(**places, env=env, log="info"))
    again.wait_for_client()
    with connect(again.visitor_address) as visitor:
        assert is_greeted(visitor)


class Load(Closes):
    """Visitors one after another, each served or not; a context manager."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.served_at = 0.0
        self.served = 0

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def close(self) -> None:
        """No more visitors."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                with connect(self._address, 1) as visitor:
                    began = time.monotonic()
                    if is_greeted(visitor):
                        self.served, self.served_at = self.served + 1, began
            except OSError:
                self._over.wait(0.01)

    def wait_for_service(self, since: float) -> float:
        """Seconds from then until a visitor connected that was served."""
        until(lambda: self.served_at > since, what="no visitor is served")
        return self.served_at - since


class Pair:
    """Two servers or two clients in one process, each with its own partner: what is killed, and what is not."""

    def __init__(self, target: Address) -> None:
        self.ports = free_port(4)
        self._target = target

    def url(self, side: str, number: int) -> str:
        """The URL of one end of the first (0) or the second (1) tunnel."""
        tunnel, door = (f"127.0.0.1:{self.ports + 2 * number + each}" for each in (0, 1))
        target = door if side == "server" else f"127.0.0.1:{self._target[1]}"
        return f"{side}://{tunnel}/{target}?log=info" + "&tls=0" * (side == "server")

    def door(self, number: int) -> Address:
        """Where visitors of that tunnel go."""
        return ("127.0.0.1", self.ports + 2 * number + 1)


@pytest.mark.programs
@pytest.mark.parametrize("killed", ["server", "client"])
@pytest.mark.parametrize(
    ("rounds", "within"), [(4, 10 * BACK), pytest.param(50, BACK, marks=pytest.mark.soak)], ids=["some", "fifty"]
)
def test_kill_9_under_load_is_over_as_soon_as_the_process_is_back(
    stack: contextlib.ExitStack, killed: str, rounds: int, within: float
) -> None:
    """The other end is one process with two tunnels; the session through the second one never notices."""
    staying = "client" if killed == "server" else "server"
    target = stack.enter_context(Greeter())
    pair = Pair(target.address)
    survivor = Nodepass(pair.url(staying, 0), pair.url(staying, 1), env=CALM)
    victim, other = Nodepass(pair.url(killed, 0), env=CALM), Nodepass(pair.url(killed, 1), env=CALM)
    for run in (survivor, victim, other):
        stack.enter_context(run)
    for number in (0, 1):
        until(lambda number=number: serves(pair.door(number)), what="no tunnel")  # type: ignore[misc]
    visitor = stack.enter_context(connect(pair.door(1)))
    assert is_greeted(visitor)
    descriptors = survivor.settled_descriptors()
    load = stack.enter_context(Load(pair.door(0)))
    times, starts = [], []
    for _ in range(rounds):
        served = load.served
        until(lambda served=served: load.served > served + 5)  # type: ignore[misc]
        victim.kill()
        began = time.monotonic()
        victim = stack.enter_context(Nodepass(pair.url(killed, 0), env=CALM))
        victim.wait_for("server.listening" if killed == "server" else "process.limits")  # the first line of a client
        runs = time.monotonic()
        times.append(load.wait_for_service(runs))
        starts.append(runs - began)
        visitor.sendall(b"?")
        assert visitor.recv(1) == b"?"
    for words, seconds in (("its start took", starts), ("then back after", times)):
        print(f"\n{words}: median {statistics.median(seconds):.2f} s, longest {max(seconds):.2f} s")
    assert max(times) < within
    load.close()
    survivor.wait_for_descriptors(descriptors + 16)
    assert not survivor.find_crashes()


def serves(address: Address) -> bool:
    """Whether a visitor is served there."""
    try:
        with connect(address, 1) as visitor:
            return is_greeted(visitor)
    except OSError:
        return False

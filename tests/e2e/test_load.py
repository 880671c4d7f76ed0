"""Many visitors: a thousand at once on default settings, thousands in a row, and nothing left behind."""

from __future__ import annotations

import contextlib
import selectors
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.process import Nodepass
from tests.support.scope import Closes
from tests.support.sockets import PATIENCE, Address, connect, receive_exactly
from tests.support.tunnel import STEADY, OurClient, OurServer

pytestmark = pytest.mark.programs

AT_ONCE = 1000
IN_ALL = [3_000, pytest.param(10_000, marks=pytest.mark.soak)]
WORKERS = 32


class EchoTarget(Closes):
    """A service that answers every byte with itself, in one thread for any number of sessions."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self._listener.setblocking(False)
        self.address: Address = self._listener.getsockname()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> EchoTarget:
        self._thread.start()
        return self

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()

    def _serve(self) -> None:
        while not self._stopping.is_set():
            for key, _ in self._selector.select(0.1):
                assert isinstance(key.fileobj, socket.socket)
                with contextlib.suppress(BlockingIOError):
                    if key.fileobj is self._listener:
                        self._accept()
                    else:
                        self._echo(key.fileobj)

    def _accept(self) -> None:
        while True:
            session, _ = self._listener.accept()
            session.setblocking(False)
            self._selector.register(session, selectors.EVENT_READ)

    def _echo(self, session: socket.socket) -> None:
        try:
            data = session.recv(4096)
            session.send(data)
        except ConnectionError:
            data = b""
        if not data:
            self._selector.unregister(session)
            session.close()


@pytest.fixture
def echo() -> Iterator[EchoTarget]:
    with EchoTarget() as target:
        yield target


def visit(address: Address) -> bool:
    """A short visit: connect, ask, hear, close."""
    with connect(address) as visitor:
        visitor.sendall(b"visit")
        return receive_exactly(visitor, 5) == b"visit"


@pytest.mark.parametrize("tls", [0, 1])
def test_a_thousand_visitors_at_once_are_all_served(stack: contextlib.ExitStack, echo: EchoTarget, tls: int) -> None:
    # Defaults but for the visitors' patience: other tests share the machine, and this one is not about time.
    server = stack.enter_context(OurServer(tls, env={"POOL_GET_TIMEOUT": "60s"}, log="info"))
    client = stack.enter_context(OurClient(server.tunnel_address, echo.address, env={}, log="info"))
    client.wait_until_connected()
    visitors = [stack.enter_context(connect(server.visitor_address)) for _ in range(AT_ONCE)]
    for number, visitor in enumerate(visitors):
        visitor.sendall(b"%04d" % number)
    for number, visitor in enumerate(visitors):
        assert receive_exactly(visitor, 4) == b"%04d" % number
    assert not server.find("visitor.unserved")


@pytest.mark.parametrize("count", IN_ALL)
def test_thousands_of_short_connections_lose_none_and_leave_nothing_behind(
    stack: contextlib.ExitStack, echo: EchoTarget, count: int
) -> None:
    server = stack.enter_context(OurServer(log="info", env=STEADY))
    client = stack.enter_context(OurClient(server.tunnel_address, echo.address, log="info", env=STEADY))
    client.wait_until_connected()
    visit(server.visitor_address)
    before = [footprint(run) for run in (server, client)]
    with ThreadPoolExecutor(WORKERS) as pool:
        served = sum(pool.map(visit, [server.visitor_address] * count))
    assert served == count
    for run, (descriptors, _) in zip((server, client), before, strict=True):
        run.wait_for_descriptors(descriptors, timeout=2 * PATIENCE)
    for run, (descriptors, greenlets) in zip((server, client), before, strict=True):
        now = footprint(run)
        assert now[0] <= descriptors
        assert now[1] <= greenlets


def footprint(run: Nodepass) -> tuple[int, int]:
    """Descriptors and greenlets of a process at rest; the greenlets are in its dump."""
    descriptors, mark = run.settled_descriptors(), run.mark()
    run.send(signal.SIGUSR1)
    greenlets = run.wait_for("process.bugs", after=mark)["greenlets"]
    assert greenlets > 1
    return descriptors, greenlets

"""Several clients of one tunnel: visitors are spread over them, and one that stops or dies costs the others nothing."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.support.load import load
from tests.support.scope import Closes
from tests.support.sockets import Address, connect, datagram_socket, receive_all, until
from tests.support.target import bind_pair
from tests.support.tunnel import CALM, OurClient, OurServer

NAMES = ("a", "b", "c")
VISITORS_AT_ONCE = 4


class Service(Closes):
    """Tells each visitor its name."""

    def __init__(self, name: str) -> None:
        self.name = name.encode()
        self._listener, self._datagrams = bind_pair("127.0.0.1")
        self.address: Address = self._listener.getsockname()
        self._threads = [threading.Thread(target=work) for work in (self._serve_tcp, self._serve_udp)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", self.address)
        for thread in self._threads:
            thread.join()
        self._listener.close()
        self._datagrams.close()

    def _serve_tcp(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                visitor, _ = self._listener.accept()
                with visitor:
                    if visitor.recv(1):
                        visitor.sendall(self.name)

    def _serve_udp(self) -> None:
        while True:
            question, visitor = self._datagrams.recvfrom(100)
            if not question:
                return
            self._datagrams.sendto(self.name, visitor)


class Group:
    """A server, its three clients, and a service next to each."""

    def __init__(self, stack: contextlib.ExitStack, **settings: str) -> None:
        self.server = stack.enter_context(OurServer(env={**CALM, "CLIENTS": "3", "MIN_POOL_CAPACITY": "4", **settings}))
        self.visitors = self.server.visitor_address
        self._stack = stack
        self._services = {name: stack.enter_context(Service(name)) for name in NAMES}
        self.clients: dict[str, OurClient] = {}
        for name in NAMES:
            self.start(name)

    def start(self, name: str) -> None:
        """Start a client, and wait until it serves."""
        client = OurClient(
            self.server.tunnel_address, self._services[name].address, env={**CALM, "MIN_POOL_CAPACITY": "4"}
        )
        self.clients[name] = self._stack.enter_context(client)
        client.wait_until_connected()
        until(lambda: name in {self.visit() for _ in NAMES})

    def visit(self) -> str:
        """The name of the service that answers."""
        with connect(self.visitors) as visitor:
            visitor.sendall(b"?")
            return receive_all(visitor).decode()


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    with contextlib.ExitStack() as stack:
        yield Group(stack)


def test_visitors_are_spread_over_the_clients(group: Group) -> None:
    assert {group.visit() for _ in NAMES} == set(NAMES)
    with contextlib.ExitStack() as stack:
        open_visitors = [stack.enter_context(connect(group.visitors)) for _ in range(9)]
        answers: Counter[str] = Counter()
        for visitor in open_visitors:
            visitor.sendall(b"?")
            answers[receive_all(visitor).decode()] += 1
        assert set(answers) == set(NAMES)


def test_datagrams_of_a_visitor_stay_with_one_client_and_visitors_are_spread(group: Group) -> None:
    reached = set()
    with contextlib.ExitStack() as stack:
        for _ in range(9):
            visitor = stack.enter_context(datagram_socket())
            answers = set()
            for _ in range(3):
                visitor.sendto(b"?", group.visitors)
                answers.add(visitor.recv(100).decode())
            assert len(answers) == 1
            reached |= answers
    assert reached == set(NAMES)


@pytest.mark.programs
def test_no_visitor_is_lost_while_each_client_is_restarted_in_turn(group: Group) -> None:
    with load(group.visit, VISITORS_AT_ONCE) as found:
        for name in NAMES:
            assert group.clients[name].stop() == 0
            before = len(found.requests)
            until(lambda before=before: len(found.requests) >= before + 30)  # type: ignore[misc]
            group.start(name)
    assert not found.failed()
    assert found.answers() == set(NAMES)


@pytest.mark.programs
def test_visitors_that_come_after_a_client_was_killed_are_served_by_the_others(group: Group) -> None:
    for name in NAMES:
        group.clients[name].kill()
        answers = Counter(group.visit() for _ in range(30))
        assert answers.keys() <= set(NAMES) - {name}, "the others, as their flows of UDP have it"
        group.start(name)


def test_the_server_is_ready_while_one_client_is_left(group: Group) -> None:
    mark = group.server.mark()
    for name in NAMES[:2]:
        group.clients[name].kill()
        group.server.wait_for("client.disconnected", after=mark)
        assert {group.visit() for _ in range(5)} <= set(NAMES) - {name}
    assert {group.visit() for _ in range(5)} == set(NAMES[2:])
    for name in NAMES[:2]:
        group.start(name)

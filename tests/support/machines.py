"""Several machines on one: network namespaces, each with a cable to the one where the visitors are.

Needs root and the `ip` program, as `v2_network`.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from tests.support.scope import Closes
from tests.support.sockets import Address
from tests.support.v2_network import Namespace, enter, ip

Made = TypeVar("Made", bound=AbstractContextManager[object])

REQUEST = b"GET / HTTP/1.0\r\n\r\n"
GIVEN_UP = 15.0
"""Seconds after which a request has failed."""


class Machine:
    """A machine, its address, and that of the visitors' machine at the other end of its cable."""

    def __init__(self, stack: contextlib.ExitStack, hub: Namespace, number: int) -> None:
        self.namespace = Namespace(f"machine{number}")
        stack.callback(self.namespace.delete)
        self.address, self.hub_address = f"10.77.{number}.2", f"10.77.{number}.1"
        self._cable = f"cable{number}"
        self._hub = hub
        ends = ((hub, self.hub_address), (self.namespace, self.address))
        names = ("netns", hub.name, "type", "veth", "peer", self._cable, "netns", self.namespace.name)
        ip("link", "add", self._cable, *names)
        for namespace, address in ends:
            namespace.ip("address", "add", f"{address}/24", "dev", self._cable)
            namespace.ip("link", "set", self._cable, "up")
        self.namespace.ip("route", "add", "default", "via", self.hub_address)

    def pull(self) -> None:
        """Take its link down: nothing arrives any more, and neither end is told."""
        self._hub.ip("link", "set", self._cable, "down")

    def mend(self) -> None:
        """Bring the link up again."""
        self._hub.ip("link", "set", self._cable, "up")


class Machines(Closes):
    """The visitors' machine, `hub`, and so many others."""

    def __init__(self, number: int) -> None:
        self._stack = contextlib.ExitStack()
        try:
            self.hub = Namespace("hub")
            self._stack.callback(self.hub.delete)
            self.others = [Machine(self._stack, self.hub, each) for each in range(number)]
        except BaseException:
            self._stack.close()
            raise

    def close(self) -> None:
        self._stack.close()

    def start(self, stack: contextlib.ExitStack, namespace: Namespace, make: Callable[[], Made]) -> Made:
        """Start something on a machine, and end it with `stack`."""

        def start() -> Made:
            made = make()
            stack.enter_context(made)
            return made

        return namespace.inside(start)


@dataclass
class Request:
    """One request: when it began and ended (time.monotonic()), and what has answered, "" where it failed."""

    began: float
    ended: float
    answer: str


@dataclass
class Load:
    """What became of requests, each on a connection of its own, several at a time."""

    requests: list[Request] = field(default_factory=list)

    def failed(self) -> list[Request]:
        """Those without an answer."""
        return [request for request in self.requests if not request.answer]

    def answers(self, after: float = 0.0) -> set[str]:
        """What has answered the requests that began after then."""
        return {request.answer for request in self.requests if request.answer and request.began > after}

    def longest_gap(self) -> float:
        """Seconds without an answer to any request."""
        ends = sorted(request.ended for request in self.requests if request.answer)
        return max((later - earlier for earlier, later in pairwise(ends)), default=0.0)


@contextlib.contextmanager
def load(namespace: Namespace, address: Address, at_a_time: int) -> Iterator[Load]:
    """Visitors on this machine that come one after another, so many at a time, until the end."""
    found, over = Load(), threading.Event()

    def visit() -> None:
        enter(Path("/run/netns", namespace.name))
        while not over.is_set():
            began = time.monotonic()
            answer = ask(address)
            found.requests.append(Request(began, time.monotonic(), answer))

    threads = [threading.Thread(target=visit) for _ in range(at_a_time)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        over.set()
        for thread in threads:
            thread.join()


def ask(address: Address) -> str:
    """The body that a server of HTTP answers; "" where it does not answer in full."""
    with contextlib.suppress(OSError), socket.create_connection(address, GIVEN_UP) as sock:
        sock.sendall(REQUEST)
        answer = b""
        while received := sock.recv(4096):
            answer += received
        head, _, body = answer.partition(b"\r\n\r\n")
        if b" 200 " in head:
            return body.decode()
    return ""

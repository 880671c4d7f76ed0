"""Visitors that come one after another, several at a time, while a test does something to a tunnel."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise


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
def load(
    ask: Callable[[], str], at_a_time: int, prepare: Callable[[], None] = lambda: None, pause: float = 0.0
) -> Iterator[Load]:
    """Visitors until the end, so many at a time. `ask` is one of them: what has answered, or "", or OSError.

    prepare: called at first in each of their threads; `pause`: seconds between two in a thread.
    """
    found, over = Load(), threading.Event()

    def visit() -> None:
        prepare()
        while not over.is_set():
            began, answer = time.monotonic(), ""
            with contextlib.suppress(OSError):
                answer = ask()
            found.requests.append(Request(began, time.monotonic(), answer))
            over.wait(pause)

    threads = [threading.Thread(target=visit) for _ in range(at_a_time)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        over.set()
        for thread in threads:
            thread.join()

"""The names of a client's server and target, which are followed to other addresses.

A lookup is getaddrinfo(3) in one of gevent's threads. It takes as long as the resolver likes, a minute where name
servers are silent, and cannot be cancelled. So nothing that serves a visitor or reconnects waits for it: a `Name` is
looked up in the background, again every REFRESH seconds, and what is known is returned at once. A name has one lookup
at a time. One that is late counts as failed, and its answer is taken all the same when it comes. A failure keeps the
last answer. An address is its own answer and is never looked up.

The owner of a `Name` runs `follow` as one of its loops where `is_followed`. Errors are OSErrors that name the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext

import gevent
from gevent.event import Event
from gevent.lock import Semaphore

from nodepass.config.urls import Address
from nodepass.errors import reason, with_words
from nodepass.log import Limit, Log
from nodepass.net.sockets import LOCAL, LOOKUP_TIMEOUT, Endpoint, endpoint_of, look_up, lookup_late

REFRESH = 30.0  # seconds between the lookups of a name; most dynamic names live for a minute
RETRY = 5.0  # seconds after a lookup that failed
FRESH = 1.0  # seconds for which the outcome of a lookup is taken for the present one
GRACE = 0.5  # seconds that something which has failed already waits for a lookup; most take milliseconds
MOVES = Limit(seconds=60.0, burst=3)  # a name can have other addresses, or none, at each lookup

_threads = Semaphore(8)  # of the 10 that gevent has: the others are for a reload of the keys, and for localhost


class Name:
    """One address of a URL, and the endpoints that its host had at the last successful lookup."""

    def __init__(self, address: Address, log: Log) -> None:
        self.failure: OSError | None = None  # of the last lookup
        self.version = 0  # another one means other endpoints
        self.on_outcome: Callable[[], object] = int  # called after each lookup
        self.host = address.host or LOCAL
        self._address = address
        self._log = log
        own = endpoint_of(address)
        self._endpoints: list[Endpoint] = [own] if own else []
        self.is_followed = own is None
        # Most targets are localhost, which no name server is asked for: it does not queue behind names that hang.
        self._thread: AbstractContextManager[object] = nullcontext() if self.host == LOCAL else _threads
        self._wanted = Event()
        self._outcome = Event()  # of the lookup that runs, or of the next one
        self._ended = -FRESH  # time.monotonic() of the last outcome
        self._is_late = False  # a lookup runs that has failed already

    @property
    def has_endpoints(self) -> bool:
        """Whether a lookup has ever succeeded."""
        return bool(self._endpoints)

    @property
    def known(self) -> list[Endpoint]:
        """The endpoints that the last successful lookup has found, best first; none before."""
        return self._endpoints

    def follow(self) -> None:
        """Look the name up now, every REFRESH seconds, and where `refresh` asks for it. Never returns."""
        while True:
            with closing(gevent.get_hub().loop.timer(LOOKUP_TIMEOUT)) as timer:
                timer.start(self._note_late)
                try:
                    with self._thread:
                        found = look_up(self._address)
                except OSError as error:
                    self._note_failure(error)
                else:
                    self._take(found)
            self._is_late = False
            self._wanted.clear()
            self._wanted.wait(RETRY if self.failure else REFRESH)

    def endpoints(self, timeout: float) -> list[Endpoint]:
        """What is known, at once, best first; else what a lookup finds within `timeout` seconds. Raises OSError."""
        if not self._endpoints and not self.newer(timeout):
            raise with_words(self.failure, reason(self.failure)) if self.failure else lookup_late(self.host, timeout)
        return self._endpoints

    def newer(self, timeout: float = GRACE) -> list[Endpoint]:
        """The endpoints after a lookup that begins now, if it ends within `timeout` seconds; else what is known."""
        if self.refresh():
            self._outcome.wait(timeout)
        return self._endpoints

    def refresh(self) -> bool:
        """Have the name looked up now; whether there is an outcome to wait for: none so soon after the last one."""
        if not self.is_followed or self._is_late or time.monotonic() - self._ended < FRESH:
            return False
        self._wanted.set()
        return True

    def _take(self, found: list[Endpoint]) -> None:
        known, self._endpoints = self._endpoints, found
        failure, self.failure = self.failure, None
        host, addresses = self.host, ", ".join(each.host for each in found)
        if known and set(known) != set(found):  # a resolver may change the order each time
            self.version += 1
            self._log.info("name.changed", "%(host)s has moved to %(addresses)s", MOVES, host=host, addresses=addresses)
        elif failure:
            self._log.info("name.resolved", "%(host)s is %(addresses)s", MOVES, host=host, addresses=addresses)
        self._note_outcome()

    def _note_failure(self, error: OSError) -> None:
        if not self.failure:
            words = "%(error)s; " + ("its last addresses stay in use" if self._endpoints else "retrying")
            self._log.warning("name.failed", words, MOVES, host=self.host, error=reason(error))
        self.failure = error
        self._note_outcome()

    def _note_late(self) -> None:
        self._is_late = True
        self._note_failure(lookup_late(self.host, LOOKUP_TIMEOUT))

    def _note_outcome(self) -> None:
        self._ended = time.monotonic()
        outcome, self._outcome = self._outcome, Event()
        outcome.set()
        self.on_outcome()


class Member:
    """One of the endpoints of a name, where each is a server of its own; as a `Name` it is that endpoint only."""

    has_endpoints = True

    def __init__(self, name: Name, endpoint: Endpoint) -> None:
        self._name = name
        self._endpoint = endpoint

    def endpoints(self, _: float) -> list[Endpoint]:
        """The endpoint."""
        return [self._endpoint]

    def refresh(self) -> bool:
        """Have the name looked up now: this endpoint may be none of its any more."""
        return self._name.refresh()

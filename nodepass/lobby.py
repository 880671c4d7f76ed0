"""The lobby: connections that have not yet shown who they are, limited per address and in all.

One more than allowed, and the oldest is dropped: who proves itself does so in milliseconds, who only takes up a place
has had its time. So silence, by whomever and however often, keeps nobody out.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections import Counter
from collections.abc import Callable

from nodepass.crew import Crew
from nodepass.log import Log
from nodepass.net import Socket, plain_host
from nodepass.stats import Stats

PER_ADDRESS = 256
IN_ALL = 1024


class Lobby:
    """Newcomers, each with a greenlet that finds out who it is."""

    def __init__(self, name: str, log: Log, stats: Stats, per_address: int = PER_ADDRESS, in_all: int = IN_ALL) -> None:
        self._name = name
        self._log = log
        self._stats = stats
        self._limits = per_address, in_all
        self._crew = Crew(log, stats)
        self._inside: dict[Socket, str] = {}  # the oldest first; the address that it came from
        self._addresses: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._inside)

    def receive(self, sock: Socket, work: Callable[..., object], *args: object) -> None:
        """Run `work(sock, *args)`, which has to close the connection or hand it on."""
        try:
            host = plain_host(sock.getpeername())
        except OSError:
            sock.close()  # it has gone already
            return
        per_address, in_all = self._limits
        if self._addresses[host] >= per_address:
            self._drop(next(each for each, came_from in self._inside.items() if came_from == host))
        elif len(self._inside) >= in_all:
            self._drop(next(iter(self._inside)))
        self._inside[sock] = host
        self._addresses[host] += 1
        self._crew.spawn(self._name, self._run, sock, work, *args)

    def leave(self, sock: Socket) -> None:
        """This one has shown who it is, or is gone; its greenlet may go on."""
        if host := self._inside.pop(sock, None):
            self._addresses[host] -= 1
            if not self._addresses[host]:
                del self._addresses[host]

    def kill(self) -> None:
        """End all, also those that have left the lobby and go on."""
        inside = list(self._inside)
        self._crew.kill()
        for sock in inside:
            sock.close()  # of those that had not begun; the others have closed theirs

    def _run(self, sock: Socket, work: Callable[..., object], *args: object) -> None:
        try:
            work(sock, *args)
        finally:
            self.leave(sock)

    def _drop(self, sock: Socket) -> None:
        """End it: whoever waits for its bytes hears of it, and closes it."""
        self._stats.trouble["newcomers_dropped"] += 1
        words = "too many newcomers to %s that say nothing: dropped the oldest, of %s"
        self._log.limited(logging.WARNING, "lobby", words, self._name, self._inside[sock], burst=1)
        self.leave(sock)
        with contextlib.suppress(OSError):  # it is gone already
            sock.shutdown(socket.SHUT_RDWR)

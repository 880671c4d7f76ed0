"""After which idle time a proxy ends connections, and which ones to replace before. No I/O.

A proxy that ends idle connections ends a whole pool at once, while it is needed. The server ends idle connections, too,
the oldest of those that it has too many of; these two are told apart: the proxy leaves none that is as old, and does
it again at the same age. `client.pool` reports the ends that no launch explains, and dials others beside the
connections that are due. It closes none: a launch can be on its way, and the server takes the newest first.
"""

from __future__ import annotations

from collections.abc import Iterable

SHORTEST = 5.0  # seconds: a connection that ends sooner has not been idle for too long
SAME_MOMENT = 1.0  # seconds within which ends are one event,
SAME_AGE = 0.1  # and the part by which the ages of two events may differ
UNEXPLAINED = 10.0  # seconds after which no launch explains an end any more; the pool waits for a fifth of that
REPLACED_AT = 0.7  # part of the limit at which a connection is replaced


class IdleCuts:
    """What the ends of idle connections say of the proxy; times are in time.monotonic()."""

    def __init__(self, has_proxy: bool = True) -> None:
        """Without a proxy nothing is kept, and nothing becomes due."""
        self.limit: float | None = None  # seconds, once it is known
        self._has_proxy = has_proxy
        self._since: dict[str, float] = {}  # when connections became idle, by id; some are not any more
        self._ends: dict[str, tuple[float, float, bool]] = {}  # that no launch has explained so far, for `_note`
        self._age = 0.0  # at the last event
        self._at = 0.0

    def begin(self, id: str, now: float) -> bool:
        """A connection has become idle; whether it will become due."""
        if self._has_proxy:
            self._since[id] = now
        return self.limit is not None

    def end(self, id: str, now: float, was_last: bool) -> None:
        """An idle connection has ended; `was_last`: none is left."""
        if id in self._since:
            self._ends[id] = now - self._since.pop(id), now, was_last

    def learn(self, unexplained: Iterable[str]) -> bool:
        """No launch has followed these ends; whether that makes the limit known, or shorter."""
        before = self.limit
        for id in unexplained:
            if id in self._ends:
                self._note(*self._ends.pop(id))
        return self.limit != before

    def find_due(self, idle: Iterable[str], now: float) -> list[str]:
        """Which idle connections must be replaced; all others of the past are forgotten."""
        self._since = {id: self._since[id] for id in idle if id in self._since}
        self._ends = {id: end for id, end in self._ends.items() if now - end[1] < UNEXPLAINED}
        if self.limit is None:
            return []
        least = REPLACED_AT * self.limit
        return [id for id, since in self._since.items() if now - since >= least]

    def _note(self, age: float, at: float, was_last: bool) -> None:
        if age < SHORTEST or (self.limit is not None and age >= self.limit * (1 - SAME_AGE)):
            return
        is_later = at - self._at > SAME_MOMENT
        if was_last or (is_later and abs(age - self._age) <= SAME_AGE * age):
            self.limit = age
        if is_later:
            self._age, self._at = age, at

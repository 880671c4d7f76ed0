"""The targets of a client: which one a session or a flow gets, and which of them are up.

SPREAD decides the order in which targets are tried. One that refuses, or does not answer in its share of the time, is
followed by the next, before a byte of the session has been read. A failed dial counts as a failed check. Without
HEALTH_CHECK a target that is down is still tried, after all others; with it, it is not, because the check may know more
than that nothing listens. `launches` and `udp_flows` ask for targets, `health` says which are up.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from gevent.event import Event

from nodepass.client.names import GRACE
from nodepass.client.target import Health, HostTarget, Target, make_target
from nodepass.config.settings import Settings
from nodepass.config.urls import Place
from nodepass.errors import reason
from nodepass.log import Limit, Log
from nodepass.net.sockets import Socket
from nodepass.outbound.source import bind_of
from nodepass.stats import Stats, failure
from nodepass.tunnel.interface import TargetState
from nodepass.visitors.access_log import Visit

SECONDS, BURST = 60.0, 6  # lines about one target's state, at most


class Candidate(Protocol):
    """What the order depends on, of a target."""

    health: Health
    sessions: int


C = TypeVar("C", bound=Candidate)


class Spread(Generic[C]):
    """The order in which targets are tried, by SPREAD: least (fewest sessions), round (in turn) or first. No I/O."""

    def __init__(self, kind: str, targets: Sequence[C]) -> None:
        self._kind = kind
        self._targets = targets
        self._turn = 0  # the place in the list that is next, where nothing else decides

    def order(self, with_down: bool) -> Iterator[C]:
        """The targets to try, each once, the best of those left at each step: up, then in doubt, then down."""
        left = self._usable(with_down)
        is_first = True
        while left:
            left.remove(best := min(left, key=self._key))
            if is_first:
                self._turn, is_first = (best + 1) % len(self._targets), False
            yield self._targets[best]

    def ranking(self, with_down: bool) -> list[C]:
        """The same as they are now, for what tries one after another at once: 64 take 66 microseconds, not 1,458."""
        ranked = sorted(self._usable(with_down), key=self._key)
        if ranked:
            self._turn = (ranked[0] + 1) % len(self._targets)
        return [self._targets[place] for place in ranked]

    def _usable(self, with_down: bool) -> list[int]:
        return [place for place, each in enumerate(self._targets) if with_down or each.health.is_up]

    def _key(self, place: int) -> tuple[int, int, int]:
        target = self._targets[place]
        rank = 1 if target.health.is_doubtful else 0 if target.health.is_up else 2
        turn = place if self._kind == "first" else (place - self._turn) % len(self._targets)
        return rank, target.sessions if self._kind == "least" else 0, turn


class Targets:
    """All targets of one client, in the order of the URL."""

    def __init__(self, places: Sequence[Place], settings: Settings, log: Log, stats: Stats) -> None:
        self._has_checks = settings.health_check != "off"
        self._log = log
        self._stats = stats
        bind = bind_of(settings.target_source_address, "TARGET_SOURCE_ADDRESS")
        self.all = [make_target(each, log, settings.keepalive, self._has_checks, bind) for each in places]
        self._text = ",".join(each.text for each in self.all)
        self.changed = Event()  # set, and replaced by another one, when one is up or down that was not
        hosts = self._hosts = [each for each in self.all if isinstance(each, HostTarget)]
        self._only = self.all[0] if len(self.all) == 1 and not self._has_checks else None
        self._streams = Spread(settings.spread, self.all)
        self._datagrams = Spread(settings.spread, hosts)
        for host in hosts:
            host.name.on_outcome = self._note_change
        for target in self.all:
            for what in ("dial", "check"):
                stats.target_failures[target.text, what] += 0  # exported from the start

    def __str__(self) -> str:
        return self._text

    @property
    def names(self) -> list[HostTarget]:
        """Those whose names must be followed."""
        return [each for each in self._hosts if each.name.is_followed]

    @property
    def answers(self) -> bool:
        """Whether one of them is up, and its name can be resolved; heartbeats tell the server."""
        return any(each.answers for each in self.all)

    def states(self) -> tuple[TargetState, ...]:
        """How each is."""
        return tuple(
            TargetState(each.text, each.answers, each.sessions, reason(each.why) if each.why else "")
            for each in self.all
        )

    def describe(self) -> str:
        """The state of several targets, for an operator; of a single one only why it does not answer."""
        wrong = [(each.text, reason(each.why)) for each in self.all if each.why]
        if len(self.all) == 1:
            return f", target: {wrong[0][1]}" if wrong else ""
        up = sum(each.answers for each in self.all)
        return f", {up} of {len(self.all)} targets up" + "".join(f", {text}: {why}" for text, why in wrong)

    def dial(self, timeout: float, visit: Visit | None = None) -> tuple[Target, Socket]:
        """A connection to a target, within `timeout` seconds in all, and that target, whose session `end` must end.

        `visit` gets the target that is tried. Raises OSError, that of the last one.
        """
        if self._only:
            return self._only, self._dial(self._only, timeout)
        deadline = time.monotonic() + timeout
        error = OSError(errno.EHOSTUNREACH, "no target is up, as HEALTH_CHECK finds")
        left = max(1, sum(each.health.is_up for each in self.all))
        for target in self._streams.order(with_down=not self._has_checks):
            if (share := (deadline - time.monotonic()) / max(1, left)) <= 0:
                break
            left -= 1
            if visit:
                visit.target = target.text
            try:
                return target, self._dial(target, share)
            except OSError as failed:
                error = failed
                words = "cannot reach the target %(target)s: %(error)s"
                self._log.debug("target.passed_over", words, target=target, error=reason(failed))
        raise error

    def _dial(self, target: Target, timeout: float) -> Socket:
        target.sessions += 1  # from now on, so that many at once do not choose the same one
        connected = False
        try:
            sock = target.dial(timeout)
            connected = True
        except OSError as error:
            self.note_failure(target, error, "dial")
            raise
        finally:
            target.sessions -= not connected
        if target.failed.is_set() and not self._has_checks:
            self.note_success(target)
        return sock

    def end(self, target: Target) -> None:
        """A session, or a flow, of this target has ended."""
        target.sessions -= 1

    def for_datagrams(self) -> list[HostTarget]:
        """The targets of a new flow whose addresses are known, the best first. Raises OSError where none can have it.

        Waits for a first lookup where no address is known.
        """
        found = self._datagrams.ranking(with_down=not self._has_checks)
        if not found:
            raise OSError(errno.EHOSTUNREACH, "no target for datagrams is up")
        return _known(found) or _wait_for_one(found)

    def others_for_datagrams(self, target: HostTarget) -> list[HostTarget]:
        """The targets that a flow of this one may go on at."""
        may_be_down = not self._has_checks
        return _known(each for each in self._hosts if each is not target and (each.health.is_up or may_be_down))

    def note_failure(self, target: Target, error: OSError, what: str) -> None:
        """A dial or a check (`what`) of a target has failed."""
        self._stats.target_failures[target.text, what] += 1
        target.failure = error
        target.failed.set()
        if target.health.note(False):
            self._log.warning(
                "target.down",
                "the target %(target)s is down: %(error)s",
                Limit(target.text, SECONDS, BURST),
                target=target,
                reason=failure(error),
                error=reason(error),
            )
            self._note_change()

    def note_success(self, target: Target) -> None:
        """A check of a target has succeeded, or without checks a dial."""
        target.failed.clear()
        if target.health.note(True):
            words = "the target %(target)s is up again"
            self._log.info("target.up", words, Limit(target.text, SECONDS, BURST), target=target)
            self._note_change()
        if target.health.is_up:
            target.failure = None

    def _note_change(self) -> None:
        changed, self.changed = self.changed, Event()
        changed.set()


def _known(hosts: Iterable[HostTarget]) -> list[HostTarget]:
    """Those whose addresses are known."""
    return [each for each in hosts if each.name.has_endpoints]


def _wait_for_one(hosts: Sequence[HostTarget]) -> list[HostTarget]:
    """Those whose addresses are known once there is an answer for the first, in GRACE. Raises OSError if none are."""
    try:
        hosts[0].name.endpoints(GRACE)  # the others are looked up at the same time
    except OSError:
        if not (known := _known(hosts)):
            raise
        return known
    return _known(hosts)

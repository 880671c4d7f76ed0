"""The policy of a server about visitors: whether one is served, by its address alone.

It judges an address and no socket, so that the address may come from elsewhere. A refusal is counted by its reason and
logged; the caller resets the connection or drops the datagram. `server.visitor_listener` and `server.datagram_listener`
ask it; a server without any of these settings has no policy, and its visitors cost nothing here.
"""

from __future__ import annotations

import gevent
from gevent import get_hub
from gevent.event import Event
from gevent.lock import Semaphore

from nodepass.config.files import RETRY
from nodepass.config.hostport import IP, parse_ip
from nodepass.log import Limit
from nodepass.tunnel.part import Common
from nodepass.visitors.access_log import Visit
from nodepass.visitors.quotas import Concurrency, Rate
from nodepass.visitors.rules import Rules

NO_ADDRESS: IP = (0, 0)  # of a visitor on a Unix socket


class Policy:
    """The rules and quotas of one tunnel, and what is counted of them."""

    def __init__(self, common: Common, rules: Rules) -> None:
        settings = common.settings
        self._log = common.log
        self._stats = common.stats
        self._rules = rules
        self._meter = common.meter
        self._sessions = Concurrency(settings.sessions_per_address) if settings.sessions_per_address.most else None
        self._rate = Rate(settings.new_sessions_per_address) if settings.new_sessions_per_address.most else None
        self._reloading = Semaphore()  # of two reloads at a time, the one that ends last could have read first
        self._is_unusable = Event()  # a file was, at the last look
        if rules.unusable is not None:
            self._is_unusable.set()

    @classmethod
    def of(cls, common: Common, rules: Rules) -> Policy | None:
        """The policy of a tunnel that has these rules, None where its settings serve all."""
        settings = common.settings
        limits = settings.sessions_per_address.most or settings.new_sessions_per_address.most or common.meter
        return cls(common, rules) if settings.allow or settings.deny or limits else None

    def admits(self, host: str, visitor: object) -> bool:
        """Whether the rules serve a visitor: its address as the kernel or a user writes it, and its text for the log.

        Raises ValueError where the host is no address.
        """
        refusal = self._rules.find_refusal(parse_ip(host))
        if refusal:
            self._refuse(visitor, refusal)
        return not refusal

    def begin(self, host: str, visitor: object, visit: Visit | None = None) -> IP | None:
        """Begin a session of a visitor, as for `admits`: what `end` takes at its end, None where it is refused.

        `visit`: its session in the access log, which a refusal ends. A visitor on a Unix socket has no host: only
        TRAFFIC_LIMIT applies to it, because the socket's mode and owner say who may connect.
        """
        if host:
            address = parse_ip(host)
            refusal = self._rules.find_refusal(address) or self._take(address)
        else:
            address, refusal = NO_ADDRESS, "traffic_limit" if self._meter and self._meter.is_used_up else ""
        if not refusal:
            return address
        self._refuse(visitor, refusal)
        if visit:
            visit.end(refusal)
        return None

    def end(self, address: IP) -> None:
        """A session has ended that `begin` has admitted."""
        if self._sessions is not None and address != NO_ADDRESS:
            self._sessions.release(address)

    def reload(self) -> None:
        """Read the files of networks again. Sessions that run go on."""
        if not self._rules.has_file:
            return
        with self._reloading:
            error = get_hub().threadpool.apply(self._rules.reload)
        if error:
            self._is_unusable.set()
            self._log.error("rules.kept", "%(error)s; the rules stay as they were", error=error)
        else:
            self._log.info("rules.reloaded", "read the rules about visitors again")

    def watch(self) -> None:
        """Read files that could not be used at a reload as soon as they have changed in any way. Never returns."""
        while True:
            self._is_unusable.wait()
            gevent.sleep(RETRY)
            if self._rules.unusable is None:
                self._is_unusable.clear()
            elif self._rules.unusable != self._rules.file_states:
                self.reload()

    def _take(self, address: IP) -> str:
        """Count a new session; why there may be none, or ""."""
        if self._meter and self._meter.is_used_up:
            return "traffic_limit"
        if self._sessions is not None and not self._sessions.take(address):
            return "address_sessions"
        if self._rate is not None and not self._rate.take(address):
            self.end(address)
            return "address_rate"
        return ""

    def _refuse(self, visitor: object, why: str) -> None:
        self._stats.visitors_refused[why] += 1
        words = "refused visitor %(visitor)s: %(reason)s"
        self._log.warning("visitor.refused", words, Limit(why), visitor=visitor, reason=why)

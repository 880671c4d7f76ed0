"""The client of one tunnel: makes its parts, starts, stops and closes them, and shows its state.

`servers` keeps the control connections to the servers, `launches` serves the sessions, and `udp_flows` the datagrams.
The process calls a client as `tunnel.interface` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from gevent.event import AsyncResult

from nodepass.client.health import HealthChecks
from nodepass.client.launches import Launches
from nodepass.client.servers import Servers
from nodepass.client.targets import Targets
from nodepass.client.udp_flows import TargetFlows
from nodepass.config.settings import Settings
from nodepass.config.urls import ClientURL
from nodepass.errors import reason
from nodepass.log import Limit, literal
from nodepass.net.activation import PassedSocket
from nodepass.outbound.source import find_missing
from nodepass.tasks import TaskGroup
from nodepass.tunnel.handshake import Terms
from nodepass.tunnel.interface import View, name_protocols, report_fields
from nodepass.tunnel.part import Common, Loop, Part, Records, stop_parts
from nodepass.tunnel.rates import Rates
from nodepass.tunnel.security import summarize
from nodepass.wire.auth import Key


class Client:
    """One tunnel's client: `start`, `run`, then `stop` and `close`; `interface.Tunnel` says who calls what."""

    def __init__(
        self,
        url: ClientURL,
        id: str,
        keys: Callable[[], Sequence[Key]],
        settings: Settings,
        records: Records,
    ) -> None:
        """`id`: what the client calls itself; `keys`: those that its tunnel has now, of which it proves the first."""
        log, stats, access, meter = records
        self.log = log
        self.stats = stats
        self.meter = meter
        self._url = url
        self.client_id = id
        self._keys = keys
        self._settings = settings
        self._failed: AsyncResult[None] = AsyncResult()
        loops = TaskGroup(log, stats, on_crash=self._failed.set_exception)
        common = Common(settings, log, stats, loops, access, Rates.of(settings, stats), meter)
        self._targets = Targets(url.targets, settings, log, stats)
        self._flows = TargetFlows(common, self._targets, url.tunnel_name)
        launches = Launches(common, self._targets, self._flows, url.tunnel_name)
        checks = HealthChecks(common, self._targets, url.tunnel_name)
        self._servers = Servers(common, url, self._terms(keys()), launches, self._log_statistics)
        self._parts: list[Part] = [self._servers, launches, self._flows, checks]  # in the order in which they stop
        if meter:
            self._parts.append(Loop(common, "count traffic", meter.run))
        self.sessions = launches.sessions
        self.ready = self._servers.ready

    def start(self) -> None:
        """Nothing to open: everything that a client needs is retried."""
        for error in find_missing(self._settings):
            words = "%(error)s; until it has, connections fail"
            self.log.warning("source.missing", words, Limit(), error=reason(error))

    def run(self) -> None:
        """Connect, serve, and connect again, until `close`; raises what crashed one of the loops."""
        for part in self._parts:
            part.start()
        self._failed.get()

    def stop(self, timeout: float) -> int:
        """As `Tunnel.stop`: the client leaves its servers, and sessions drain."""
        return stop_parts(self._parts, self.sessions, timeout)

    # Where another process takes over

    @property
    def listeners(self) -> list[PassedSocket]:
        """A client has none."""
        return []

    def offer_places(self) -> None:
        """As `Tunnel.offer_places`."""
        self._servers.offer_places()

    def keep_places(self) -> None:
        """As `Tunnel.keep_places`."""
        self._servers.keep_places()

    def end_accepting(self) -> None:
        """A client accepts nothing."""

    def hand_over(self) -> None:
        """`stop` leaves the servers."""

    def close(self) -> None:
        """End everything at once."""
        for part in self._parts:
            part.close()
        self._failed.set(None)

    def reload(self) -> None:
        """Take the key that the tunnel has now; where that is another one, connect again with it."""
        keys = self._keys()
        if keys:  # else the server decides; a client that had a key does not go on without
            self._servers.set_key(keys[0])

    def _terms(self, keys: Sequence[Key]) -> Terms:
        wants_addresses = self._settings.proxy_protocol != "off" or self._settings.access_log is not None
        off = "tcp" if not self._settings.tcp else "udp" if not self._settings.udp else ""
        return replace(Terms.of(self._url, self.client_id, keys, wants_addresses), off=off)

    def describe(self) -> str:
        """One line for an operator: its status and its counters."""
        return f"{self.status()}, {self.stats}"

    def status(self) -> str:
        """How it is now, for an operator: its servers, or why it has none, its pools, its sessions and flows."""
        servers = self._servers.describe() + self._targets.describe()
        sessions = f"{len(self.sessions)} sessions, {len(self._flows)} flows{name_protocols(self._settings.protocols)}"
        return f"{servers}, {sessions}, security: {summarize(self._servers.security)}"

    def unhealthy_reason(self) -> str:
        """Why a restart is needed, or ""."""
        ended = next(filter(None, (part.find_ended() for part in self._parts)), "")
        return ended or self._servers.unhealthy_reason()

    def view(self) -> View:
        """As `Tunnel.view`."""
        servers, connections = self._servers, self._servers.connections
        return View(
            role="client",
            unready=self._unready(),
            peers=tuple((each.control.peer, each.control.version) for each in connections),
            places=len(servers),
            round_trip=servers.round_trip,
            pool_idle=sum(len(each.pool) for each in connections),
            pool_capacity=sum(each.pool.capacity for each in connections),
            slots_used=len(self.sessions),
            slots=self._settings.semaphore_limit,
            flows=len(self._flows),
            certificate_expiry=None,
            security=servers.security,
            protocols=self._settings.protocols,
            rates=self._settings.rates,
            traffic_used=self.meter.used if self.meter else None,
            traffic_limit=self.meter.limit.bytes if self.meter else None,
            targets=self._targets.states(),
        )

    def _unready(self) -> str:
        if why := self._servers.unready_reason():
            return why
        if self._targets.answers:
            return ""
        return "the target does not answer" if len(self._targets.all) == 1 else "no target answers"

    def _log_statistics(self) -> None:
        self.log.debug("tunnel.report", literal(self.describe()), **report_fields(self.view(), self.stats))

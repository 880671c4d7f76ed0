"""The servers of a client: which there are, and a connector for each, which connects, fails and returns by itself.

There is one for each tunnel address of the URL, or with SERVERS=all for each endpoint of their names, which are
followed. All share the client's targets, sessions and limits. What one connector does is in `connector`; `client` asks
here what they have together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial

import gevent
from gevent.event import Event

from nodepass.client.connection import Connection
from nodepass.client.connector import FAREWELL, Connector, Server
from nodepass.client.launches import Launches
from nodepass.client.names import Member, Name
from nodepass.config.kinds import DAY
from nodepass.config.urls import SERVERS, Address, ClientURL
from nodepass.log import Limit
from nodepass.outbound.source import bind_of
from nodepass.outbound.ways import Proxied
from nodepass.tasks import TaskGroup
from nodepass.tunnel.handshake import Terms
from nodepass.tunnel.interface import NO_DATA_CONNECTIONS
from nodepass.tunnel.part import Common, Part
from nodepass.tunnel.security import Security, SecurityLog, security_of
from nodepass.wire.auth import Key, client_id_for

LINGER = 60.0  # seconds for which an address that a name has no more is kept: visitors have cached it, too


class Servers(Part):
    """Has a connector for each server. The client is connected while one of them is."""

    def __init__(
        self, common: Common, url: ClientURL, terms: Terms, launches: Launches, log_statistics: Callable[[], None]
    ) -> None:
        super().__init__(common)
        self.ready = Event()  # a handshake has succeeded, with any server
        self._has_all = self._settings.servers == "all"
        self._is_one = len(url.tunnels) == 1 and not self._has_all
        self._is_new = not self._stats.connects  # else the tunnel has begun again after a crash
        self._terms = terms
        self._launches = launches
        self._log_statistics = log_statistics
        self._security = security_of(url, bool(terms.key))
        self._security_log = SecurityLog(self._security, self._log)
        self._passages = url.passages
        self._proxies = {
            each.proxy: Name(Address(each.proxy.host, each.proxy.port), self._log) for each in url.passages.values()
        }
        self._bridges = TaskGroup(self._log, self._stats)
        self._names = [(address, self._name_of(address)) for address in url.tunnels]
        self._connectors: dict[str, Connector] = {}  # by the address that is shown
        self._absent: dict[str, float] = {}  # since when a name has these no more (time.monotonic())
        self._leaving: set[Connector] = set()
        self._is_stopping = False
        self._is_offering = False  # its places, to another process
        if not self._has_all:
            for address, name in self._names:
                self._add(str(address), address.host, name, self._find_proxied(address))
            self._share_pool()

    def __len__(self) -> int:
        """How many there are; a name whose addresses are not known yet is one."""
        return max(len(self._connectors), len(self._names))

    # What they have together

    @property
    def connections(self) -> list[Connection]:
        """Those that there are now, in the order of the servers."""
        return [each.connection for each in self._connectors.values() if each.connection]

    @property
    def round_trip(self) -> float | None:
        """Seconds, the longest; None while none is known."""
        known = [each.control.round_trip for each in self.connections if each.control.round_trip is not None]
        return max(known, default=None)

    @property
    def security(self) -> Security:
        """What protects the tunnel; while several servers are connected, of the one with the lowest TLS mode."""
        found = [each.control.qualify(self._security) for each in self.connections]
        return min(found, key=lambda each: each.tls or 0, default=self._security)

    def describe(self) -> str:
        """How each is, for an operator."""
        if self._is_one:
            [only] = self._connectors.values()
            return f"server {only.describe()}" if only.connection else only.describe()
        each = "; ".join(one.describe() for one in self._connectors.values())
        unknown = ", ".join(name.host for _, name in self._names if not name.has_endpoints)
        looking = f"looking up {unknown}" if unknown and self._has_all else ""
        return f"{len(self.connections)} of {len(self)} servers: {'; '.join(filter(None, (each, looking)))}"

    def unready_reason(self) -> str:
        """Why none of them can launch a session now, or ""."""
        connections = self.connections
        if not connections:
            return "not connected to the server" if self._is_one else "not connected to any server"
        return NO_DATA_CONNECTIONS if all(each.pool.is_lacking for each in connections) else ""

    def unhealthy_reason(self) -> str:
        """Why a restart is needed, or ""; a server that cannot be reached is no reason."""
        reasons = (each.unhealthy_reason() for each in self._connectors.values())
        return self.find_ended() or next(filter(None, reasons), "")

    # Start and end

    def start(self) -> None:
        self._security_log.report(None)
        for name in dict.fromkeys(name for _, name in self._names):
            if self._has_all:
                name.on_outcome = self._update
            if name.is_followed:
                self._start_loop("follow the server's name", name.follow)
        for each in self._connectors.values():
            each.start()
        if self._has_all:
            self._update()  # for addresses, which are never looked up

    def stop(self, timeout: float) -> None:
        """Leave every server, all at once; launches that they have already sent are still served."""
        self._is_stopping = True
        stops = [self._group.spawn("leave a server", each.stop, timeout) for each in self._connectors.values()]
        gevent.joinall(stops)

    def close(self) -> None:
        """End the connections at once."""
        self._is_stopping = True
        super().close()
        for each in (*self._connectors.values(), *self._leaving):
            each.close()
        self._bridges.kill()

    def offer_places(self) -> None:
        """Another process takes the places of this client: stay away where it has, or where the wire has no places."""
        self._is_offering = True
        offers = [self._group.spawn("offer a place", each.offer_place) for each in self._connectors.values()]
        gevent.joinall(offers)

    def keep_places(self) -> None:
        """It does not after all."""
        self._is_offering = False
        for each in self._connectors.values():
            each.keep_place()

    def set_key(self, key: Key) -> None:
        """Prove this key from the next connections on, which begin at once where it is another one."""
        self._terms = replace(self._terms, key=key)
        for each in self._connectors.values():
            each.set_key(key)

    # Which there are

    def _name_of(self, address: Address) -> Name:
        """What is looked up to reach a server: its own name, or that of the proxy in front of it."""
        passage = self._passages.get(address)
        return self._proxies[passage.proxy] if passage else Name(address, self._log)

    def _find_proxied(self, address: Address) -> Proxied | None:
        """The way through the proxy in front of a server, if there is one."""
        passage = self._passages.get(address)
        if not passage:
            return None
        bind = bind_of(self._settings.source_address, "SOURCE_ADDRESS")
        return Proxied(address, passage, bind, self._proxies[passage.proxy].endpoints, self._bridges.spawn)

    def _update(self) -> None:
        """With SERVERS=all: connect to the endpoints that names have now, and leave those that none has any more."""
        if self._is_stopping or self._is_offering:
            return
        found = {
            str(endpoint): (address, Member(name, endpoint))
            for address, name in reversed(self._names)  # the first name counts where two have one endpoint
            for endpoint in name.known
        }
        self._leave_absent(found)
        new = [text for text in found if text not in self._connectors]
        self._make_room(len(self._connectors) + len(new) - SERVERS)
        room = SERVERS - len(self._connectors)
        for text in new[:room]:
            address, member = found[text]
            self._add(text, address.host, member).start()
        if new[room:]:
            words = f"%(servers)d servers found, of which {SERVERS} are used at most; not used: %(left_out)s"
            limit = Limit(seconds=DAY, burst=1)
            self._log.warning("server.left_out", words, limit, servers=len(found), left_out=", ".join(new[room:]))
        self._share_pool()

    def _leave_absent(self, found: Collection[str]) -> None:
        """Leave the servers that have not been found for LINGER seconds, or that are not connected any more."""
        now = time.monotonic()
        for text, connector in list(self._connectors.items()):
            if text in found:
                self._absent.pop(text, None)
            elif not connector.connection or now - self._absent.setdefault(text, now) >= LINGER:
                self._absent.pop(text, None)
                self._remove(text)

    def _make_room(self, wanted: int) -> None:
        """Leave as many servers as are wanted at most, of those that are absent, the longest first."""
        absent = sorted(self._absent, key=lambda text: self._absent[text])
        for text in absent[: max(0, wanted)]:
            del self._absent[text]
            self._remove(text)

    def _add(self, text: str, host: str, name: Name | Member, proxied: Proxied | None = None) -> Connector:
        """Make the connector of one more server."""
        common, security = self.common, self._security_log
        if not self._is_one:
            common = replace(common, log=self._log.server(text))
            security = SecurityLog(self._security, common.log)
        terms = self._terms if self._is_one else self._terms.for_server(host, client_id_for(text, self._terms.client))
        server = Server(text, name, terms, self._is_one, self._is_new, proxied)
        launches, report = self._launches.for_server(common.log), partial(self._report, text)
        connector = self._connectors[text] = Connector(common, server, launches, security, self.ready, report)
        return connector

    def _remove(self, text: str) -> None:
        """Leave a server for good; its sessions end in their own time."""
        connector = self._connectors.pop(text)
        self._leaving.add(connector)
        self._group.spawn("leave a server", self._leave, connector)

    def _leave(self, connector: Connector) -> None:
        connector.stop(FAREWELL)
        connector.close()
        self._leaving.discard(connector)

    def _share_pool(self) -> None:
        """Divide the capacity by the number of servers, so that all pools together have MAX_POOL_CAPACITY at most."""
        highest = max(1, self._settings.max_pool_capacity // len(self))
        for each in self._connectors.values():
            each.limit_pool(min(self._settings.min_pool_capacity, highest), highest)

    def _report(self, text: str) -> None:
        """Log the tunnel's statistics, once in an interval: when the first that is connected asks for it."""
        first = next((name for name, each in self._connectors.items() if each.connection), text)
        if first == text:
            if not self._is_one:
                self._log.report_suppressed()
            self._log_statistics()

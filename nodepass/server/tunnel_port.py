"""A tunnel port: the listeners of one tunnel address and its data port, shared by the tunnels of different names.

It opens and closes the listeners, has the certificate, and knows the tunnels by name; a connection's opening says which
of them it is for. `control_listener` and `data_listener` serve its connections and ask it what they are for; `server`
makes those two, joins with its `clients` and leaves again. The port opens with the first tunnel and closes with the
last one. What happens before a connection has said which tunnel it is for is counted and logged with the tunnel that
opened the port.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from gevent.lock import Semaphore

from nodepass.config.settings import Settings
from nodepass.config.urls import ServerURL
from nodepass.errors import ProxyHeaderError, RefusedError
from nodepass.log import Log
from nodepass.net.activation import Share
from nodepass.net.listen import close_all, listen_in_range, listen_tcp, port_of
from nodepass.net.sockets import Endpoint, Socket
from nodepass.server.client_slot import ClientSlot, Trial
from nodepass.server.clients import Clients
from nodepass.server.pending import PendingConnections
from nodepass.stats import Stats
from nodepass.tasks import TaskGroup
from nodepass.tunnel.control import Agreement
from nodepass.tunnel.interface import DATA, TUNNEL
from nodepass.tunnel.part import Common, Part
from nodepass.visitors.proxies import Proxies, reset
from nodepass.wire.auth import Key, unknown_key
from nodepass.wire.negotiation import HEARTBEATS, UNKNOWN_NAME, Hello, Offer

if TYPE_CHECKING:
    from socket import socket

    from nodepass.tls.certificates import ServerCertificate

LATE_HELLOS = 256  # addresses that are remembered
LATE_HELLO = 600.0  # seconds for which they are


class Membership(NamedTuple):
    """What a data connection belongs to: a tunnel's slot, and its client or a v1 client on trial."""

    slot: ClientSlot
    agreement: Agreement
    trial: Trial | None = None

    def holds(self) -> bool:
        """Whether that client is still the connected one; a client on trial becomes it now."""
        if self.trial:
            return self.slot.promote(self.trial)
        return self.slot.agreement is self.agreement


class TunnelPort:
    """One tunnel port of the process; its tunnels have the same tls, crt, key and settings of the port's scope."""

    def __init__(
        self,
        urls: Sequence[ServerURL],
        settings: Settings,
        log: Log,
        stats: Stats,
        share: Share,
        *,
        has_several_clients: bool = False,
    ) -> None:
        """`urls`: of all tunnels that will join; `settings`: of one of them, because those used here are the same.

        `has_several_clients`: one of the tunnels does. Raises ConfigError where the certificate is not usable.
        """
        self.url = urls[0]
        self.certificate: ServerCertificate | None = None
        self.tunnel: list[socket] = []  # its listeners, while it is open
        self.data: list[socket] = []  # none where data connections come to the tunnel port
        self.proxies: Proxies | None = None
        if settings.accept_proxy:
            self.proxies = Proxies(settings.accept_proxy, settings.handshake_timeout, "tunnel port", log)
        self.only_slot: ClientSlot | None = None  # the one tunnel's, where data connections can be for no other
        self._is_shared = len(urls) > 1 or has_several_clients
        self._serves_v1 = any(not url.tunnel_name and url.wire != "2" for url in urls)
        self._settings = settings
        self._log, self._stats = log, stats
        self._share = share
        self._members: dict[Clients, Callable[[Exception], object]] = {}
        self._by_name: dict[str, Clients] = {}
        self._parts: list[Part] = []
        self._by_sid: dict[str, ClientSlot] = {}  # of the connected clients that were offered one
        self._sids: dict[Clients, list[str]] = {}  # those of each tunnel
        self._has_crashed = False
        self._changing = Semaphore()  # opening and closing let other greenlets run
        self._late_hellos: dict[str, float] = {}  # by address: time.monotonic() at which they are forgotten
        self._unknown_key = unknown_key()
        if self.url.tls:
            from nodepass.tls import stream  # noqa: F401  # all of it now, not at the first connection
            from nodepass.tls.certificates import ServerCertificate

            self.certificate = ServerCertificate(self.url.crt, self.url.key, log)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url.tunnel}, {len(self._members)} tunnels>"

    @property
    def mux(self) -> bool:
        """Whether data connections come to the tunnel port."""
        return self._settings.data_port.tunnel

    @property
    def uses_sid(self) -> bool:
        """Whether data connections say which client they belong to, because it is not plain."""
        return self.mux or self._is_shared

    @property
    def slots(self) -> list[ClientSlot]:
        """Those of the tunnels that have joined."""
        return [slot for clients in self._members for slot in clients.slots]

    @property
    def v1_slot(self) -> ClientSlot | None:
        """The slot for a v1 client: of the tunnel without a name, if it has one client, no key, and WIRE allows it.

        Several v1 clients could not be told apart.
        """
        if not self._serves_v1:
            return None
        tunnels = (each for each in self._members if not each.name and not each.keys and len(each.slots) == 1)
        return next((each.slots[0] for each in tunnels), None)

    # Tunnels

    def join(self, clients: Clients, fail: Callable[[Exception], object]) -> None:
        """Serve this tunnel, too; `fail` is called with a crash of the port. Raises ListenError at the first one."""
        with self._changing:
            if self._has_crashed or not self._members:
                self._close()
                self._open()
            self._members[clients] = fail
            self._by_name[clients.name] = clients
            clients.on_change = partial(self._learn_sids, clients)
            self.only_slot = None if self.uses_sid else clients.slots[0]

    def run(self, make_parts: Callable[[Common, TunnelPort], list[Part]]) -> None:
        """Begin to accept, unless it does so already, with the parts that are made then."""
        if not self._parts:
            loops = TaskGroup(self._log, self._stats, on_crash=self._fail)
            self._parts = make_parts(Common(self._settings, self._log, self._stats, loops), self)
            for part in self._parts:
                part.start()

    def leave(self, clients: Clients) -> None:
        """The reverse of `join`."""
        with self._changing:
            if self.only_slot in clients.slots:
                self.only_slot = None
            if self._by_name.get(clients.name) is clients:
                del self._by_name[clients.name]
            clients.on_change = int
            self._forget_sids(clients)
            if self._members.pop(clients, None) and not self._members:
                self._close()

    def end_accepting(self) -> None:
        """Leave the listeners to another process; connections that are being prepared end by themselves."""
        for part in self._parts:
            part.end_accepting()
        close_all(self.tunnel)
        close_all(self.data)

    def find_ended(self) -> str:
        """Which loop has ended although the port is open; empty while all run."""
        return next(filter(None, (part.find_ended() for part in self._parts)), "")

    def _open(self) -> None:
        self._has_crashed = False
        with contextlib.ExitStack() as opened:
            keepalive = self._settings.keepalive
            self.tunnel = listen_tcp(self.url.tunnel, "tunnel address", self._share.of(TUNNEL), keepalive)
            opened.callback(close_all, self.tunnel)
            if not self.mux:
                host, ports = self.url.tunnel.host, self._settings.data_port
                self.data = listen_in_range(host, ports, "data port", self._share.of(DATA), keepalive)
            opened.pop_all()

    def _close(self) -> None:
        parts, self._parts = self._parts, []
        for part in parts:
            part.close()
        close_all(self.tunnel)
        close_all(self.data)

    def _fail(self, error: Exception) -> None:
        self._has_crashed = True  # a tunnel that comes back does not wait for one that has not left yet
        for fail in list(self._members.values()):
            fail(error)

    # What a connection is for

    def named(self, name: str) -> Clients | None:
        """The tunnel of this name."""
        return self._by_name.get(name)

    def find(self, hello: Hello) -> Clients | None:
        """The tunnel that a client asks for; None for an unknown one that is challenged all the same.

        Raises RefusedError where no tunnel of the port has a key, so that nothing is given away.
        """
        clients = self.named(hello.name)
        if clients or any(each.keys for each in self._members):
            return clients
        raise RefusedError(UNKNOWN_NAME, f"there is no tunnel {hello.name!r} at this port")

    def keys_of(self, clients: Clients | None) -> Sequence[Key]:
        """What a client must prove; an unknown tunnel has a random key."""
        return clients.keys if clients else (self._unknown_key,)

    def offer(self, version: int, part: Part | None = None) -> Offer:
        """What an admitted client of a tunnel is told, but for the proof of a key; `part`: of that tunnel."""
        port = port_of(self.data or self.tunnel)
        if version == 1:
            return Offer(port, self.url.tls)
        lowest, highest = HEARTBEATS
        settings = part.common.settings if part else self._settings
        heartbeat = min(highest, max(lowest, round(1000 * settings.report_interval)))
        return Offer(port, self.url.tls, heartbeat, os.urandom(16).hex() if self.uses_sid else "", self.mux)

    def membership(self, slot: ClientSlot, peer: Endpoint) -> Membership | None:
        """What a connection from this address belongs to, where it is plain that it is for this tunnel."""
        agreement = slot.agreement_with(peer)
        if slot.trial_of(peer) or not agreement:
            return self.find_v1(peer)
        return Membership(slot, agreement)

    def find_sid(self, sid: str) -> Membership | None:
        """The client whose offer had this sid."""
        slot = self._by_sid.get(sid)
        if slot and (agreement := slot.agreement) and agreement.offer.sid == sid:
            return Membership(slot, agreement)
        return None

    def _learn_sids(self, clients: Clients) -> None:
        """A client of this tunnel has come or left; thousands of other tunnels are not looked at."""
        self._forget_sids(clients)
        slots = {agreed.offer.sid: slot for slot in clients.slots if (agreed := slot.agreement) and agreed.offer.sid}
        self._by_sid.update(slots)
        self._sids[clients] = list(slots)

    def _forget_sids(self, clients: Clients) -> None:
        for sid in self._sids.pop(clients, ()):
            del self._by_sid[sid]

    def find_v1(self, peer: Endpoint) -> Membership | None:
        """The v1 client, on trial or not, that a connection from this address belongs to."""
        slot = self.v1_slot
        if not slot:
            return None
        if trial := slot.trial_of(peer):  # before the client, which does not respond then
            return Membership(slot, trial.agreement, trial)
        if slot.version == 1 and slot.agreement and slot.is_client(peer):
            return Membership(slot, slot.agreement)
        return None

    def expects(self, peer: Endpoint) -> bool:
        """Whether a data connection from this address can belong to a client; one with a key may come from anywhere."""
        return any(slot.agreement_with(peer) for slot in self.slots) or self.find_v1(peer) is not None

    # Behind proxies

    def read_header(
        self, sock: Socket, proxy: Endpoint, pending: PendingConnections, failures: Counter[str]
    ) -> Endpoint | None:
        """The peer of a pending connection that a proxy has passed on; None where it is refused, and counted.

        It is not pending any more then: the caller has it accepted again, as the peer's.
        """
        assert self.proxies
        try:
            peer = self.proxies.read(sock, proxy, pending.began(sock)).peer
        except ProxyHeaderError as error:
            self.proxies.refuse(proxy, error, failures)
            reset(sock)
            return None
        except BaseException:
            sock.close()
            raise
        pending.release(sock)
        return peer

    # Clients whose hello was late

    def remember_late_hello(self, peer: Endpoint) -> None:
        """A connection that was taken for v1 has begun to speak: this address gets more time from now on."""
        self._late_hellos.pop(peer.host, None)
        while len(self._late_hellos) >= LATE_HELLOS:
            del self._late_hellos[next(iter(self._late_hellos))]
        self._late_hellos[peer.host] = time.monotonic() + LATE_HELLO

    def was_late(self, peer: Endpoint) -> bool:
        """Whether that has happened lately."""
        return self._late_hellos.get(peer.host, 0.0) > time.monotonic()

"""One target: a service that sessions are connected to, by TCP, UDP or a Unix socket, and what is known of it.

The name of one with an address is followed (see `names`), so that a dial uses what is known. Of several endpoints the
one that answered last comes first; TCP and UDP may be served at different ones. Which target a session gets is decided
by `targets`; nothing here chooses.
"""

from __future__ import annotations

from gevent.event import Event

from nodepass.client.names import Name
from nodepass.config.urls import Address, Place, UnixPath
from nodepass.log import Log
from nodepass.net.sockets import KEEPALIVE, LOCAL, Bind, Endpoint, Socket, dial
from nodepass.net.unix import dial_unix

RISE, FALL = 2, 3  # results of checks in a row that make a target up, or down, as in haproxy


class Health:
    """Up or down, after so many results in a row that say the opposite. No I/O."""

    def __init__(self, rise: int = 1, fall: int = 2, is_proven: bool = True) -> None:
        """`is_proven`: else the first failure is enough."""
        self.is_up = True
        self._rise = rise
        self._fall = fall
        self._contrary = 0 if is_proven else fall - 1

    @property
    def is_doubtful(self) -> bool:
        """Whether it is up, and the last result was a failure."""
        return self.is_up and self._contrary > 0

    def note(self, ok: bool) -> bool:
        """Take a result; whether that has changed the state."""
        if ok == self.is_up:
            self._contrary = 0
            return False
        self._contrary += 1
        if self._contrary < (self._rise if ok else self._fall):
            return False
        self.is_up, self._contrary = ok, 0
        return True


class Target:
    """What both kinds of target have."""

    def __init__(self, place: Place, health: Health) -> None:
        self.text = str(place)  # as in the URL
        self.host = http_host(place)
        self.health = health
        self.failure: OSError | None = None  # of the last dial or check, until one succeeds
        self.failed = Event()  # a dial has failed, and none has succeeded since
        self.sessions = 0  # that run, or are being connected; flows, too

    def __str__(self) -> str:
        return self.text

    @property
    def answers(self) -> bool:
        """Whether it is up, as far as is known."""
        return self.health.is_up

    @property
    def why(self) -> OSError | None:
        """Why it does not answer, as far as is known."""
        return self.failure

    def dial(self, timeout: float) -> Socket:
        """A stream connection to the target. Raises OSError."""
        raise NotImplementedError


class UnixTarget(Target):
    """A Unix stream socket. It carries no datagrams."""

    def __init__(self, place: UnixPath, health: Health) -> None:
        super().__init__(place, health)
        self._path = place.path

    def dial(self, timeout: float) -> Socket:
        return dial_unix(self._path, timeout)


class HostTarget(Target):
    """An address or a name with a port, and which of its endpoints answer."""

    def __init__(
        self,
        address: Address,
        log: Log,
        keepalive: float = KEEPALIVE,
        health: Health | None = None,
        bind: Bind | None = None,
    ) -> None:
        """`keepalive`: seconds between probes of its TCP connections; `bind`: where they, and datagrams, come from."""
        super().__init__(address, health or Health())
        self.name = Name(address, log)
        self.bind = bind
        self._keepalive = keepalive
        self._answered: Endpoint | None = None  # by TCP, the last one
        self._answered_udp: Endpoint | None = None

    @property
    def answers(self) -> bool:
        """Whether it is up, and its name can be resolved."""
        return self.health.is_up and (self.name.has_endpoints or not self.name.failure)

    @property
    def why(self) -> OSError | None:
        return self.name.failure or self.failure

    def dial(self, timeout: float) -> Socket:
        """A TCP connection to the target. Raises OSError, after a second attempt where it has moved."""
        endpoints, version = self.name.endpoints(timeout), self.name.version
        try:
            sock = dial(_first(self._answered, endpoints), timeout, self._keepalive, self.bind)
        except OSError:
            endpoints = self.name.newer()
            if self.name.version == version:
                raise
            sock = dial(endpoints, timeout, self._keepalive, self.bind)
        if len(endpoints) > 1:
            self._answered = next((each for each in endpoints if each.sockaddr == sock.getpeername()), None)
        return sock

    def datagram_endpoints(self) -> list[Endpoint]:
        """Where to send the datagrams of a flow, the best first, of what is known."""
        return _first(self._answered_udp or self._answered, self.name.known)

    def note_answer(self, endpoint: Endpoint) -> None:
        """A datagram has come from this endpoint: new flows begin with it."""
        self._answered_udp = endpoint


def make_target(place: Place, log: Log, keepalive: float, has_checks: bool, bind: Bind | None = None) -> Target:
    """The target at a place of a URL; `has_checks`: only they make it up again, and the first one counts at once."""
    health = Health(RISE, FALL, is_proven=False) if has_checks else Health()
    if isinstance(place, UnixPath):
        return UnixTarget(place, health)
    return HostTarget(place, log, keepalive, health, bind)


def http_host(place: Place) -> str:
    """What a target is called in a request of HTTP."""
    if isinstance(place, UnixPath):
        return LOCAL
    return str(place if place.host else Address(LOCAL, place.port))


def _first(preferred: Endpoint | None, endpoints: list[Endpoint]) -> list[Endpoint]:
    return sorted(endpoints, key=lambda each: each != preferred) if len(endpoints) > 1 else endpoints

"""The slot: the place that a server has for its client.

It keeps what belongs to that client: the control connection while there is one, the pool, and the flows of UDP. All of
it stays over reconnects, and so do the listeners. A second client would be a second slot.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from gevent.event import Event
from gevent.lock import Semaphore

from nodepass.config import Settings
from nodepass.errors import ClosedError, NoDataConnection, RefusedError
from nodepass.log import Log
from nodepass.net.sockets import Endpoint, acknowledged
from nodepass.net.stream import Stream
from nodepass.server.data_listener import DataListener
from nodepass.server.pool import ServerPool
from nodepass.server.udp_flows import VisitorFlows
from nodepass.stats import Stats
from nodepass.tunnel.control import Agreement, Ending, ServerControl
from nodepass.wire.auth import Key
from nodepass.wire.signals import BUSY, LANE, Launch

if TYPE_CHECKING:
    from OpenSSL import SSL

LIFE_SIGN_WITHIN = 1.0  # seconds for a client to show that it lives when another asks for its place


class ClientSlot:
    """One client's place; `control` is None while no client is connected."""

    def __init__(
        self, key: Key | None, settings: Settings, context: Callable[[], SSL.Context | None], log: Log, stats: Stats
    ) -> None:
        self.control: ServerControl | None = None
        self.pool = ServerPool(log, stats, settings.min_pool_capacity, settings.max_pool_capacity)
        self.flows = VisitorFlows(self.launch, settings, log, stats)
        self._key = key
        self._log = log
        self._admission = Semaphore()
        self._connected = Event()
        self.filler = DataListener(
            self.pool, self._owner, self._connected.is_set, context, log, stats, settings.handshake_timeout
        )

    @property
    def version(self) -> int:
        """The wire's version that the client speaks, 0 while none is connected."""
        return self.control.version if self.control else 0

    def wait_for_client(self, timeout: float) -> bool:
        """Whether a client is connected now or within `timeout` seconds."""
        return bool(self._connected.wait(timeout))

    def is_client(self, peer: Endpoint) -> bool:
        """Whether a connection comes from the address of the connected client."""
        return self.control is not None and peer.host == self.control.endpoint.host

    def _owner(self, peer: Endpoint) -> Agreement | None:
        """The agreement that a data connection belongs to; without a key it must come from the client's address."""
        return self.control.agreement if self.control and (self._key or self.is_client(peer)) else None

    @contextlib.contextmanager
    def admission(self, control: ServerControl, proven: bool) -> Iterator[None]:
        """Hold the place for a client while its handshake ends; then it is the connected one.

        A client that has proven the key takes over at once, one without a key only from a client that gives no sign of
        life. Raises OSError, RefusedError among them.
        """
        with self._admission:
            if acknowledged(control.sock) is None:
                raise ClosedError("it has gone while it waited for its turn")
            if self.control:
                self._replace(self.control, control, proven)
            yield
            self.control = control
            self._connected.set()

    def _replace(self, incumbent: ServerControl, control: ServerControl, proven: bool) -> None:
        """End the connection of the connected client, if it may be. Raises RefusedError."""
        if proven:
            words = "client %(client)s has proven the key and takes over from %(incumbent)s"
            self._log.warning("client.replaced", words, client=control.peer, incumbent=incumbent.peer)
            self.lose(incumbent, Ending("replaced", f"{control.peer} has proven the key and takes over"))
        elif incumbent.shows_life(LIFE_SIGN_WITHIN):
            raise RefusedError(BUSY, f"another client, {incumbent.peer}, is connected and alive")
        else:
            incumbent.vanished = True
            self.lose(incumbent, Ending("silent", f"no sign of life, and {control.peer} asks for its place"))

    def lose(self, control: ServerControl, ending: Ending) -> None:
        """End a control connection. Its idle data connections go with it, its sessions run on.

        The lanes of a client that vanished are as dead as it is, and end: their flows begin anew with the next client.
        """
        control.close(ending)
        if self.control is control:
            self.control = None
            self._connected.clear()
            self.pool.flush("its client is gone")
            if control.vanished:
                self.flows.end_all()
            else:
                self.flows.abandon()

    def launch(self, kind: int, timeout: float) -> tuple[str, Stream]:
        """A data connection that the client has been told to use for a session; it is the caller's now.

        Where the client goes away at that moment, the next one's connections serve as well. Raises NoDataConnection.
        """
        deadline = time.monotonic() + timeout
        while True:
            id, stream = self.pool.take(max(0.0, deadline - time.monotonic()))
            try:
                # One that was given to us while its client was being replaced is closed: the next knows no such id.
                if stream.sock.fileno() >= 0 and self._announce(id, kind):
                    return id, stream
            except BaseException:
                stream.close()
                raise
            stream.close()
            if time.monotonic() >= deadline:
                raise NoDataConnection("the client went away")

    def _announce(self, id: str, kind: int) -> bool:
        """Whether the client could be told."""
        if not self.control:
            return False
        if kind == LANE and self.control.version < 2:
            raise NoDataConnection("the client that is connected now speaks wire v1, which has no lanes")
        with contextlib.suppress(OSError):
            self.control.send(Launch(id, kind))
            return True
        return False

"""The link: the place that a server has for its client.

It keeps what belongs to that client: the control connection while there is one, the pool, and the listener of the data
connections, which stays open over reconnects. A second client would be a second link.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from gevent.lock import Semaphore

from nodepass.config import Settings
from nodepass.control import Control
from nodepass.errors import NoDataConnection
from nodepass.fillers import AcceptingFiller
from nodepass.log import Log
from nodepass.net import Stream, plain_host
from nodepass.pool import ServerPool
from nodepass.protocol import Launch, Tunnel
from nodepass.stats import Stats

if TYPE_CHECKING:
    from OpenSSL import SSL

LIFE_SIGN_WITHIN = 1.0  # seconds for a client to show that it lives when another asks for its place


class Link:
    """One client's place; `control` is None while no client is connected."""

    def __init__(self, settings: Settings, log: Log, stats: Stats) -> None:
        self.control: Control | None = None
        self.pool = ServerPool(log, stats, settings.min_pool_capacity, settings.max_pool_capacity)
        self.filler = AcceptingFiller(self.pool, log, stats, settings.handshake_timeout)
        self._admission = Semaphore()
        self._log = log

    def accept_data(self, listener: socket.socket, context: Callable[[], SSL.Context | None]) -> None:
        """Fill the pool from this listener until it is closed."""
        self.filler.run(listener, self._owner, context)

    def _owner(self, sock: socket.socket) -> Control | None:
        """The control connection that a data connection belongs to: it must come from the same address."""
        try:
            same = self.control and plain_host(sock.getpeername()) == plain_host(self.control.sock.getpeername())
        except OSError:
            return None
        return self.control if same else None

    def admit(self, control: Control, tunnel: Tunnel) -> bool:
        """Make this the client's control connection, unless a living client has the place. Raises OSError."""
        with self._admission:
            if incumbent := self.control:
                if incumbent.acknowledges(LIFE_SIGN_WITHIN):
                    self._log.warning("client %s turned away: %s is connected and alive", control.peer, incumbent.peer)
                    return False
                self.lose(incumbent, f"no sign of life, and {control.peer} asks for its place")
            control.send(tunnel)
            self.control = control
        return True

    def lose(self, control: Control, because: str) -> None:
        """End a control connection. Its idle data connections go with it, its sessions run on."""
        control.close(because)
        if self.control is control:
            self.control = None
            self.pool.flush("its client is gone")

    def launch(self, kind: int, timeout: float) -> tuple[str, Stream]:
        """A data connection that the client has been told to use for a session; it is the caller's now.

        Where the client goes away at that moment, the next one's connections serve as well. Raises NoDataConnection.
        """
        deadline = time.monotonic() + timeout
        while True:
            id, stream = self.pool.take(max(0.0, deadline - time.monotonic()))
            try:
                if self.control:
                    self.control.send(Launch(id, kind))
                    return id, stream
            except OSError:
                pass
            except BaseException:
                stream.close()
                raise
            stream.close()
            if time.monotonic() >= deadline:
                raise NoDataConnection("the client went away")

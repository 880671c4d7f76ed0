"""The slot: a server's place for its client, which one client has at a time.

It keeps what belongs to that client: the control connection while there is one, the pool, and the flows of UDP. The
slot and the listeners outlive the client, so sessions and visitors pass over a reconnect. It is filled by `admission`
and emptied by `release`, and nowhere else. A second client would be a second slot.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from gevent.event import Event
from gevent.lock import Semaphore

from nodepass.errors import ClosedError, NoDataConnection, RefusedError
from nodepass.net.sockets import Endpoint, acknowledged
from nodepass.net.stream import Stream
from nodepass.server.pool import ServerPool
from nodepass.server.udp_flows import VisitorFlows
from nodepass.tunnel.control import STOPPING, Agreement, Ending, ServerControl
from nodepass.tunnel.part import Common, Part
from nodepass.wire.auth import Key
from nodepass.wire.signals import BUSY, LANE, Launch

LIFE_SIGN_WITHIN = 1.0  # seconds for a client to react when another asks for its slot


class ClientSlot(Part):
    """One client's place; `control` is None while no client is connected."""

    def __init__(self, common: Common, key: Key | None) -> None:
        super().__init__(common)
        settings = common.settings
        self.key = key
        self.control: ServerControl | None = None
        self.pool = ServerPool(self._log, self._stats, settings.min_pool_capacity, settings.max_pool_capacity)
        self.flows = VisitorFlows(common, self.launch)
        self._admitting = Semaphore()
        self._connected = Event()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.control or 'free'}>"

    def close(self) -> None:
        super().close()
        if self.control:
            self.release(self.control, STOPPING)

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

    def agreement_with(self, peer: Endpoint) -> Agreement | None:
        """The agreement that a data connection belongs to; without a key it must come from the client's address."""
        return self.control.agreement if self.control and (self.key or self.is_client(peer)) else None

    @contextlib.contextmanager
    def admission(self, control: ServerControl, proven: bool) -> Iterator[None]:
        """Hold the slot for a client while it is sent the offer; then it is the connected client.

        A client that has proven the key takes over at once, one without a key only from a client that does not respond.
        Raises OSError, RefusedError among them.
        """
        with self._admitting:
            if acknowledged(control.sock) is None:
                raise ClosedError("disconnected while waiting for its turn")
            if self.control:
                self._replace(self.control, control, proven)
            yield
            self.control = control
            self._connected.set()

    def _replace(self, incumbent: ServerControl, control: ServerControl, proven: bool) -> None:
        """Free the slot from the client that has it. Raises RefusedError where that one may stay."""
        if proven:
            words = "client %(client)s authenticated with the key and replaces %(incumbent)s"
            self._log.warning("client.replaced", words, client=control.peer, incumbent=incumbent.peer)
            self.release(incumbent, Ending("replaced", f"replaced by {control.peer}"))
        elif incumbent.shows_life(LIFE_SIGN_WITHIN):
            raise RefusedError(BUSY, f"another client, {incumbent.peer}, is connected and responding")
        else:
            incumbent.vanished = True
            self.release(incumbent, Ending("silent", f"not responding; replaced by {control.peer}"))

    def release(self, control: ServerControl, ending: Ending) -> None:
        """Close a control connection, and free the slot if it is this client's: its sessions run on.

        Its idle data connections are closed. Lanes of a client that has vanished are dead, too, and end; their flows
        begin again with the next client. Lanes of a client that was replaced go on while it takes their datagrams.
        """
        control.close(ending)
        if self.control is control:
            self.control = None
            self._connected.clear()
            self.pool.flush("its client disconnected")
            if control.vanished:
                self.flows.end_all()
            else:
                self.flows.abandon()

    def launch(self, kind: int, timeout: float) -> tuple[str, Stream]:
        """A data connection that the client has been told to use for a session, and its id; it is the caller's now.

        Where the client goes away meanwhile, a connection of the next one serves as well. Raises NoDataConnection.
        """
        deadline = time.monotonic() + timeout
        while True:
            id, stream = self.pool.take(max(0.0, deadline - time.monotonic()))
            try:
                # It may have been closed by `release` before this greenlet ran: the next client knows no such id.
                if stream.sock.fileno() >= 0 and self._send_launch(id, kind):
                    return id, stream
            except BaseException:
                stream.close()
                raise
            stream.close()
            if time.monotonic() >= deadline:
                raise NoDataConnection("the client disconnected")

    def _send_launch(self, id: str, kind: int) -> bool:
        """Whether a client could be told. Raises NoDataConnection where the connected one has no such sessions."""
        if not self.control:
            return False
        if kind == LANE and self.control.version < 2:
            raise NoDataConnection("the client now connected speaks wire v1, which has no lanes")
        with contextlib.suppress(OSError):
            self.control.send(Launch(id, kind))
            return True
        return False

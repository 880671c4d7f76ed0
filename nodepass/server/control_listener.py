"""The server's gate, its tunnel port: who comes there, and how one newcomer becomes the client.

Each newcomer is heard in the lobby, in a greenlet of its own. Where data connections come to the same port, they are
told apart here and handed to the pool's filler. Who may be the client is the slot's decision.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import gevent

from nodepass.config import Settings
from nodepass.errors import RefusedError, reason
from nodepass.log import Limit, Log
from nodepass.net.listen import accept_forever
from nodepass.net.sockets import Endpoint, as_blocking, as_plain
from nodepass.server.client_slot import ClientSlot
from nodepass.server.pending import PendingConnections
from nodepass.stats import Stats, failure
from nodepass.tasks import TaskGroup
from nodepass.tunnel.control import STOPPING, ServerControl
from nodepass.tunnel.handshake import accept_client
from nodepass.wire.auth import Key
from nodepass.wire.signals import DATA_PREFIX, SHUTDOWN, TLS_RECORD, Offer, Refusal

FIRST_BYTES_WITHIN = 0.25  # seconds; silence is a control connection of wire v1
_STEP = 0.005  # seconds between looks at a beginning that is not yet long enough


class ControlListener:
    """Lets clients in, from `run` on; after `shut` it turns them away."""

    def __init__(
        self,
        slot: ClientSlot,
        key: Key | None,
        settings: Settings,
        loops: TaskGroup,
        tunnel: Callable[[], Offer],
        log: Log,
        stats: Stats,
    ) -> None:
        """`tunnel`: what a client that has been let in is told; `loops`: for its heartbeats."""
        self._slot = slot
        self._key = key
        self._settings = settings
        self._log = log
        self._stats = stats
        self._loops = loops
        self._tunnel = tunnel
        self._pending = PendingConnections("the tunnel address", log, stats)
        self._is_shut = False

    def run(self, listener: socket.socket) -> None:
        """Accept until the listener is closed."""
        for sock, peer in accept_forever(listener, self._log):
            keyed = self._key is not None  # then there is no client that waits to be spoken to
            if not self._tunnel().mux:
                self._pending.receive(as_blocking(sock), self._serve, speaks_first=keyed)
            elif self._slot.version == 1 and self._slot.is_client(peer):
                self._slot.filler.admit(sock, peer)
            else:
                self._pending.receive(as_blocking(sock), self._sort, peer, speaks_first=keyed)

    def shut(self) -> None:
        """Let no newcomer become the client any more; the one that is stays."""
        self._is_shut = True

    def close(self) -> None:
        """End everything at once."""
        self._pending.kill()

    def _sort(self, sock: socket.socket, peer: Endpoint) -> None:
        """Tell a client from a data connection."""
        try:
            is_data = is_data_connection(sock)
        except OSError:
            sock.close()
            return
        except BaseException:
            sock.close()
            raise
        if is_data:
            self._pending.leave(sock)
            self._slot.filler.admit(as_plain(sock), peer)
        else:
            self._serve(sock)

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.closing(sock):
            try:
                control = ServerControl(sock, self._settings.report_interval, self._log, self._stats)
                admitted = self._greet(control)
            except OSError as error:
                self._stats.control_failures[why := failure(error)] += 1
                self._log.debug(
                    "client.handshake_failed",
                    "a connection to the tunnel address came to nothing: %(error)s",
                    reason=why,
                    error=reason(error),
                )
            else:
                if admitted:
                    self._stay_with(control)

    def _greet(self, control: ServerControl) -> bool:
        """Whether a newcomer is the client now. Raises OSError."""
        try:
            left = self._pending.left(control.sock, self._settings.handshake_timeout)
            accept_client(control, self._key, self._tunnel(), left, partial(self._admission, control))
        except RefusedError as error:
            self._stats.control_failures[why := failure(error)] += 1
            words = "client %(client)s turned away: %(error)s"
            self._log.warning("client.rejected", words, Limit(), client=control.peer, reason=why, error=error)
            with contextlib.suppress(OSError):  # it has been counted already
                control.send(Refusal(error.reason))
            return False
        return True

    def _admission(self, control: ServerControl, proven: bool) -> AbstractContextManager[None]:
        if self._is_shut:
            raise RefusedError(SHUTDOWN, "this server is shutting down")
        return self._slot.admission(control, proven)

    def _stay_with(self, control: ServerControl) -> None:
        """Keep the connected client until it is gone."""
        self._pending.leave(control.sock)
        self._stats.connects += 1
        words = "client connected from %(client)s: wire v%(wire)d"
        self._log.info("client.connected", words, client=control.peer, wire=control.version)
        beat = self._loops.spawn("send heartbeats", control.beat)
        try:
            control.wait_until_ended()
        finally:
            beat.kill(block=False)
            self._slot.lose(control, STOPPING)
            ending = control.ending
            words = "client disconnected: %(error)s (%(client)s)"
            self._log.info("client.disconnected", words, client=control.peer, reason=ending.reason, error=ending.words)


def is_data_connection(sock: socket.socket) -> bool:
    """Whether a newcomer is a data connection; what marks it as one is read, anything else stays to be read.

    Raises OSError.
    """
    deadline = time.monotonic() + FIRST_BYTES_WITHIN
    begin = b""
    while (left := deadline - time.monotonic()) > 0:
        begin = _peek(sock, left)
        if begin == DATA_PREFIX:
            sock.recv(len(DATA_PREFIX))
            return True
        if not begin or not DATA_PREFIX.startswith(begin):
            break
        gevent.sleep(_STEP)
    return begin.startswith(TLS_RECORD)


def _peek(sock: socket.socket, timeout: float) -> bytes:
    """The first bytes, as many as are here; none in silence or at the end of the stream."""
    sock.settimeout(timeout)
    try:
        return sock.recv(len(DATA_PREFIX), socket.MSG_PEEK)
    except TimeoutError:
        return b""
    finally:
        sock.settimeout(None)

"""Accepts connections to the tunnel port, and serves the one that becomes the control connection of the client.

Each pending connection has a greenlet of its own, which shakes hands, and stays with the client that is admitted until
it is gone. Where data connections come to the same port (DATA_PORT=tunnel), they are told apart by their first bytes
and handed to `data_listener`. Which client is admitted is decided by `client_slot`.
"""

from __future__ import annotations

import contextlib
import socket
from contextlib import AbstractContextManager
from functools import partial

import gevent

from nodepass.errors import RefusedError, reason
from nodepass.log import Limit
from nodepass.net.listen import accept_forever
from nodepass.net.sockets import Endpoint, as_blocking, as_plain
from nodepass.server.client_slot import ClientSlot
from nodepass.server.data_listener import DataListener
from nodepass.server.pending import QUIET, PendingConnections
from nodepass.stats import failure
from nodepass.tunnel.control import STOPPING, ServerControl
from nodepass.tunnel.handshake import accept_client
from nodepass.tunnel.part import Common, Part
from nodepass.wire.signals import DATA_PREFIX, SHUTDOWN, TLS_RECORD, Offer, Refusal

FIRST_BYTES_WITHIN = 0.25  # seconds; silence is a control connection of wire v1
_STEP = 0.005  # seconds between two looks at the beginning of DATA_PREFIX


class ControlListener(Part):
    """Admits clients; from `stop` on it refuses them, and the connected one stays."""

    def __init__(
        self,
        common: Common,
        listeners: list[socket.socket],
        slot: ClientSlot,
        data_listener: DataListener,
        offer: Offer,
    ) -> None:
        """`offer`: what an admitted client is told."""
        super().__init__(common)
        self._listeners = listeners
        self._slot = slot
        self._data_listener = data_listener
        self._offer = offer
        self._pending = PendingConnections("tunnel", self._log, self._stats)
        self._is_stopping = False

    def start(self) -> None:
        for listener in self._listeners:
            self._start_loop("accept clients", self._accept, listener)

    def stop(self, timeout: float) -> None:  # noqa: ARG002
        self._is_stopping = True

    def close(self) -> None:
        super().close()
        self._pending.close()

    def _accept(self, listener: socket.socket) -> None:
        """Accept until the listener is closed."""
        for sock, peer in accept_forever(listener, self._log):
            if self._offer.mux and self._slot.version == 1 and self._slot.is_client(peer):
                self._data_listener.admit(sock, peer)  # a v1 client does not mark them
            else:
                # Without a key, a peer that says nothing is a v1 client that waits for the server to speak first.
                silence = QUIET if self._slot.key else 0.0
                self._pending.accept(as_blocking(sock), self._serve, peer, silence=silence)

    def _serve(self, sock: socket.socket, peer: Endpoint) -> None:
        """One connection: a data connection is handed on, another may become the client's."""
        with contextlib.closing(sock):
            try:
                if self._offer.mux and is_data_connection(sock):
                    self._pending.release(sock)
                    self._data_listener.admit(as_plain(sock), peer)
                    return
                control = ServerControl(sock, self._settings.report_interval, self._log, self._stats)
                admitted = self._shake_hands(control)
            except OSError as error:
                self._stats.control_failures[why := failure(error)] += 1
                words = "control handshake failed: %(error)s"
                self._log.debug("client.handshake_failed", words, reason=why, error=reason(error))
                return
            if admitted:
                self._pending.release(sock)
                self._stay_with(control)

    def _shake_hands(self, control: ServerControl) -> bool:
        """Whether it is the client's control connection now; one that is refused is told why. Raises OSError."""
        left = self._pending.time_left(control.sock, self._settings.handshake_timeout)
        try:
            accept_client(control, self._slot.key, self._offer, left, partial(self._admission, control))
        except RefusedError as error:
            self._stats.control_failures[why := failure(error)] += 1
            words = "rejected client %(client)s: %(error)s"
            self._log.warning("client.rejected", words, Limit(), client=control.peer, reason=why, error=error)
            with contextlib.suppress(OSError):  # it has been counted already
                control.send(Refusal(error.reason))
            return False
        return True

    def _admission(self, control: ServerControl, proven: bool) -> AbstractContextManager[None]:
        if self._is_stopping:
            raise RefusedError(SHUTDOWN, "the server is shutting down")
        return self._slot.admission(control, proven)

    def _stay_with(self, control: ServerControl) -> None:
        """Serve the client that is connected now until it is gone."""
        self._stats.connects += 1
        words = "client connected from %(client)s: wire v%(wire)d"
        self._log.info("client.connected", words, client=control.peer, wire=control.version)
        beat = self._group.spawn("send heartbeats", control.beat)
        try:
            control.wait_until_ended()
        finally:
            beat.kill(block=False)
            self._slot.release(control, STOPPING)
            ending = control.ending
            words = "client disconnected: %(error)s (%(client)s)"
            self._log.info("client.disconnected", words, client=control.peer, reason=ending.reason, error=ending.words)


def is_data_connection(sock: socket.socket) -> bool:
    """Whether its first bytes are those of a data connection: DATA_PREFIX, which is read, or a TLS record's.

    Anything else stays to be read. Raises OSError.
    """
    begin = b""
    with contextlib.suppress(TimeoutError), gevent.Timeout(FIRST_BYTES_WITHIN, TimeoutError()):
        begin = sock.recv(len(DATA_PREFIX), socket.MSG_PEEK)
        while begin and begin != DATA_PREFIX and DATA_PREFIX.startswith(begin):
            gevent.sleep(_STEP)
            begin = sock.recv(len(DATA_PREFIX), socket.MSG_PEEK)
    if begin == DATA_PREFIX:
        sock.recv(len(DATA_PREFIX))
        return True
    return begin.startswith(TLS_RECORD)

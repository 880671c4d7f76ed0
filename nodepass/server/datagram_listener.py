"""The server's UDP door: receives visitors' datagrams and sends each the way that the connected client's wire has.

With a v2 client they go on lanes, with a v1 client each is a session of its own; while no client is there they wait
for one.
"""

from __future__ import annotations

import socket

import gevent

from nodepass.config import Settings, format_duration
from nodepass.errors import NoDataConnection, reason
from nodepass.log import Limit, Log
from nodepass.net.sockets import wait_readable
from nodepass.net.udp import ReplyAddress, receive_datagram, send_datagram
from nodepass.server.client_slot import ClientSlot
from nodepass.stats import Stats
from nodepass.tasks import WorkerPool
from nodepass.tunnel.udp import ANSWER_GRACE, drop_datagram, read_datagram
from nodepass.wire.signals import UDP

DATAGRAMS_PER_TURN = 32  # received in a row, then what they set going gets to run


class DatagramListener:
    """Receives on one socket. No datagram waits here for another's session."""

    def __init__(
        self, sock: socket.socket, slot: ClientSlot, sessions: WorkerPool, settings: Settings, log: Log, stats: Stats
    ) -> None:
        self._sock = sock
        self._slot = slot
        self._sessions = sessions
        self._settings = settings
        self._log = log
        self._stats = stats

    def run(self) -> None:
        """Receive until killed."""
        received = 0
        while True:
            try:
                payload, visitor = receive_datagram(self._sock)
            except OSError as error:
                self._log.warning(
                    "datagram.receive_failed", "cannot receive datagrams: %(error)s", Limit(), error=reason(error)
                )
                gevent.sleep(0.01)
                continue
            self._let_in(payload, visitor)
            received += 1
            if received % DATAGRAMS_PER_TURN == 0:
                wait_readable(self._sock)

    def _let_in(self, payload: bytes, visitor: ReplyAddress) -> None:
        if self._slot.version == 2:
            self._slot.flows.carry(self._sock, payload, visitor)
        elif self._sessions.full():
            # To wait would stall the datagrams of others.
            self._drop(payload, visitor, "limit", "SEMAPHORE_LIMIT is reached")
        else:
            self._sessions.spawn("serve datagram", self._serve, payload, visitor)

    def _serve(self, payload: bytes, visitor: ReplyAddress) -> None:
        """Carry a datagram that cannot go on a lane right now."""
        timeout = self._settings.pool_get_timeout
        largest = self._settings.udp_data_buf_size
        if not self._slot.wait_for_client(timeout):
            because = f"no data connection within {format_duration(timeout)}, no client is connected"
            self._drop(payload, visitor, "unserved", because)
        elif self._slot.version == 2:
            self._slot.flows.carry(self._sock, payload, visitor)
        elif not payload:
            self._drop(payload, visitor, "empty", "it is empty, which wire v1 cannot carry")
        elif len(payload) > largest:
            self._drop(payload, visitor, "too_large", f"it is larger than UDP_DATA_BUF_SIZE ({largest})")
        else:
            self._ask(payload, visitor)

    def _ask(self, question: bytes, visitor: ReplyAddress) -> None:
        """Wire v1: one data connection carries the datagram and its one answer."""
        settings = self._settings
        try:
            id, data = self._slot.launch(UDP, settings.pool_get_timeout)
        except NoDataConnection:
            because = f"no data connection within {format_duration(settings.pool_get_timeout)}"
            self._stats.udp.ended["unserved"] += 1
            self._drop(question, visitor, "unserved", because)
            return
        log = self._log.session(id)
        log.debug("datagram.received", "visitor %(visitor)s sent %(size)d bytes", visitor=visitor, size=len(question))
        udp, outcome = self._stats.udp, "unanswered"
        udp.begin()
        try:
            data.write(question)
            udp.up.bytes += len(question)
            answer = read_datagram(data, settings.udp_data_buf_size, settings.udp_read_timeout + ANSWER_GRACE)
            if answer:
                send_datagram(self._sock, answer, visitor)
                udp.down.bytes += len(answer)
                outcome = "completed"
            log.debug(
                "datagram.answered",
                "answered visitor %(visitor)s with %(size)d bytes",
                visitor=visitor,
                size=len(answer),
            )
        except OSError as error:
            words = "the answer to visitor %(visitor)s: %(error)s"
            drop_datagram(self._log, self._stats, "answer", words, visitor=visitor, error=reason(error))
        finally:
            data.close()
            udp.end(outcome)

    def _drop(self, payload: bytes, visitor: ReplyAddress, why: str, because: str) -> None:
        words = "a datagram of %(size)d bytes from %(visitor)s: %(error)s"
        drop_datagram(self._log, self._stats, why, words, size=len(payload), visitor=visitor, error=because)

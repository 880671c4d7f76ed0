"""Receives visitors' datagrams on one UDP socket, and sends each on as the wire of the connected client has it.

With a v2 client they go on lanes (`udp_flows`); with a v1 client each is a session of its own, within SEMAPHORE_LIMIT;
without a client they wait for one, as sessions do. Before, `visitors.proxies` says whose a proxy's
datagrams are, and `visitors.policy` judges where each comes from. No datagram waits here for the session of another.
"""

from __future__ import annotations

import socket
import time

import gevent

from nodepass.config.kinds import format_duration
from nodepass.errors import NoDataConnection, ProxyHeaderError, reason
from nodepass.log import Limit
from nodepass.net.sockets import format_without_zone, wait_readable
from nodepass.net.stream import Stream
from nodepass.net.udp import ReplyAddress, receive_datagram, send_datagram
from nodepass.server.clients import Clients
from nodepass.tasks import WorkerPool
from nodepass.tunnel.part import Common, Part
from nodepass.tunnel.rates import NoTurnError
from nodepass.tunnel.udp import ANSWER_GRACE, drop_datagram, read_datagram
from nodepass.visitors.access_log import AccessLog, Visit
from nodepass.visitors.policy import Policy
from nodepass.visitors.proxies import Proxies
from nodepass.wire.signals import UDP

DATAGRAMS_PER_TURN = 32  # received in a row; then the greenlets that they have started run
RECEIVE_PAUSE = 0.01  # seconds after the kernel has refused to give a datagram


class DatagramListener(Part):
    """Receives from `start` to `stop`; the socket stays open for answers until the server closes it."""

    def __init__(
        self,
        common: Common,
        sock: socket.socket,
        clients: Clients,
        sessions: WorkerPool,
        policy: Policy | None = None,
    ) -> None:
        """`policy`: None where all visitors are served."""
        super().__init__(common)
        self._sock = sock
        self._clients = clients
        self._sessions = sessions
        self._policy = policy
        self._access = AccessLog.of(common)
        self._proxies = Proxies.at_target(common)
        self._rates = common.rates

    def start(self) -> None:
        self._start_loop("receive datagrams", self._receive)

    def stop(self, timeout: float) -> None:  # noqa: ARG002
        self._end_loops()

    def end_accepting(self) -> None:
        self._end_loops()

    def _receive(self) -> None:
        """Receive until killed."""
        received = 0
        while True:
            try:
                payload, visitor = receive_datagram(self._sock)
            except OSError as error:
                words = "cannot receive datagrams: %(error)s"
                self._log.warning("datagram.receive_failed", words, Limit(), error=reason(error))
                gevent.sleep(RECEIVE_PAUSE)
                continue
            self._begin(payload, visitor)
            received += 1
            if received % DATAGRAMS_PER_TURN == 0:
                wait_readable(self._sock)

    def _begin(self, payload: bytes, visitor: ReplyAddress) -> None:
        if self._proxies and self._proxies.trusts(visitor.sockaddr[0]):
            try:
                payload, visitor = self._proxies.unwrap(payload, visitor)
            except ProxyHeaderError as error:
                self._proxies.refuse(visitor, error, self._stats.visitors_refused)
                return
        if self._policy and not self._policy.admits(visitor.sockaddr[0], visitor):
            return
        if self._clients.version == 2:
            self._clients.flows.carry(self._sock, payload, visitor)
        elif self._sessions.full():
            # Waiting would stall the datagrams of other visitors.
            self._drop(payload, visitor, "limit", "SEMAPHORE_LIMIT reached")
        else:
            self._sessions.spawn("serve datagram", self._serve, payload, visitor)

    def _serve(self, payload: bytes, visitor: ReplyAddress) -> None:
        """A datagram that came while no v2 client was connected."""
        began = time.monotonic()
        timeout = self._settings.pool_get_timeout
        largest = self._settings.udp_data_buf_size
        if not self._clients.wait_for_client(timeout):
            because = f"no data connection within {format_duration(timeout)}, no client is connected"
            self._drop(payload, visitor, "unserved", because)
        elif self._clients.version == 2:
            self._clients.flows.carry(self._sock, payload, visitor)
        elif not payload:
            self._drop(payload, visitor, "empty", "empty, which wire v1 cannot carry")
        elif len(payload) > largest:
            self._drop(payload, visitor, "too_large", f"larger than UDP_DATA_BUF_SIZE ({largest})")
        elif not self._policy:
            self._serve_by_v1(payload, visitor, began)
        elif counted := self._policy.begin(visitor.sockaddr[0], visitor):
            try:
                self._serve_by_v1(payload, visitor, began)
            finally:
                self._policy.end(counted)

    def _serve_by_v1(self, question: bytes, visitor: ReplyAddress, began: float) -> None:
        """One data connection carries the datagram and its one answer."""
        timeout = self._settings.pool_get_timeout
        visit = self._begin_visit(visitor, began)
        try:
            id, data, slot = self._clients.launch(UDP, timeout)
        except NoDataConnection:
            self._stats.udp.ended["unserved"] += 1
            if visit:
                visit.end("unserved")
            self._drop(question, visitor, "unserved", f"no data connection within {format_duration(timeout)}")
            return
        if visit:
            visit.session, visit.client = id, slot.client
        log, udp, outcome = self._log.session(id), self._stats.udp, "unanswered"
        log.debug("datagram.received", "visitor %(visitor)s sent %(size)d bytes", visitor=visitor, size=len(question))
        udp.begin()
        try:
            answer = self._ask(data, question, visit)
            if answer:
                if self._rates.down:
                    self._rates.down.wait(self._settings.udp_read_timeout)
                send_datagram(self._sock, answer, visitor)
                udp.down.bytes += len(answer)
                if visit:
                    visit.count_down(len(answer))
                outcome = "completed"
            words = "replied to visitor %(visitor)s with %(size)d bytes"
            log.debug("datagram.answered", words, visitor=visitor, size=len(answer))
        except NoTurnError as error:
            self._drop(question, visitor, "rate", str(error))
        except OSError as error:
            words = "the reply to visitor %(visitor)s: %(error)s"
            drop_datagram(self._log, self._stats, "answer", words, visitor=visitor, error=reason(error))
        finally:
            data.close()
            udp.end(outcome)
            if visit:
                visit.end(outcome)

    def _begin_visit(self, visitor: ReplyAddress, began: float) -> Visit | None:
        """The session in the access log, if there is one."""
        if not self._access:
            return None
        local = visitor.local(self._sock.getsockname()[1])
        return self._access.begin("udp", began, format_without_zone(visitor.sockaddr), format_without_zone(local))

    def _ask(self, data: Stream, question: bytes, visit: Visit | None) -> bytes:
        """What the client answers; empty where it closes without an answer. Raises OSError."""
        if self._rates.up:
            self._rates.up.wait(self._settings.udp_read_timeout)
        data.write(question)
        self._stats.udp.up.bytes += len(question)
        if visit:
            visit.count_up(len(question))
        return read_datagram(data, self._settings.udp_data_buf_size, self._settings.udp_read_timeout + ANSWER_GRACE)

    def _drop(self, payload: bytes, visitor: ReplyAddress, why: str, because: str) -> None:
        words = "a datagram of %(size)d bytes from %(visitor)s: %(error)s"
        drop_datagram(self._log, self._stats, why, words, size=len(payload), visitor=visitor, error=because)

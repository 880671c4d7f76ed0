"""What follows a launch: claim its data connection, connect to the target, move the bytes, close.

The server launches a data connection for each session. `connection` reads the launches and hands them over; each is
handled in a greenlet of its own, under the semaphore (SEMAPHORE_LIMIT). Running sessions and lanes belong here and
outlive the control connection that launched them, so that a reconnect does not disturb them. `Launches` has those of
all servers; a `ServerLaunches` knows which are one server's, because they are in doubt when it vanishes.
"""

from __future__ import annotations

import contextlib
import time

from gevent import Greenlet, killall

from nodepass.client.pool import ClientPool
from nodepass.client.target import Target
from nodepass.client.targets import Targets
from nodepass.client.udp_flows import TargetFlows
from nodepass.config.settings import Settings
from nodepass.errors import NoDataConnection, ProtocolError, reason
from nodepass.log import Limit, Log
from nodepass.net.deadlines import Deadlines
from nodepass.net.relay import relay
from nodepass.net.sockets import Socket
from nodepass.net.stream import Stream, TCPStream
from nodepass.stats import failure
from nodepass.tasks import TaskGroup, WorkerPool
from nodepass.tunnel.buffers import kernel_buffers
from nodepass.tunnel.part import Common, Part
from nodepass.tunnel.rates import NoTurnError
from nodepass.tunnel.udp import ask_target, drop_datagram, read_datagram
from nodepass.visitors.access_log import AccessLog, Visit
from nodepass.wire.proxy_protocol import ProxyHeaders
from nodepass.wire.signals import LANE, TCP, Launch

LANES_AT_MOST = 256  # a server opens at most 64 (UDP_LANES), and those of its last connections can still run


class ServerLaunches:
    """The launches of one server, of all its control connections."""

    def __init__(self, launches: Launches, settings: Settings, log: Log) -> None:
        """`log`: that of the server."""
        self.targets = launches.targets
        self.log = log
        self.deadlines = Deadlines(settings.idle_timeout, settings.first_byte_timeout, data_is_near=True)
        self._launches = launches
        self._lanes: set[Greenlet[..., None]] = set()

    def begin_session(self, pool: ClientPool, launch: Launch, began: float) -> None:
        """Handle a launch that was read at `began`; waits for a slot."""
        self._launches.sessions.spawn("launch", self._launches.handle, self, pool, launch, began)

    def begin_lane(self, pool: ClientPool, launch: Launch) -> bool:
        """Open a lane, which takes no slot; False if there are too many."""
        if len(self._lanes) >= LANES_AT_MOST:
            return False
        lane = self._launches.lanes.spawn("lane", self._launches.handle, self, pool, launch, 0.0)
        self._lanes.add(lane)
        lane.rawlink(self._lanes.discard)
        return True

    def lose_server(self) -> None:
        """The server has vanished: end its lanes, whose flows would wait for it, and let its sessions show life."""
        killall(list(self._lanes))
        self.deadlines.suspect_data_connections()


class Launches(Part):
    """Handles the launches of one client."""

    def __init__(self, common: Common, targets: Targets, flows: TargetFlows, name: str = "") -> None:
        """`name`: of the tunnel."""
        super().__init__(common)
        self._proxy = ProxyHeaders(self._settings.proxy_protocol, name)
        self._access = AccessLog.of(common)
        self._rates = common.rates
        self.sessions = WorkerPool(self._log, self._stats, self._settings.semaphore_limit)
        self.targets = targets
        self._flows = flows
        # Apart from the sessions: a lane does not end by itself, so a shutdown does not wait for it.
        self.lanes = TaskGroup(self._log, self._stats)

    def start(self) -> None:
        for each in self.targets.names:
            self._start_loop("follow the target's name", each.name.follow)

    def close(self) -> None:
        """End everything at once."""
        super().close()
        self.lanes.kill()
        self.sessions.kill()

    def for_server(self, log: Log) -> ServerLaunches:
        """The launches of one more server, with its log."""
        return ServerLaunches(self, self._settings, log)

    def handle(self, server: ServerLaunches, pool: ClientPool, launch: Launch, began: float) -> None:
        """One launch, from its claim to the close."""
        try:
            data = pool.claim(launch.id, self._settings.handshake_timeout)
        except NoDataConnection as error:
            self._stats.trouble["launches_unknown"] += 1
            server.log.warning("launch.unknown", "launch ignored: %(error)s", Limit(), id=launch.id, error=error)
            return
        log = server.log.session(launch.id)
        try:
            if launch.kind == TCP:
                self._serve_tcp(data, launch, began, server.deadlines, log)
            elif launch.kind == LANE:
                self._flows.run_lane(data, launch.id)
            else:
                self._serve_datagram(data, launch, began, log)
        finally:
            data.close()

    def _serve_tcp(self, data: Stream, launch: Launch, began: float, deadlines: Deadlines, log: Log) -> None:
        visit = self._begin_visit("tcp", launch, began)
        dialled = self._dial(visit)
        if dialled is None:
            return  # the close of a data connection is a reset, so the visitor is refused, too
        target, sock = dialled
        log.debug("target.connected", "connected to target %(target)s", target=target)
        try:
            stream = TCPStream(sock)
            if header := self._proxy.of_connection(launch.visitor, launch.local):
                with contextlib.suppress(OSError):  # it has closed already, which the relay reports
                    stream.write(header)
            with kernel_buffers.share(data.sock, sock):
                on_end = visit.end_relayed if visit else None
                traffic = relay(data, stream, self._stats, began, deadlines, on_end, self._rates)
        finally:
            self.targets.end(target)
        sentence = "target %(target)s: " + traffic.SENTENCE
        log.debug("session.closed", sentence, target=target, **traffic.fields())

    def _begin_visit(self, protocol: str, launch: Launch, began: float) -> Visit | None:
        """The session in the access log, if there is one."""
        if not self._access:
            return None
        visit = self._access.begin(protocol, began, launch.visitor, launch.local)
        visit.session, visit.target = launch.id, str(self.targets)
        return visit

    def _dial(self, visit: Visit | None) -> tuple[Target, Socket] | None:
        """A target and a connection to it; None, logged and counted, if none can be reached."""
        began = time.monotonic()
        try:
            dialled = self.targets.dial(self._settings.handshake_timeout, visit)
        except OSError as error:
            self._stats.tcp.ended["unreachable"] += 1
            why = failure(error)
            if visit:
                visit.dial = why
                visit.end("unreachable")
            self._log.warning(
                "target.unreachable",
                "cannot reach the target: %(error)s",
                Limit(why, burst=1),
                target=self.targets,
                reason=why,
                error=reason(error),
            )
            return None
        if visit:
            visit.dial = "ok"
        self._stats.target_dials.observe(time.monotonic() - began)
        return dialled

    def _serve_datagram(self, data: Stream, launch: Launch, began: float, log: Log) -> None:
        """Wire v1: a session is one datagram and its answer."""
        visit = self._begin_visit("udp", launch, began)
        data.reset_on_close(False)  # a reset could overtake the answer
        udp, outcome = self._stats.udp, "unanswered"
        udp.begin()
        try:
            target, asked, answered = self._ask(data, visit)
        except ProtocolError as error:
            self._stats.udp_drops["too_large"] += 1
            words = "dropped a datagram: %(error)s"
            self._log.warning("datagram.dropped", words, Limit("too_large"), reason="too_large", error=error)
        except NoTurnError as error:
            drop_datagram(self._log, self._stats, "rate", "a datagram or its reply: %(error)s", error=error)
        except OSError as error:
            words = "no reply to a datagram: %(error)s"
            self._log.warning("datagram.unanswered", words, Limit(), reason=failure(error), error=reason(error))
        else:
            outcome = "completed"
            words = "target %(target)s: datagram of %(asked)d bytes, reply of %(answered)d bytes"
            log.debug("datagram.answered", words, target=target, asked=asked, answered=answered)
        finally:
            udp.end(outcome)
            if visit:
                visit.end(outcome)

    def _ask(self, data: Stream, visit: Visit | None) -> tuple[Target, int, int]:
        """Carry one datagram to a target and its answer back; the target and their sizes in bytes. Raises OSError."""
        largest, timeout = self._settings.udp_data_buf_size, self._settings.udp_read_timeout
        question = read_datagram(data, largest, timeout)
        if self._rates.up:
            self._rates.up.wait(timeout)
        self._stats.udp.up.bytes += len(question)
        if visit:
            visit.count_up(len(question))
        target, answer = self._ask_target(self._proxy.of_datagram("", "") + question, largest, timeout, visit)
        if self._rates.down:
            self._rates.down.wait(timeout)
        data.write(answer)
        data.half_close()
        self._stats.udp.down.bytes += len(answer)
        if visit:
            visit.count_down(len(answer))
        return target, len(question), len(answer)

    def _ask_target(
        self, question: bytes, largest: int, timeout: float, visit: Visit | None = None
    ) -> tuple[Target, bytes]:
        """The first target that does not refuse the datagram, and its answer. Raises OSError."""
        failure, any_port = OSError("no address to send to"), self._settings.udp_answers == "any"
        for target in self.targets.for_datagrams():
            if visit:
                visit.target = target.text
            for endpoint in target.datagram_endpoints():
                try:
                    answer = ask_target(endpoint, question, largest, timeout, any_port, target.bind)
                except (TimeoutError, ProtocolError):
                    raise
                except OSError as error:
                    failure = error
                else:
                    target.note_answer(endpoint)
                    return target, answer
            target.name.refresh()  # it may have moved
        raise failure

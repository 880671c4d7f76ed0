"""The client's end of UDP lanes: each flow has a UDP socket of its own, connected to the target.

`launches` runs a lane once it has claimed the lane's data connection. A datagram that arrives on the lane is sent from
its flow's socket, which is made at the first one; what the target sends back goes to the same lane. A flow's socket is
read by a generator that the event loop resumes, because there are thousands of flows and most are idle. What both ends
share is in `tunnel.udp`.

Where the target has several addresses, one that refuses a flow's datagram is followed by the next, which gets the same
datagram, and the last of them by the next target; one that is silent is not, because silence may be all that a service
has to say. A flow whose address is no longer one of its target's goes on at another one, from a new port.
"""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import gevent

from nodepass.client.target import HostTarget
from nodepass.client.targets import Targets
from nodepass.errors import reason
from nodepass.log import Limit
from nodepass.net.pump import Steps
from nodepass.net.sockets import Endpoint
from nodepass.net.stream import Stream
from nodepass.net.udp import AnyPort, dial_udp
from nodepass.tasks import report_bug
from nodepass.tunnel.flows import FlowTable
from nodepass.tunnel.part import Common, Part
from nodepass.tunnel.rates import DatagramRate
from nodepass.tunnel.udp import Lane, drop_datagram
from nodepass.visitors.access_log import AccessLog, Visit
from nodepass.wire.proxy_protocol import ProxyHeaders

LARGEST_PAYLOAD = 65507  # bytes of a datagram in IPv4
ANSWERS_PER_TURN = 64  # datagrams read from one socket before others get their turn


@dataclass(eq=False, slots=True)
class TargetFlow:
    """One flow: its lane, and its socket at the target."""

    number: int
    lane: Lane
    target: HostTarget
    others: list[HostTarget]  # to try after all addresses of the present one
    untried: list[Endpoint]  # addresses of the target to try if the present one refuses
    counted: bool = False  # by its target
    sock: Any = None  # at `endpoint`; a connected socket.socket, or with UDP_ANSWERS=any an AnyPort
    endpoint: Endpoint | None = None
    watcher: Any = None  # gevent's io watcher, which has no type
    version: int = 0  # of the target's addresses
    unanswered: bytes | None = None  # the last datagram, until the target answers; kept where there are other addresses
    network: str = ""  # of the visitor: not known at this end
    last: float = 0.0
    rank: int = 0
    header: bytes = b""  # in front of each datagram: the PROXY protocol's
    visit: Visit | None = None  # in the access log

    @property
    def key(self) -> tuple[Lane, int]:
        return self.lane, self.number


class TargetFlows(Part):
    """Sends the datagrams of lanes to the target, and its answers back, for as long as a flow lives."""

    def __init__(self, common: Common, targets: Targets, name: str = "") -> None:
        """`name`: of the tunnel."""
        super().__init__(common)
        settings = common.settings
        self._proxy = ProxyHeaders(settings.proxy_protocol, name)
        self._access = AccessLog.of(common)
        self._meter = common.meter
        self._up = DatagramRate.of(common.rates.up, "RATE_UP", self._log, self._stats)
        self._down = DatagramRate.of(common.rates.down, "RATE_DOWN", self._log, self._stats)
        # Announced flows, the latest last. They stay beyond a flow's end: only the server knows when it is over there.
        self._addresses: OrderedDict[tuple[Lane, int], tuple[str, str]] = OrderedDict()
        self._targets = targets
        self._any_port = settings.udp_answers == "any"
        self._table: FlowTable[TargetFlow] = FlowTable(
            settings.semaphore_limit, settings.udp_session_timeout, self._end
        )

    def start(self) -> None:
        self._start_loop("end silent flows", self._table.sweep_forever)

    def close(self) -> None:
        super().close()
        self._table.end(lambda _: True, "completed")

    def __len__(self) -> int:
        return len(self._table)

    def run_lane(self, stream: Stream, id: str) -> None:
        """Serve one lane, a data connection of this id, until it ends; its flows end with it."""
        lane = Lane()
        lane.id = id
        log = self._log.session(id)
        log.debug("lane.opened", "lane opened")
        cut = "crashed"
        try:
            wanted = self._access or self._settings.proxy_protocol == "v2"
            announce = partial(self._note_addresses, lane) if wanted else None
            cut = lane.run(stream, partial(self._deliver, lane), announce)
            log.debug("lane.closed", "lane closed: %(error)s", error=cut or "closed by the peer")
        finally:
            lane.ended = True
            self._table.end(lambda flow: flow.lane is lane, "lost" if cut else "completed")
            for key in [key for key in self._addresses if key[0] is lane]:
                del self._addresses[key]

    def _note_addresses(self, lane: Lane, number: int, visitor: str, local: str) -> None:
        """Keep the addresses of a flow, as many as there may be flows."""
        self._addresses[lane, number] = visitor, local
        while len(self._addresses) > self._settings.semaphore_limit:
            self._addresses.popitem(last=False)

    def _deliver(self, lane: Lane, number: int, payload: bytes) -> None:
        """Send a datagram of a lane to the target; one that cannot be sent is dropped, counted and logged."""
        try:
            flow = self._table.find((lane, number))
            if not flow and self._meter and self._meter.is_used_up:
                words = "a datagram of %(size)d bytes: TRAFFIC_LIMIT is used up"
                drop_datagram(self._log, self._stats, "traffic_limit", words, size=len(payload))
                return
            flow = flow or self._begin(lane, number)
            if flow.version != flow.target.name.version:
                self._follow(flow)
            if len(flow.header) + len(payload) > LARGEST_PAYLOAD:
                words = "a datagram of %(size)d bytes: too large with its PROXY protocol header"
                drop_datagram(self._log, self._stats, "too_large", words, size=len(payload))
                return
        except OSError as error:
            self._drop_unreachable(payload, error)
            return
        if self._up is None:
            self._send_up(flow, payload)
        else:
            self._up.pass_on(flow, len(payload), partial(self._send_up, flow, payload))

    def _send_up(self, flow: TargetFlow, payload: bytes) -> None:
        try:
            self._send(flow, flow.header + payload)
        except OSError as error:
            self._drop_unreachable(payload, error)
            return
        self._stats.udp.up.bytes += len(payload)
        if flow.visit:
            flow.visit.count_up(len(payload))

    def _drop_unreachable(self, payload: bytes, error: OSError) -> None:
        words = "a datagram of %(size)d bytes: %(error)s"
        drop_datagram(self._log, self._stats, "target_unreachable", words, size=len(payload), error=reason(error))

    def _send(self, flow: TargetFlow, payload: bytes) -> None:
        try:
            flow.sock.send(payload)
        except ConnectionRefusedError as error:  # the reply to the datagram before this one
            while self._try_next(flow, error):
                with contextlib.suppress(ConnectionRefusedError):
                    flow.sock.send(payload)
                    break
            else:
                flow.sock.send(payload)
        if flow.untried or flow.others:
            flow.unanswered = payload

    def _begin(self, lane: Lane, number: int) -> TargetFlow:
        target, *others = self._targets.for_datagrams()
        flow = TargetFlow(number, lane, target, others, [])
        visitor, local = self._addresses.get(flow.key, ("", ""))
        flow.header = self._proxy.of_datagram(visitor, local)
        if self._access:
            flow.visit = self._access.begin("udp", time.monotonic(), visitor, local)
            flow.visit.session = lane.name_flow(number)
        self._begin_at(flow, target)
        self._table.add(flow)
        self._stats.udp.begin()
        self._log.debug("flow.opened", "flow %(flow)d opened, %(flows)d flows", flow=number, flows=len(self))
        return flow

    def _begin_at(self, flow: TargetFlow, target: HostTarget) -> None:
        """Connect a flow to a target, or to the first of its others that can be. Raises OSError where none can."""
        while True:
            try:
                flow.untried = list(target.datagram_endpoints())
                self._connect(flow)
                break
            except OSError:
                if not flow.others:
                    raise
                target = flow.others.pop(0)
        if flow.counted:
            self._targets.end(flow.target)
        target.sessions += 1
        flow.target, flow.version, flow.counted = target, target.name.version, True
        if flow.visit:
            flow.visit.target = target.text

    def _connect(self, flow: TargetFlow) -> None:
        """Connect a flow to its next address that has a route. Raises OSError, and leaves it as it is, without one."""
        while True:
            endpoint = flow.untried.pop(0)
            try:
                # The event loop begins turns: there nothing can wait.
                bind = flow.target.bind
                sock = AnyPort(endpoint, bind) if self._any_port else dial_udp(endpoint, self._up is None, bind)
                break
            except OSError:
                if not flow.untried:
                    raise
        self._disconnect(flow)
        flow.sock, flow.endpoint = sock, endpoint
        flow.watcher = gevent.get_hub().loop.io(sock.fileno(), 1)
        read = sock.recv if isinstance(sock, AnyPort) else cast(Any, sock)._sock.recv
        flow.watcher.start(self._read_answers(flow, read).__next__)

    def _disconnect(self, flow: TargetFlow) -> None:
        if flow.sock:
            flow.watcher.stop()
            flow.watcher.close()
            flow.sock.close()

    def _follow(self, flow: TargetFlow) -> None:
        """Leave an address that is no longer one of the target's. Raises OSError."""
        endpoints = flow.target.datagram_endpoints()
        if flow.endpoint in endpoints:
            flow.untried = _without(endpoints, flow.endpoint)
        else:
            flow.untried, flow.unanswered = list(endpoints), None
            self._connect(flow)
            self._log.debug("flow.moved", "flow %(flow)d moved to %(target)s", flow=flow.number, target=flow.endpoint)
        flow.version = flow.target.name.version

    def _try_next(self, flow: TargetFlow, refusal: OSError) -> bool:
        """Send a refused datagram to the next address; False where there is none: it is dropped, counted and logged."""
        while flow.untried or flow.others:
            with contextlib.suppress(OSError):  # no route to the last one, either
                if flow.untried:
                    self._connect(flow)
                else:
                    flow.target.name.refresh()
                    self._begin_at(flow, flow.others.pop(0))
                if flow.unanswered is not None:
                    flow.sock.send(flow.unanswered)
                return True
        flow.target.name.refresh()  # it may have moved
        flow.unanswered = None
        self._allow_others(flow)  # for the next datagram
        words = "a datagram to the target: %(error)s"
        drop_datagram(self._log, self._stats, "target_refused", words, error=reason(refusal))
        return False

    def _read_answers(self, flow: TargetFlow, read: Callable[[int], bytes]) -> Steps:
        """Pass on what the target sends. The event loop resumes this; a bare `yield` waits."""
        try:
            while True:
                try:
                    for _ in range(ANSWERS_PER_TURN):
                        self._pass_back(flow, read(65536))
                except BlockingIOError:
                    pass
                except OSError as error:  # refused: nothing listens at the target
                    self._try_next(flow, error)
                yield  # not resumed after a connect to the next address
        except Exception as error:  # noqa: BLE001  # a bug, which the loop could not report; the other flows go on
            report_bug(f"flow {flow.number}", error, self._log, self._stats)
            self._table.end(lambda each: each is flow, "lost")
        yield  # not resumed: the watcher is closed

    def _pass_back(self, flow: TargetFlow, answer: bytes) -> None:
        """Send an answer on its lane; one that the lane cannot take is dropped, counted and logged."""
        self._table.count_answer(flow)
        if flow.unanswered is not None and flow.endpoint:
            flow.unanswered = None
            self._allow_others(flow)
            flow.target.note_answer(flow.endpoint)
        if self._down is None:
            self._send_down(flow, answer)
        else:
            self._down.pass_on(flow, len(answer), partial(self._send_down, flow, answer))

    def _send_down(self, flow: TargetFlow, answer: bytes) -> None:
        if flow.lane.send(flow.number, answer):
            self._stats.udp.down.bytes += len(answer)
            if flow.visit:
                flow.visit.count_down(len(answer))
        else:
            words = "a reply of %(size)d bytes: the lane is full"
            drop_datagram(self._log, self._stats, "lane_full", words, size=len(answer))

    def _allow_others(self, flow: TargetFlow) -> None:
        """Every address but the present one may be tried again."""
        flow.untried = _without(flow.target.datagram_endpoints(), flow.endpoint)
        flow.others = self._targets.others_for_datagrams(flow.target)

    def _end(self, flow: TargetFlow, outcome: str) -> None:
        for rate in filter(None, (self._up, self._down)):
            rate.end(flow)
        self._stats.udp.end(outcome)
        if flow.visit:
            flow.visit.end(outcome)
        self._disconnect(flow)
        self._targets.end(flow.target)
        self._log.debug("flow.closed", "flow %(flow)d closed", flow=flow.number, outcome=outcome)
        if outcome == "evicted":
            words = "closed a flow for a new one: SEMAPHORE_LIMIT reached"
            self._log.warning("flow.evicted", words, Limit(burst=3), flow=flow.number)


def _without(endpoints: list[Endpoint], used: Endpoint | None) -> list[Endpoint]:
    return [each for each in endpoints if each != used]

"""The server's end of UDP lanes: one flow per visitor's address, carried by a lane of one of the connected clients.

`datagram_listener` brings datagrams; `clients` launches the data connections that become lanes, and chooses whose;
`client_slot` says when a client has gone. What both ends share is in `tunnel.udp`.
"""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import gevent
from gevent import Greenlet, killall

from nodepass.config.hostport import IP
from nodepass.errors import NoDataConnection, reason
from nodepass.log import Limit
from nodepass.net.sockets import format_without_zone, network_of
from nodepass.net.stream import Stream
from nodepass.net.udp import ReplyAddress, send_datagram
from nodepass.tasks import TaskGroup
from nodepass.tunnel.flows import NETWORK_SHARE, FlowTable
from nodepass.tunnel.part import Common, Part
from nodepass.tunnel.rates import DatagramRate
from nodepass.tunnel.udp import Lane, drop_datagram
from nodepass.visitors.access_log import AccessLog, Visit
from nodepass.visitors.policy import Policy
from nodepass.wire.signals import LANE

REFUSED_WITHIN = 1.0  # seconds in which a client that serves no lane, with UDP=off for example, cuts a new one,
REFUSED_PAUSE = 1.0  # and seconds before it is asked again: each lane costs a data connection, and it may be a flood's
LAST_NUMBER = 0xFFFFFFFF  # of a flow; then 1 follows


class LaneClient(Protocol):
    """A place for a client, as flows see it."""

    @property
    def control(self) -> object | None:
        """None while no client is connected."""

    @property
    def client(self) -> str:
        """The connected client's address."""

    @property
    def is_good(self) -> bool:
        """Whether it can serve."""

    def serves(self, kind: int) -> bool:
        """Whether a client is connected that takes sessions of this kind."""

    @property
    def wants_addresses(self) -> bool:
        """Whether it wants to know the visitors' addresses."""


class ServerLane(Lane):
    """A lane, and whose it is once it has been launched."""

    def __init__(self) -> None:
        super().__init__()
        self.slot: LaneClient | None = None
        self.client = ""  # its address
        self.task: Greenlet[..., None] | None = None


@dataclass(eq=False, slots=True)
class VisitorFlow:
    """The datagrams of one visitor's address, both ways."""

    number: int
    lane: ServerLane
    sock: socket.socket
    visitor: ReplyAddress
    network: str
    visit: Visit | None = None  # in the access log
    counted: IP | None = None  # by the policy
    last: float = 0.0
    rank: int = 0

    @property
    def key(self) -> ReplyAddress:
        return self.visitor


class VisitorFlows(Part):
    """Carries visitors' datagrams to the clients, and their answers back. `carry` never blocks."""

    def __init__(self, common: Common, launch: Callable[[int, float], tuple[str, Stream, LaneClient]]) -> None:
        super().__init__(common)
        settings = common.settings
        self.policy: Policy | None = None  # None: all visitors are served
        self.slots: Sequence[LaneClient] = ()  # of the tunnel
        self._launch = launch
        self._access = AccessLog.of(common)
        self._up = DatagramRate.of(common.rates.up, "RATE_UP", self._log, self._stats)
        self._down = DatagramRate.of(common.rates.down, "RATE_DOWN", self._log, self._stats)
        self._tasks = TaskGroup(self._log, self._stats)
        limit = settings.semaphore_limit
        self._table: FlowTable[VisitorFlow] = FlowTable(
            limit, settings.udp_session_timeout, self._end, max(1, limit // NETWORK_SHARE)
        )
        self._by_number: dict[int, VisitorFlow] = {}
        self._last_number = 0
        self._lanes: list[ServerLane] = []  # that run
        self._refused: list[ServerLane] = []  # lately; they still count as lanes

    def start(self) -> None:
        self._start_loop("sweep flows", self._table.sweep_forever)

    def close(self) -> None:
        super().close()
        self.end_all()

    def __len__(self) -> int:
        return len(self._table)

    def carry(self, sock: socket.socket, payload: bytes, visitor: ReplyAddress) -> None:
        """Send a visitor's datagram on its flow; one that the lane cannot take is dropped, counted and logged.

        So is one whose visitor may not begin a flow.
        """
        flow = self._table.find(visitor)
        if flow and flow.lane.lost():
            lost = flow.lane
            self._table.end(lambda each: each.lane is lost, "lost")
            flow = None
        if flow is None:
            if len(self._refused) >= self._most_lanes:
                words = "a datagram of %(size)d bytes from %(visitor)s: the client serves no lanes (is UDP=off there?)"
                drop_datagram(self._log, self._stats, "lane_missing", words, size=len(payload), visitor=visitor)
                return
            counted = self.policy.begin(visitor.sockaddr[0], visitor) if self.policy else None
            if self.policy and not counted:
                return
            flow = self._begin(sock, visitor, counted)
        flow.visitor = visitor  # the same one, but its proxy may have another socket now
        if self._up is None:
            self._send_up(flow, payload)
        else:
            self._up.pass_on(flow, len(payload), partial(self._send_up, flow, payload))

    def _send_up(self, flow: VisitorFlow, payload: bytes) -> None:
        if flow.lane.send(flow.number, payload):
            self._stats.udp.up.bytes += len(payload)
            if flow.visit:
                flow.visit.count_up(len(payload))
        else:
            words = "a datagram of %(size)d bytes from %(visitor)s: the lane is full"
            drop_datagram(self._log, self._stats, "lane_full", words, size=len(payload), visitor=flow.visitor)

    @property
    def is_opening(self) -> bool:
        """Whether a lane waits for its data connection."""
        return any(lane.slot is None and not lane.ended for lane in self._lanes)

    @property
    def has_lanes(self) -> bool:
        """Whether lanes run."""
        return bool(self._lanes)

    def count_by_slot(self) -> Counter[LaneClient | None]:
        """How many flows the clients carry."""
        counts: Counter[LaneClient | None] = Counter()
        for lane in self._lanes:
            counts[lane.slot] += lane.flows
        return counts

    def abandon(self, slot: LaneClient) -> None:
        """Put new flows on other lanes: the client in this slot has left, or is replaced.

        Its flows stay with it while it takes their datagrams.
        """
        for lane in self._lanes:
            lane.orphaned = lane.orphaned or lane.slot is slot
        self._refused = [lane for lane in self._refused if lane.slot is not slot]

    def end_all(self, slot: LaneClient | None = None) -> None:
        """End every lane, or those of the client in this slot, and with them their flows."""

        def is_meant(lane: ServerLane) -> bool:
            return slot is None or lane.slot is slot

        lanes = [lane for lane in (*self._lanes, *self._refused) if is_meant(lane)]
        killall([lane.task for lane in lanes if lane.task])
        # A lane that was killed before it ran has ended none of its own.
        self._table.end(lambda flow: is_meant(flow.lane), "lost")
        self._lanes = [lane for lane in self._lanes if not is_meant(lane)]
        self._refused = [lane for lane in self._refused if not is_meant(lane)]

    def _begin(self, sock: socket.socket, visitor: ReplyAddress, counted: IP | None) -> VisitorFlow:
        number = self._free_number()
        flow = VisitorFlow(number, self._lane(), sock, visitor, network_of(visitor.sockaddr), counted=counted)
        flow.lane.flows += 1
        self._table.add(flow)
        self._by_number[number] = flow
        wants_addresses = any(slot.wants_addresses for slot in self.slots)
        if wants_addresses or self._access:
            self._note_addresses(flow, wants_addresses)
        self._stats.udp.begin()
        words = "flow %(flow)d opened: visitor %(visitor)s, %(flows)d flows"
        self._log.debug("flow.opened", words, flow=number, visitor=visitor, flows=len(self))
        return flow

    def _note_addresses(self, flow: VisitorFlow, is_wanted: bool) -> None:
        """Have the client, if one of them wants that, and the access log know the two addresses of a flow."""
        local = format_without_zone(flow.visitor.local(flow.sock.getsockname()[1]))
        visitor = format_without_zone(flow.visitor.sockaddr)
        if self._access:
            flow.visit = self._access.begin("udp", time.monotonic(), visitor, local)
        if is_wanted and not flow.lane.announce(flow.number, visitor, local):
            words = "the addresses of flow %(flow)d: the lane is full"
            drop_datagram(self._log, self._stats, "lane_full", words, flow=flow.number)

    def _free_number(self) -> int:
        """The next number that no open flow has: an old flow may still be open when the numbers wrap."""
        while True:
            self._last_number = self._last_number % LAST_NUMBER + 1
            if self._last_number not in self._by_number:
                return self._last_number

    @property
    def _most_lanes(self) -> int:
        """None where no connected client serves any; one client's where none is connected, as the next one may."""
        serving = sum(1 for slot in self.slots if slot.serves(LANE))
        return self._settings.udp_lanes * (serving or not any(slot.control for slot in self.slots))

    def _lane(self) -> ServerLane:
        """The lane of a new flow: a new one while there are fewer than allowed, then the least busy."""
        alive = [lane for lane in self._lanes if not lane.ended and not lane.orphaned]
        if len(self.slots) > 1:  # those of clients that can serve, if there are any
            alive = [lane for lane in alive if lane.slot is None or lane.slot.is_good] or alive
        if len(alive) + len(self._refused) < self._most_lanes:
            lane = ServerLane()
            self._lanes.append(lane)
            lane.task = self._tasks.spawn("lane", self._run, lane)
            return lane
        return min(alive, key=lambda lane: lane.flows)

    def _run(self, lane: ServerLane) -> None:
        cut, opened = "no data connection", 0.0
        try:
            id, stream, lane.slot = self._launch(LANE, self._settings.pool_get_timeout)
            opened = time.monotonic()
            lane.id, lane.client = id, lane.slot.client
            log = self._log.session(id)
            words = "lane opened, %(lanes)d of %(maximum)d"
            log.debug("lane.opened", words, lanes=len(self._lanes), maximum=self._most_lanes)
            cut = lane.run(stream, partial(self._deliver, lane))
            log.debug("lane.closed", "lane closed: %(error)s", error=cut or "no flows are left")
        except NoDataConnection as error:
            words = "the datagrams of %(flows)d flows: %(error)s"
            drop_datagram(self._log, self._stats, "lane_missing", words, flows=lane.flows, error=error)
        finally:
            lane.ended = True
            if lane in self._lanes:
                self._lanes.remove(lane)
            self._table.end(lambda flow: flow.lane is lane, "lost" if cut else "completed")
        if cut and not lane.orphaned and time.monotonic() - opened < REFUSED_WITHIN:
            self._refused.append(lane)
            gevent.sleep(REFUSED_PAUSE)
            if lane in self._refused:
                self._refused.remove(lane)

    def _deliver(self, lane: ServerLane, number: int, payload: bytes) -> None:
        flow = self._by_number.get(number)
        if not flow or flow.lane is not lane:
            words = "a reply of %(size)d bytes: its flow has ended"
            drop_datagram(self._log, self._stats, "flow_over", words, size=len(payload))
            return
        self._table.count_answer(flow)
        if self._down is None:
            self._send_down(flow, payload)
        else:
            self._down.pass_on(flow, len(payload), partial(self._send_down, flow, payload))

    def _send_down(self, flow: VisitorFlow, payload: bytes) -> None:
        try:
            # The event loop begins turns: there nothing can wait.
            send_datagram(flow.sock, payload, flow.visitor, blocking=self._down is None)
            self._stats.udp.down.bytes += len(payload)
            if flow.visit:
                flow.visit.count_down(len(payload))
        except OSError as error:
            words = "a reply of %(size)d bytes: %(error)s"
            drop_datagram(self._log, self._stats, "visitor_unreachable", words, size=len(payload), error=reason(error))

    def _end(self, flow: VisitorFlow, outcome: str) -> None:
        for rate in filter(None, (self._up, self._down)):
            rate.end(flow)
        self._stats.udp.end(outcome)
        if flow.visit:
            flow.visit.client = flow.lane.client
            flow.visit.session = flow.lane.name_flow(flow.number)
            flow.visit.end(outcome)
        if self.policy and flow.counted:
            self.policy.end(flow.counted)
        del self._by_number[flow.number]
        flow.lane.flows -= 1
        words = "flow %(flow)d closed: visitor %(visitor)s"
        self._log.debug("flow.closed", words, flow=flow.number, visitor=flow.visitor, outcome=outcome)
        if outcome == "evicted":
            words = "closed a flow for a new one (%(visitor)s): SEMAPHORE_LIMIT, or a quarter of it by one network"
            self._log.warning("flow.evicted", words, Limit(burst=3), flow=flow.number, visitor=flow.visitor)
        if not flow.lane.flows:
            flow.lane.close()

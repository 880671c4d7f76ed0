"""The server's end of UDP lanes: one flow per visitor, carried by a lane of the connected client."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from nodepass.config import Settings
from nodepass.errors import NoDataConnection, reason
from nodepass.log import Log
from nodepass.net.stream import Stream
from nodepass.net.udp import ReplyAddress, send_datagram
from nodepass.stats import Stats
from nodepass.tasks import TaskGroup
from nodepass.tunnel.udp import FlowTable, Lane
from nodepass.wire.signals import LANE


@dataclass(eq=False, slots=True)
class VisitorFlow:
    """What one visitor's address sends and gets."""

    number: int
    lane: Lane
    sock: socket.socket
    visitor: ReplyAddress
    last: float = 0.0


class VisitorFlows:
    """Carries visitors' datagrams to the client, and its answers back. Never blocks whoever brings a datagram."""

    def __init__(
        self, launch: Callable[[int, float], tuple[str, Stream]], settings: Settings, log: Log, stats: Stats
    ) -> None:
        self.crew = TaskGroup(log, stats)
        self._launch = launch
        self._settings = settings
        self._log = log
        self._stats = stats
        self._table: FlowTable[VisitorFlow] = FlowTable(
            settings.semaphore_limit, settings.udp_session_timeout, self._end
        )
        self._by_number: dict[int, VisitorFlow] = {}
        self._numbers = count(1)
        self._lanes: list[Lane] = []
        self.sweep_forever = self._table.sweep_forever

    def __len__(self) -> int:
        return len(self._table)

    def carry(self, sock: socket.socket, payload: bytes, visitor: ReplyAddress) -> None:
        """Send a visitor's datagram on its flow; one that the lane cannot take is dropped, counted and logged."""
        flow = self._table.get(visitor)
        if flow and flow.lane.lost():
            lost = flow.lane
            self._table.end(lambda each: each.lane is lost)
            flow = None
        flow = flow or self._begin(sock, visitor)
        if flow.lane.send(flow.number, payload):
            self._stats.udp.up.bytes += len(payload)
        else:
            self._drop("lane_full", "a datagram of %d bytes from %s: its lane is full", len(payload), visitor)

    def abandon(self) -> None:
        """New flows go to new lanes: this client is replaced. Its flows stay with it while it takes their datagrams."""
        for lane in self._lanes:
            lane.orphaned = True
        self._lanes.clear()

    def end_all(self) -> None:
        """End every lane and flow."""
        self.crew.kill()

    def _begin(self, sock: socket.socket, visitor: ReplyAddress) -> VisitorFlow:
        number = next(self._numbers) & 0xFFFFFFFF
        flow = VisitorFlow(number, self._lane(), sock, visitor)
        flow.lane.flows += 1
        self._table.add(visitor, flow)
        self._by_number[number] = flow
        self._stats.udp.begin()
        self._log.debug("flow %d begins: visitor %s, %d flows", number, visitor, len(self))
        return flow

    def _lane(self) -> Lane:
        """The lane of a new flow: a new one while there are fewer than allowed, then the least busy."""
        alive = [lane for lane in self._lanes if not lane.ended]
        if len(alive) < self._settings.udp_lanes:
            lane = Lane(lambda number, payload: self._deliver(lane, number, payload))
            self._lanes.append(lane)
            self.crew.spawn("lane", self._run, lane)
            return lane
        return min(alive, key=lambda lane: lane.flows)

    def _run(self, lane: Lane) -> None:
        because = "no data connection"
        try:
            id, stream = self._launch(LANE, self._settings.pool_get_timeout)
            log = self._log.session(id)
            log.debug("lane opens, %d of %d", len(self._lanes), self._settings.udp_lanes)
            because = lane.run(stream)
            log.debug("lane ends: %s", because)
        except NoDataConnection as error:
            self._drop("lane_missing", "the datagrams of %d flows: %s", lane.flows, error)
        finally:
            lane.ended = True
            if lane in self._lanes:
                self._lanes.remove(lane)
            self._table.end(lambda flow: flow.lane is lane)

    def _deliver(self, lane: Lane, number: int, payload: bytes) -> None:
        flow = self._by_number.get(number)
        if not flow or flow.lane is not lane:
            self._drop("flow_over", "an answer of %d bytes: its flow is over", len(payload))
            return
        self._table.get(flow.visitor)
        try:
            send_datagram(flow.sock, payload, flow.visitor)
            self._stats.udp.down.bytes += len(payload)
        except OSError as error:
            self._drop("visitor_unreachable", "an answer of %d bytes: %s", len(payload), reason(error))

    def _end(self, flow: VisitorFlow, outcome: str) -> None:
        self._stats.udp.end(outcome)
        del self._by_number[flow.number]
        flow.lane.flows -= 1
        self._log.debug("flow %d ends: visitor %s", flow.number, flow.visitor)
        if outcome == "evicted":
            words = "dropped the longest idle flow, of %s: SEMAPHORE_LIMIT is reached"
            self._log.limited(logging.WARNING, outcome, words, flow.visitor, burst=3)
        if not flow.lane.flows:
            flow.lane.close()

    def _drop(self, why: str, message: str, *args: object) -> None:
        self._stats.udp_drops[why] += 1
        self._log.limited(logging.WARNING, why, f"dropped {message}", *args, burst=3)

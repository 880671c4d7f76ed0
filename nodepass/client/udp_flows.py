"""The client's end of UDP lanes: one UDP socket, connected to the target, per flow."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import gevent

from nodepass.config import Settings
from nodepass.errors import reason
from nodepass.log import Limit, Log
from nodepass.net.stream import Stream
from nodepass.stats import Stats
from nodepass.tasks import report_bug
from nodepass.tunnel.udp import FlowTable, Lane, drop_datagram

ANSWERS_PER_TURN = 64  # datagrams read from one socket before others get their turn


@dataclass(eq=False, slots=True)
class TargetFlow:
    """One flow's socket at the target."""

    number: int
    lane: Lane
    sock: socket.socket
    watcher: Any  # gevent's io watcher, which has no type
    last: float = 0.0


class TargetFlows:
    """Sends what comes on lanes to the target, and what the target says back, as long as a flow lives."""

    def __init__(self, dial: Callable[[], socket.socket], settings: Settings, log: Log, stats: Stats) -> None:
        self._dial = dial
        self._log = log
        self._stats = stats
        self._table: FlowTable[TargetFlow] = FlowTable(
            settings.semaphore_limit, settings.udp_session_timeout, self._end
        )
        self.sweep_forever = self._table.sweep_forever

    def __len__(self) -> int:
        return len(self._table)

    def run_lane(self, stream: Stream, log: Log) -> None:
        """Serve one lane until it ends; its flows end with it."""
        lane = Lane(lambda number, payload: self._deliver(lane, number, payload))
        log.debug("lane.opened", "lane opens")
        try:
            because = lane.run(stream)
            log.debug("lane.closed", "lane ends: %(error)s", error=because)
        finally:
            lane.ended = True
            self._table.end(lambda flow: flow.lane is lane)

    def _deliver(self, lane: Lane, number: int, payload: bytes) -> None:
        try:
            flow = self._table.get((lane, number)) or self._begin(lane, number)
            try:
                flow.sock.send(payload)
            except ConnectionRefusedError:  # of the datagram before this one
                flow.sock.send(payload)
            self._stats.udp.up.bytes += len(payload)
        except OSError as error:
            words = "a datagram of %(size)d bytes: %(error)s"
            drop_datagram(self._log, self._stats, "target_unreachable", words, size=len(payload), error=reason(error))

    def _begin(self, lane: Lane, number: int) -> TargetFlow:
        sock = self._dial()
        flow = TargetFlow(number, lane, sock, gevent.get_hub().loop.io(sock.fileno(), 1))
        self._table.add((lane, number), flow)
        flow.watcher.start(self._readable, flow, cast(Any, sock)._sock)
        self._stats.udp.begin()
        self._log.debug("flow.opened", "flow %(flow)d begins, %(flows)d flows", flow=number, flows=len(self))
        return flow

    def _readable(self, flow: TargetFlow, sock: socket.socket) -> None:
        """Pass on what the target has said. Runs in gevent's hub, so nothing here may wait, nor hear of a bug."""
        try:
            self._pass_on(flow, sock)
        except Exception as error:  # noqa: BLE001  # its flow is over, the others go on
            report_bug(f"flow {flow.number}", error, self._log, self._stats)
            self._table.end(lambda each: each is flow)

    def _pass_on(self, flow: TargetFlow, sock: socket.socket) -> None:
        for _ in range(ANSWERS_PER_TURN):
            try:
                answer = sock.recv(65536)
            except BlockingIOError:
                return
            except OSError as error:  # refused: nobody listens there
                words = "a datagram to the target: %(error)s"
                drop_datagram(self._log, self._stats, "target_refused", words, error=reason(error))
                return
            self._table.get((flow.lane, flow.number))
            if flow.lane.send(flow.number, answer):
                self._stats.udp.down.bytes += len(answer)
            else:
                words = "an answer of %(size)d bytes: its lane is full"
                drop_datagram(self._log, self._stats, "lane_full", words, size=len(answer))

    def _end(self, flow: TargetFlow, outcome: str) -> None:
        self._stats.udp.end(outcome)
        flow.watcher.stop()
        flow.watcher.close()
        flow.sock.close()
        self._log.debug("flow.closed", "flow %(flow)d ends", flow=flow.number, outcome=outcome)
        if outcome == "evicted":
            words = "dropped the longest idle flow: SEMAPHORE_LIMIT is reached"
            self._log.warning("flow.evicted", words, Limit(burst=3), flow=flow.number)

"""A v2 server that runs by itself: it does what `V1Server` does, over the steps of a `ServerSide`, and carries UDP on
lanes. It has one client at a time: a second one is rejected as busy.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from itertools import count

from tests.support.certificates import Certificate
from tests.support.sockets import Address, abort, format_address
from tests.support.v1_server import TCP, V1Server
from tests.support.v1_stream import PlainStream, Stream, relay
from tests.support.wire2.lane import LANE, LARGEST, Lane
from tests.support.wire2.lines import Line
from tests.support.wire2.server_side import ServerSide, Terms
from tests.support.wire2.talk import Rejected


@contextlib.contextmanager
def _abort_on_error(side: ServerSide) -> Iterator[None]:
    try:
        yield
    except BaseException:
        side.talk.abort()
        raise


class V2Server(V1Server):
    """One server; a context manager that listens on kernel-chosen ports of the loopback address."""

    def __init__(
        self,
        tls: int = 0,
        certificate: Certificate | None = None,
        *,
        secret: str = "",
        name: str = "",
        heartbeat: float | None = 0.2,
        announced: float = 5.0,
        has_sid: bool = False,
        mux: bool = False,
        lanes: int = 4,
    ) -> None:
        """heartbeat: seconds between two, None for none. announced: what the client is told of it."""
        super().__init__(tls, certificate, heartbeat=heartbeat)
        self.terms = Terms(tls, certificate, secret, name, round(announced * 1000), has_sid, mux)
        self._lanes: dict[int, Lane] = {}
        self._lane_count = lanes
        self._flows: dict[Address, int] = {}
        self._visitors: dict[int, Address] = {}
        self._flow_lock = threading.Lock()
        self._numbers = count(1)
        self.side: ServerSide | None = None
        self.hellos: list[Line] = []
        self.answers = 0
        self.goodbyes: list[str] = []
        self.rejected_data = 0

    def __enter__(self) -> V2Server:
        super().__enter__()
        return self

    @property
    def data_port(self) -> int:
        """The port that the offer names."""
        return (self.tunnel_address if self.terms.mux else self.data_address)[1]

    # The control connection

    def _accept_clients(self) -> None:
        self._accept(self._tunnel, self._sort)

    def _sort(self, sock: socket.socket) -> None:
        side = ServerSide(sock, self.data_port, self.terms)
        with _abort_on_error(side):
            line = side.hear_first_line()
        if line.host == "data":
            self._admit(side, line)
        else:
            self._serve_client(side, line)

    def _serve_client(self, side: ServerSide, hello: Line) -> None:
        try:
            self._greet_client(side, hello)
            self._beat(side.talk.sock)
        finally:
            if self.side in (side, None):
                self.side = None
                self._lanes = {}
                self._detach(side.talk.sock)
            side.talk.abort()

    def _greet_client(self, side: ServerSide, hello: Line) -> None:
        self.hellos.append(hello)
        if self._control:
            side.take_hello(hello)
            side.reject("busy")
        side.negotiate(hello)
        with self._changed:
            self.side = side
            self._control = side.talk.sock
            self.connects += 1
            self._changed.notify_all()
        self.workers.spawn(lambda: self._attend(side))

    def _beat(self, control: socket.socket) -> None:
        """Send heartbeats, each when it is due, as long as this is the client."""
        interval = self._heartbeat
        due = time.monotonic() + (interval or 0)
        with self._changed:
            while self._control is control and self.side:
                left = due - time.monotonic() if interval else None
                if interval and left is not None and left <= 0:
                    self.side.beat(len(self._idle))
                    due += interval
                else:
                    self._changed.wait(left)

    def _attend(self, side: ServerSide) -> None:
        """Count the answers to heartbeats until the client is gone or has been silent for too long."""
        patience = 3 * self.terms.hb / 1000 if self._heartbeat else None
        with contextlib.suppress(OSError, AssertionError):
            while True:
                line = side.talk.hear(patience)
                if line.host == "bye":
                    self.goodbyes.append(line.parameters["reason"])
                else:
                    assert line.host == "beat", line.raw
                    self.answers += 1
        with self._changed:
            if self._control is side.talk.sock:
                self._control = None
            self._changed.notify_all()

    def write(self, line: bytes) -> None:
        """Write any bytes to the client's control connection."""
        self.wait_for_client()
        with self._changed:
            if self.side is None:
                raise ConnectionError("the client has gone")
            self.side.talk.write(line)

    def launch(self, kind: int, visitor: str | None = None, local: str | None = None) -> Stream:
        """Start a session on an idle data connection and return our end of it."""
        identity, stream = self.take()
        with self._changed:
            if self.side is None:
                raise ConnectionError("the client has gone")
            self.side.launch(identity, kind, visitor, local)
        return stream

    # Data connections

    def admit(self, sock: socket.socket) -> None:
        """Give a data connection its id and, once it has proven itself, keep it as idle."""
        side = ServerSide(sock, self.data_port, self.terms)
        with _abort_on_error(side):
            if self.terms.tls:
                side.secure()
            line = side.talk.hear() if self.terms.has_sid or self.terms.mux else None
        self._admit(side, line)

    def _admit(self, data: ServerSide, line: Line | None) -> None:
        """Take a data connection whose line, if there has to be one, has been read."""
        client = self.side
        with _abort_on_error(data), self._counting_rejected():
            if client is None:
                raise Rejected("there is no client")
            if line:
                client.check_sid(line)
            identity = client.give_id(data.talk)
            client.check_proof(data.talk, identity)
        data.talk.sock.settimeout(None)
        with self._changed:
            self._idle[identity] = data.talk
            self._changed.notify_all()

    @contextlib.contextmanager
    def _counting_rejected(self) -> Iterator[None]:
        try:
            yield
        except Rejected:
            self.rejected_data += 1
            raise

    def _serve_visitor(self, sock: socket.socket) -> None:
        try:
            stream = self.launch(TCP, format_address(sock.getpeername()), format_address(sock.getsockname()))
        except OSError:
            abort(sock)
        else:
            relay(PlainStream(sock), stream)

    # Datagrams

    def _receive_datagrams(self) -> None:
        while True:
            data, visitor = self._udp.recvfrom(LARGEST)
            if self.workers.is_closed:
                return
            with contextlib.suppress(OSError):
                flow = self._flow_of(visitor)
                self._lane_of(flow).send(flow, data)

    def _flow_of(self, visitor: Address) -> int:
        with self._flow_lock:
            if visitor not in self._flows:
                self._flows[visitor] = flow = next(self._numbers)
                self._visitors[flow] = visitor
            return self._flows[visitor]

    def _lane_of(self, flow: int) -> Lane:
        number = flow % self._lane_count
        if number not in self._lanes:
            lane = self._lanes[number] = Lane(self.launch(LANE))
            self.workers.spawn(lambda: self._bring_back(lane))
        return self._lanes[number]

    def _bring_back(self, lane: Lane) -> None:
        while True:
            flow, payload = lane.receive()
            self._udp.sendto(payload, self._visitors[flow])

    def open_lane(self) -> tuple[Lane, Stream]:
        """A new lane for the test to speak on."""
        stream = self.launch(LANE)
        return Lane(stream), stream

"""A v2 server written from the description of the wire, for our client to work against.

By itself it does what `V1Server` does, and what v2 adds: it negotiates, proves its key, checks every data
connection, counts the answers to its heartbeats, carries UDP on lanes and can do with one port. One client
at a time: a second one is turned away as busy.
"""

from __future__ import annotations

import contextlib
import hmac
import socket
import threading
import time
from itertools import count

from tests.support.certificates import Certificate
from tests.support.sockets import Address, abort
from tests.support.v1_server import V1Server
from tests.support.v1_stream import Stream, receive_exactly
from tests.support.v2_control import Conversation, Signal
from tests.support.v2_crypto import PROOF, Transcript, make_nonce
from tests.support.v2_lane import LANE, LARGEST, Lane

DATA = b"//data\n"


class V2Server(V1Server):
    """One server; a context manager that listens on kernel-chosen ports of the loopback address."""

    def __init__(
        self,
        tls: int = 0,
        certificate: Certificate | None = None,
        *,
        secret: str = "",
        heartbeat: float | None = 0.2,
        announced: float = 5.0,
        mux: bool = False,
        lanes: int = 4,
    ) -> None:
        """heartbeat: seconds between two, None for none. announced: what the client is told of it."""
        super().__init__(tls, certificate, heartbeat=heartbeat)
        self.secret = secret
        self._fingerprint = certificate.fingerprint if certificate and tls == 1 else ""
        self._announced = announced
        self._is_mux = mux
        self._lanes: dict[int, Lane] = {}
        self._lane_count = lanes
        self._flows: dict[Address, int] = {}
        self._visitors: dict[int, Address] = {}
        self._flow_lock = threading.Lock()
        self._numbers = count(1)
        self.transcript: Transcript | None = None
        self.hellos: list[Signal] = []
        self.answers = 0
        self.refused_proofs = 0

    def __enter__(self) -> V2Server:
        super().__enter__()
        return self

    @property
    def data_port(self) -> int:
        """The port that the tunnel signal names."""
        return (self.tunnel_address if self._is_mux else self.data_address)[1]

    # The control connection

    def _accept_clients(self) -> None:
        self._accept(self._tunnel, self._sort)

    def _sort(self, sock: socket.socket) -> None:
        if self._is_mux and is_data(sock):
            self._handle_data(sock)
            return
        try:
            self._greet(sock)
            self._beat(sock)
        finally:
            if self._control in (sock, None):
                self._lanes = {}
                self._detach(sock)
            abort(sock)

    def _greet(self, control: socket.socket) -> None:
        talk = Conversation(control)
        hello = talk.hear()
        self.hellos.append(hello)
        assert hello.host == "hello", hello.line
        assert hello.names == ["v", "nonce"], hello.line
        assert len(bytes.fromhex(hello.parameters["nonce"])) == 16, hello.line
        server_nonce = self._challenge(talk, hello.parameters["nonce"]) if self.secret else ""
        if self._control:
            talk.say("//error?reason=busy")
            raise ConnectionError("there is a client")
        self._announce(talk, hello.parameters["nonce"], server_nonce)
        with self._changed:
            self._control = control
            self.connects += 1
            self._changed.notify_all()
        self.workers.spawn(lambda: self._attend(talk))

    def _challenge(self, talk: Conversation, client_nonce: str) -> str:
        server_nonce = make_nonce()
        talk.say(f"//challenge?nonce={server_nonce}")
        auth = talk.hear()
        expected = Transcript(self.secret, client_nonce, server_nonce).client_proof()
        if auth.host != "auth" or not hmac.compare_digest(auth.parameters.get("mac", ""), expected):
            talk.say("//error?reason=key-mismatch")
            raise ConnectionError("the client's proof is wrong")
        return server_nonce

    def _announce(self, talk: Conversation, client_nonce: str, server_nonce: str) -> None:
        signal = f"//{self.data_port}?v=2&hb={round(self._announced * 1000)}"
        if self._is_mux:
            signal += "&mux=1"
        if self._fingerprint:
            signal += f"&fp={self._fingerprint}"
        if self.secret:
            self.transcript = Transcript(
                self.secret, client_nonce, server_nonce, self.data_port, self.tls, self._fingerprint
            )
            signal += f"&mac={self.transcript.server_proof()}"
        talk.say(f"{signal}#{self.tls}")

    def _beat(self, control: socket.socket) -> None:
        """Send heartbeats, each when it is due, as long as this is the client."""
        interval = self._heartbeat
        due = time.monotonic() + (interval or 0)
        with self._changed:
            while self._control is control:
                left = due - time.monotonic() if interval else None
                if interval and left is not None and left <= 0:
                    control.sendall(b"\n")
                    due += interval
                else:
                    self._changed.wait(left)

    def _attend(self, talk: Conversation) -> None:
        """Count the answers to heartbeats until the client is gone or has been silent for too long."""
        patience = 3 * self._announced if self._heartbeat else None
        with contextlib.suppress(OSError):
            while talk.hear_line(patience) == b"":
                self.answers += 1
        with self._changed:
            if self._control is talk.sock:
                self._control = None
            self._changed.notify_all()

    # Data connections

    def admit(self, sock: socket.socket) -> None:
        """Give a data connection its id and, once it has proven itself, keep it as idle."""
        stream = self.secure(sock)
        identity = self._make_id()
        stream.send(identity)
        if self.transcript and receive_exactly(stream, PROOF) != self.transcript.data_proof(identity):
            self.refused_proofs += 1
            stream.abort()
            return
        with self._changed:
            self._idle[identity] = stream
            self._changed.notify_all()

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


def is_data(sock: socket.socket) -> bool:
    """Whether a new connection is a data connection; if so its first line is taken off."""
    if sock.recv(len(DATA), socket.MSG_PEEK | socket.MSG_WAITALL) != DATA:
        return False
    sock.recv(len(DATA), socket.MSG_WAITALL)
    return True

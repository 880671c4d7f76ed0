"""A v2 client written from the description of the wire, for our server to work against.

By itself it does what `V1Client` does, and what v2 adds: it negotiates, proves its key, answers heartbeats
and serves UDP lanes. A test may also lead it (`automatic=False`) through `dial`, `hello`, `authenticate`,
`adopt` and `open_data`, and do any of them wrongly.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable
from pathlib import Path

from tests.support.sockets import PATIENCE, Address, abort
from tests.support.v1_client import V1Client
from tests.support.v1_stream import Stream, TLSStream, receive_exactly
from tests.support.v2_control import Conversation, Refused, Signal, dial
from tests.support.v2_crypto import Transcript, make_nonce
from tests.support.v2_lane import LANE, Lane, TargetFlows

Prove = Callable[[bytes], bytes]
"""What a client writes on a data connection whose id it has read."""


class V2Client(V1Client):
    """One client; a context manager."""

    def __init__(
        self,
        tunnel: Address,
        target: Address = ("127.0.0.1", 0),
        *,
        secret: str = "",
        cafile: Path | None = None,
        server_name: str = "localhost",
        pool: int = 8,
        flow_timeout: float = 5.0,
        automatic: bool = True,
    ) -> None:
        """flow_timeout: seconds without traffic after which a flow ends."""
        super().__init__(tunnel, target, cafile=cafile, server_name=server_name, pool=pool, automatic=automatic)
        self.secret = secret
        self._flow_timeout = flow_timeout
        self.answers_heartbeats = True
        self.refusals: list[str] = []

    def __enter__(self) -> V2Client:
        super().__enter__()
        return self

    # The negotiation, one step at a time

    def dial(self) -> Conversation:
        """Open the control connection and say nothing."""
        self.talk = dial(self._tunnel)
        self._control = self.workers.own(self.talk.sock)
        return self.talk

    def hello(self, nonce: str | None = None) -> None:
        """Say who we are."""
        self.nonce = nonce or make_nonce()
        self.talk.say(f"//hello?v=2&nonce={self.nonce}")

    def challenge(self) -> str:
        """The server's nonce, which has to come now."""
        signal = self.talk.hear()
        assert signal.host == "challenge", signal.line
        assert signal.names == ["nonce"], signal.line
        self.server_nonce = signal.parameters["nonce"]
        assert len(bytes.fromhex(self.server_nonce)) == 16
        return self.server_nonce

    def proof(self) -> str:
        """The right answer to the challenge."""
        return Transcript(self.secret, self.nonce, self.server_nonce).client_proof()

    def authenticate(self, mac: str | None = None) -> None:
        """Answer the challenge, rightly unless told otherwise."""
        self.talk.say(f"//auth?mac={self.proof() if mac is None else mac}")

    def adopt(self) -> Signal:
        """Hear the tunnel signal, check it to the letter, and do as it says."""
        signal = self.signal = self.talk.hear()
        given = signal.parameters
        assert signal.host.isdigit(), f"not a tunnel signal: {signal.line!r}"
        self.tls = int(signal.fragment)
        expected = ["v", "hb"] + ["mux"] * ("mux" in given) + ["fp"] * (self.tls == 1) + ["mac"] * bool(self.secret)
        assert signal.names == expected, signal.line
        assert given["v"] == "2", signal.line
        assert given.get("mux", "1") == "1", signal.line
        self.interval = int(given["hb"]) / 1000
        self.is_mux = "mux" in given
        self.data_address = (self._tunnel[0], int(signal.host))
        if self.is_mux:
            self.data_address = self._tunnel
        if self.secret:
            self._adopt_key(signal)
        self.connects += 1
        return signal

    def _adopt_key(self, signal: Signal) -> None:
        given = signal.parameters
        agreed = Transcript(self.secret, self.nonce, self.server_nonce, int(signal.host), self.tls, given.get("fp", ""))
        if given["mac"] != agreed.server_proof():
            raise Refused("the server's proof is wrong")
        self.transcript = agreed

    def connect(self) -> None:
        """The whole negotiation."""
        self.dial()
        self.hello()
        try:
            if self.secret:
                self.challenge()
                self.authenticate()
            self.adopt()
        except Refused as refused:
            self.refusals.append(str(refused))
            raise

    # Connected

    def next_launch(self) -> tuple[str, int]:
        """The id and the kind of the next launch; heartbeats are answered on the way."""
        while True:
            line = self.talk.hear_line(3 * self.interval)
            if not line:
                if self.answers_heartbeats:
                    self.talk.say(b"")
                continue
            identity, _, kind = line.removeprefix(b"//").decode().partition("#")
            assert kind in ("1", "3"), f"not a launch of v2: {line!r}"
            return identity, int(kind)

    def prove(self, identity: bytes) -> bytes:
        """The right proof for a data connection: none without a key."""
        return self.transcript.data_proof(identity) if self.secret else b""

    def open_data(self, timeout: float = PATIENCE, prove: Prove | None = None) -> tuple[str, Stream]:
        """Open one data connection and prove it, rightly unless told otherwise; its id and the stream."""
        sock = self.workers.own(socket.create_connection(self.data_address, timeout))
        if self.is_mux:
            sock.sendall(b"//data\n")
        stream = self.secure(sock)
        self._check_pin(stream)
        identity = receive_exactly(stream, 8)
        if proof := (prove or self.prove)(identity):
            stream.send(proof)
        sock.settimeout(None)
        return identity.decode(), stream

    def _check_pin(self, stream: Stream) -> None:
        if self.tls != 1:
            return
        assert isinstance(stream, TLSStream)
        der = stream.tls.getpeercert(binary_form=True)
        assert der is not None
        if hashlib.sha256(der).hexdigest() != self.signal.parameters["fp"]:
            raise Refused("the certificate is not the one that was announced")

    def _flush(self) -> None:
        if hasattr(self, "talk"):
            abort(self.talk.sock)
        self.close_idle()

    def _serve_datagram(self, stream: Stream) -> None:
        """Serve a lane: what a v1 client does for one datagram, a v2 client does for all."""
        TargetFlows(Lane(stream), self._target, self._flow_timeout, self.workers).run()

    def next_lane(self, streams: dict[str, Stream]) -> Lane:
        """The lane that the next launch has to open, among these data connections."""
        identity, kind = self.next_launch()
        assert kind == LANE, f"launched as #{kind}"
        return Lane(streams.pop(identity))

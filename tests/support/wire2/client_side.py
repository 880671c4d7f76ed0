"""A client of wire v2 that a test leads step by step: one control connection and its data connections.

Each step is right by itself; a test that wants one wrong passes other bytes, or writes them on `talk`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from OpenSSL import SSL

from tests.support.scope import Closes
from tests.support.sockets import Address
from tests.support.wire2 import lines
from tests.support.wire2.lines import LONGEST, Line
from tests.support.wire2.proofs import PROOF, Agreement
from tests.support.wire2.talk import Rejected, Talk, dial
from tests.support.wire2.tls import client_context

Prove = Callable[[bytes, str], bytes]
"""What a client writes on a data connection of this id, whose exporter is this."""

SIDS = re.compile(r"[0-9a-f]{32}")
IDS = re.compile(rb"[0-9a-f]{8}")

SILENCE = 0.2
"""Seconds from the dial within which a server certainly has the hello in time: it waits 0.25 s, from its accept on."""


class GoodbyeError(ConnectionError):
    """The server has said that it ends the connection; its text is the token of the reason."""


class ClientSide(Closes):
    """One client; a context manager that closes every connection that it has made."""

    talk: Talk
    offer: Line

    def __init__(
        self,
        address: Address,
        *,
        secret: str = "",
        name: str = "",
        demand: int = 0,
        identity: str | None = None,
        wants: bool = False,
        cafile: Path | None = None,
        server_name: str = "127.0.0.1",
        source: str | None = None,
    ) -> None:
        """demand: 0 begins in the clear and does as it is told, 1 and 2 begin with TLS. wants: launches with addresses.
        cafile: the certificate is verified against these, and `server_name`.
        """
        self.address = address
        self.secret = secret
        self.name = name
        self.demand = demand
        self.identity = identity or lines.make_client()
        self.wants = wants
        self.server_name = server_name
        self.source = source
        self.context = client_context(None if demand == 1 else cafile)
        self.agreement = Agreement(secret, name)
        self.made: list[Talk] = []
        self.tls = 0
        self.idle: int | None = None

    def close(self) -> None:
        for talk in self.made:
            talk.abort()

    # The negotiation, one step at a time

    def dial(self) -> Talk:
        """Open the control connection and say nothing."""
        self.talk = self.connect_to(self.address, self.source)
        return self.talk

    def connect_to(self, address: Address, source: str | None) -> Talk:
        """Make a connection, of whichever kind."""
        talk = dial(address, source)
        self.made.append(talk)
        return talk

    def secure(self, context: SSL.Context | None = None, session: SSL.Session | None = None) -> None:
        """Go on inside TLS."""
        self.talk.become_client(context or self.context, self.server_name, session)

    def say_hello(self, hello: bytes | None = None) -> bytes:
        """Say who we are; the hello, without its end."""
        if hello is None:
            hello = lines.make_hello(client=self.identity, name=self.name, wants=self.wants)
        self.agreement = Agreement(self.secret, self.name, hello, channel=self.talk.channel)
        self.talk.say(hello)
        return hello

    def begin(self) -> None:
        """Everything up to the hello."""
        self.dial()
        if self.demand:
            self.secure()
        self.say_hello()

    def hear_tls(self) -> None:
        """The server has to ask for TLS now."""
        line = self.talk.read_line()
        assert line == b"//tls", line
        self.secure()

    def take_challenge(self, line: Line) -> None:
        """Check that a line is a challenge, and keep it."""
        if line.host != "challenge":
            raise Rejected(f"not challenged but told {line.raw!r}")
        assert line.names == ["nonce"], line.raw
        assert SIDS.fullmatch(line.parameters["nonce"]), line.raw
        assert not line.fragment, line.raw
        self.agreement = replace(self.agreement, challenge=line.raw)

    def hear_challenge(self) -> None:
        """The challenge has to come now."""
        self.take_challenge(self.talk.hear(longest=LONGEST))

    def authenticate(self, mac: str | None = None) -> None:
        """Answer the challenge, rightly unless told otherwise."""
        self.talk.say(f"//auth?mac={self.agreement.client_proof() if mac is None else mac}")

    def take_offer(self, offer: Line) -> None:
        """Check an offer to the letter, and do as it says."""
        given = offer.parameters
        assert re.fullmatch("[1-9][0-9]{0,4}", offer.host), f"not an offer: {offer.raw!r}"
        assert offer.fragment in ("1", "2") if self.talk.channel else offer.fragment == "0", offer.raw
        optional = [name for name in ("sid", "mux") if name in given]
        assert offer.names == ["v", "hb", *optional, *["mac"] * bool(self.secret)], offer.raw
        assert given["v"] == "2", offer.raw
        assert 10 <= int(given["hb"]) <= 60_000, offer.raw
        assert SIDS.fullmatch(given.get("sid", "0" * 32)), offer.raw
        assert given.get("mux", "1") == "1", offer.raw
        if int(offer.fragment) < self.demand:
            raise Rejected(f"offered {offer.raw!r}")
        self.agreement = replace(self.agreement, offer=offer.without_mac)
        if self.secret and given["mac"] != self.agreement.server_proof():
            raise Rejected("the server's proof is wrong")
        self.offer = offer
        self.tls = int(offer.fragment)
        self.sid = given.get("sid")
        self.is_mux = "mux" in given
        self.interval = int(given["hb"]) / 1000
        self.data_address = self.address if self.is_mux else (self.address[0], int(offer.host))

    def hear_offer(self) -> Line:
        """The offer has to come now."""
        self.take_offer(self.talk.hear(longest=LONGEST))
        return self.offer

    def negotiate(self) -> None:
        """Everything behind the hello."""
        line = self.talk.hear(longest=LONGEST)
        if line.raw == b"//tls":
            self.secure()
            self.say_hello()
            line = self.talk.hear(longest=LONGEST)
        if self.secret:
            self.take_challenge(line)
            self.authenticate()
            line = self.talk.hear(longest=LONGEST)
        elif line.host == "challenge":
            raise Rejected("key-required")
        self.take_offer(line)

    def connect(self) -> None:
        """The whole negotiation; again where the hello was late, and the server has taken silence for wire v1."""
        while True:
            dialled = time.monotonic()
            self.begin()
            is_late = time.monotonic() - dialled > SILENCE
            try:
                self.negotiate()
            except (AssertionError, ConnectionError):
                if not is_late:
                    raise
                self.talk.abort()
            else:
                return

    # Connected

    def hear_signal(self, timeout: float | None = None, *, answers: bool = True) -> Line:
        """The next signal that is no heartbeat; heartbeats are answered on the way."""
        while True:
            line = self.talk.hear(3 * self.interval if timeout is None else timeout)
            if line.host != "beat":
                return line
            self.take_beat(line)
            if answers:
                self.talk.say("//beat?ok=1")

    def take_beat(self, line: Line) -> None:
        """Check a heartbeat to the letter."""
        assert re.fullmatch(rb"//beat\?idle=(0|[1-9][0-9]*)", line.raw), line.raw
        self.idle = int(line.parameters["idle"])

    def hear_launch(self, timeout: float | None = None, *, answers: bool = True) -> Line:
        """The next launch, checked to the letter. Raises GoodbyeError where the server says bye instead."""
        line = self.hear_signal(timeout, answers=answers)
        if line.host == "bye":
            assert line.names == ["reason"], line.raw
            raise GoodbyeError(line.parameters["reason"])
        assert re.fullmatch("[0-9a-f]{8}", line.host), f"not a launch: {line.raw!r}"
        assert line.fragment in ("1", "3"), line.raw
        assert line.names == (["from", "to"] if self.wants and line.fragment == "1" else []), line.raw
        return line

    # Data connections

    def dial_data(self, source: str | None = None, *, session: SSL.Session | None = None) -> Talk:
        """A data connection, inside TLS where the offer says so, on which nothing has been said yet."""
        talk = self.connect_to(self.data_address, source or self.source)
        if self.tls:
            talk.become_client(self.context, self.server_name, session)
        return talk

    def prove(self, identity: bytes, channel: str) -> bytes:
        """The right proof of a data connection: none without a key."""
        return self.agreement.data_proof(identity, channel) if self.secret else b""

    def hear_id(self, talk: Talk) -> bytes:
        """The id of a data connection, after a right proof of it where there is a key."""
        identity = talk.receive_exactly(8)
        assert IDS.fullmatch(identity), identity
        if self.secret and talk.receive_exactly(PROOF) != self.agreement.id_proof(identity, talk.channel):
            raise Rejected("the id's proof is wrong")
        return identity

    def open_data(
        self,
        prove: Prove | None = None,
        *,
        sid: str | None = None,
        source: str | None = None,
        session: SSL.Session | None = None,
    ) -> tuple[str, Talk]:
        """Open a data connection and prove it, rightly unless told otherwise; its id and the connection."""
        talk = self.dial_data(source, session=session)
        if sid := sid or self.sid:
            talk.say(f"//data?sid={sid}")
        identity = self.hear_id(talk)
        if proof := (prove or self.prove)(identity, talk.channel):
            talk.write(proof)
        return identity.decode(), talk

"""Both sides of the handshake, and the reader behind it, against peers that do as a script says.

A peer of the script knows the wire: it says hello, challenges and proves when told to, so that a few bytes of script
reach every state; or it says anything else. TLS is fuzzed in `records`; here a ClientHello is answered in the clear.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import cache
from itertools import chain
from typing import Any, cast
from unittest import mock

from nodepass.errors import ClearAnswer, ProtocolError, RefusedError
from nodepass.log import Log
from nodepass.net.stream import read_only_line
from nodepass.stats import Stats
from nodepass.tls import stream as tls
from nodepass.tunnel.control import Agreement, ClientControl, ServerControl
from nodepass.tunnel.handshake import Candidate, Terms, accept_client, connect_to_server
from nodepass.wire.auth import Key, Transcript
from nodepass.wire.lines import MAX_LINE, MAX_OPENING
from nodepass.wire.negotiation import (
    REASONS,
    Auth,
    Challenge,
    Hello,
    Offer,
    Refusal,
    StartTLS,
    parse_first,
    parse_opening,
    without_mac,
)
from nodepass.wire.signals import BYES, Beat, BeatAnswer, Bye, Launch, Signal, Unknown, parse_signal, parse_v1_signal
from tests.fuzz.scripted import ScriptedSocket, ScriptedStream, assert_plain, plain_log
from tests.fuzz.scripts import Script

NONCE, CLIENT = "0123456789abcdef" * 2, "0011223344556677"
HELLO = Hello(NONCE, CLIENT, "web")
OFFER = Offer(10102, 0, 5000, "f" * 32, True)
CHALLENGE = Challenge(NONCE)
WIRES = ("auto", "1", "2")


@cache
def key() -> Key:
    return Key("correct horse battery staple", "web")


class Peer:
    """Says what its script says; `stream` is what the program talks to it through."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self.sock = ScriptedSocket(self._act)
        self.stream = ScriptedStream(cast(Any, self.sock))

    def client_control(self) -> ClientControl:
        """The program's client that talks to it."""
        return ClientControl(self.stream, 5.0, Log("fuzz"), Stats())

    def _act(self) -> bytes:
        if not self._script:
            return b""
        act = self._script.number()
        if act == 0xFD:
            raise ConnectionResetError("reset")
        if act == 0xFC:
            raise TimeoutError("nothing came")
        if act == 0xFB:
            return b""
        known = self._sentences()
        return known[act] if act < len(known) else self._script.take(act % 64) or b"\n"

    def _sentences(self) -> list[bytes]:
        return []


def line_of(said: bytes, name: bytes) -> bytes:
    """The last whole line of this name, without its newline."""
    found = [line for line in said.split(b"\n")[:-1] if line.startswith(name)]
    return found[-1] if found else b""


class ScriptedClient(Peer):
    """What a server may meet."""

    @property
    def transcript(self) -> Transcript:
        return Transcript(self.sock.heard.partition(b"\n")[0], line_of(self.sock.sent, b"//challenge"), b"")

    def _sentences(self) -> list[bytes]:
        proof = key().client_proof(self.transcript)
        other = Hello("", version="3")
        return [HELLO.encode(), Auth(proof).encode(), Auth("0" * 64).encode(), b"\n", other.encode()]


class ScriptedServer(Peer):
    """What a client may meet."""

    def _sentences(self) -> list[bytes]:
        transcript = Transcript(line_of(self.sock.sent, b"//hello"), CHALLENGE.encode()[:-1], b"")
        proof = key().server_proof(transcript, OFFER.encode()[:-1])
        offers = [replace(OFFER, mac=mac) for mac in (proof, "", "0" * 64)]
        v1 = [Offer(80, tls) for tls in (0, 1, 2)]
        others: list[Challenge | Refusal | Offer | StartTLS] = [CHALLENGE, Refusal("busy"), *v1, StartTLS()]
        return [each.encode() for each in chain(offers, others)]


def check_server_handshake(data: bytes) -> None:
    """A server admits a client that proves the key and no other, and sends an unauthenticated one only a challenge."""
    script = Script(data)
    mine = key() if script.number() % 2 else None
    client = ScriptedClient(script)
    admitted: list[bool] = []

    def admit(candidate: Candidate) -> contextlib.nullcontext[None]:
        _assert_told_nothing(client.sock.sent, mine)
        admitted.append(bool(candidate.key))
        return contextlib.nullcontext()

    try:
        line = read_only_line(client.stream, MAX_OPENING)
        hello = parse_first(line)
        if not isinstance(hello, Hello) or hello.version != "2":
            return
        control = ServerControl(client.stream, 5.0, Log("fuzz"), Stats())
        agreement = accept_client(control, hello, line, [mine] if mine else [], OFFER, admit)
    except OSError as error:
        assert_plain(error)
        _assert_known(error)
        _assert_told_nothing(client.sock.sent, mine)
        assert not admitted
        return
    assert admitted == [mine is not None]
    assert control.agreement is agreement
    assert (agreement.key, agreement.client) == (mine, hello.client)
    if mine:
        assert mine.client_proof(client.transcript).encode() in client.sock.heard
    assert parse_opening(client.sock.sent.split(b"\n")[-2]) == agreement.offer
    assert (agreement.session is None) == (mine is None)
    assert bool(agreement.offer.mac) == (mine is not None)


def _assert_known(error: OSError) -> None:
    assert not isinstance(error, RefusedError) or error.reason in REASONS


def _assert_told_nothing(sent: bytes, mine: Key | None) -> None:
    lines = sent.split(b"\n")
    assert sent == b"" or (mine and len(lines) == 2 and isinstance(parse_opening(lines[0]), Challenge))


def check_client_handshake(data: bytes) -> None:
    """A client accepts no less than it demands (a key, TLS, the wire's version), and sends only what it must."""
    script = Script(data)
    choice = script.number()
    terms = Terms(
        "tunnel.example", choice // 8 % 3, WIRES[choice // 2 % 3], "web", CLIENT, key() if choice % 2 else None
    )
    server = ScriptedServer(script)
    in_the_clear = mock.Mock(side_effect=ClearAnswer("a line in the clear"))
    try:
        with mock.patch.object(tls, "connect_tls", in_the_clear):
            agreement = connect_to_server(server.client_control(), terms)
    except OSError as error:
        assert_plain(error)
    else:
        _check_agreement(agreement, terms, server)
    names = [line.partition(b"?")[0] for line in server.sock.sent.split(b"\n")[:-1]]
    assert names in ([], [b"//hello"], [b"//hello", b"//auth"][: 2 if terms.key else 1])
    assert not names or not (terms.tls or terms.wire == "1")


def _check_agreement(agreement: Agreement, terms: Terms, server: Peer) -> None:
    offer = agreement.offer
    assert agreement.key is terms.key
    assert (agreement.session is None) == (terms.key is None)
    if offer.version == 1:
        assert terms.key is None
        assert terms.wire != "2"
        assert offer.tls >= terms.tls
        assert terms.tls < 2 or terms.wire == "1"
        return
    assert terms.wire != "1"
    assert offer.tls == terms.tls == 0
    if terms.key:
        heard = server.sock.heard
        transcript = Transcript(line_of(server.sock.sent, b"//hello"), line_of(heard, b"//challenge"), b"")
        text = without_mac(line_of(heard, b"//%d" % offer.data_port) or heard.split(b"\n")[1], offer.mac)
        assert terms.key.server_proof(transcript, text) == offer.mac


def check_reader(data: bytes) -> None:
    """Launches come out in order, heartbeats are answered, everything else is counted, and the end has a reason."""
    script = Script(data)
    version = script.number() % 2 + 1
    peer = Peer(script)
    control = peer.client_control()
    control.agree(Agreement(OFFER if version > 1 else Offer(80, 0)))
    with plain_log():
        signals = list(control.signals(lambda: True))
    assert control.ending.reason in ("closed", "failed", "silent", *BYES)
    assert control.ending.words
    lines = peer.sock.heard.split(b"\n")[:-1]
    kinds = [_kind(line, version) for line in lines if len(line) <= MAX_LINE]
    assert signals == [kind for kind in kinds if isinstance(kind, Launch | Beat)]
    assert peer.sock.sent == b"//beat?ok=1\n" * sum(isinstance(kind, Beat) for kind in kinds)
    trouble = control._stats.trouble
    assert trouble["signals_malformed"] == kinds.count(None)
    assert trouble["signals_unknown"] == sum(isinstance(kind, Unknown | BeatAnswer) for kind in kinds)
    byes = [kind.reason for kind in kinds if isinstance(kind, Bye)]
    assert not byes or control.ending.reason == (byes[0] if byes[0] in BYES else "closed")


def _kind(line: bytes, version: int) -> Signal | None:
    try:
        return parse_signal(line) if version > 1 else parse_v1_signal(line)
    except ProtocolError:
        return None

"""Both sides of the handshake, and the reader behind it, against peers that do as a script says.

A peer of the script knows the wire: it says hello, challenges and proves when told to, so that a few bytes of script
reach every state; or it says anything else.
"""

from __future__ import annotations

import contextlib
from functools import cache
from itertools import chain
from typing import Any, cast

from nodepass.errors import ProtocolError, RefusedError
from nodepass.log import Log
from nodepass.stats import Stats
from nodepass.tunnel.control import Agreement, ClientControl
from nodepass.tunnel.handshake import accept_client, connect_to_server
from nodepass.wire.auth import Key
from nodepass.wire.signals import (
    MAX_LINE,
    REASONS,
    Auth,
    Challenge,
    Heartbeat,
    Hello,
    Launch,
    Offer,
    Refusal,
    Unknown,
    parse_hello,
    parse_opening,
    parse_signal,
)
from tests.fuzz.scripted import ScriptedSocket, assert_plain, plain_log
from tests.fuzz.scripts import Script

NONCE = "0123456789abcdef" * 2
TUNNEL = Offer(10102, 1, 5000, True, "f" * 64)


@cache
def key() -> Key:
    return Key("correct horse battery staple")


class Peer:
    """Says what its script says; `sock` is what the program talks to it through."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self.sock = ScriptedSocket(self._act)
        self.control = ClientControl(cast(Any, self.sock), 5.0, Log("fuzz"), Stats())

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

    def _said(self, name: bytes) -> str:
        """The nonce that the program has sent in a line of this name."""
        found = [line for line in self.sock.sent.split(b"\n") if line.startswith(name)]
        return found[-1].rpartition(b"nonce=")[2].decode() if found else NONCE


class ScriptedClient(Peer):
    """What a server may meet."""

    def _sentences(self) -> list[bytes]:
        proof = key().client_proof(NONCE, self._said(b"//challenge"))
        return [Hello(NONCE).encode(), Auth(proof).encode(), Auth("0" * 64).encode(), b"\n", Hello("", "3").encode()]


class ScriptedServer(Peer):
    """What a client may meet."""

    def _sentences(self) -> list[bytes]:
        proof = key().server_proof(self._said(b"//hello"), NONCE, TUNNEL)
        tunnels = [Offer(**{**vars(TUNNEL), "mac": mac}) for mac in (proof, "", "0" * 64)]
        others: list[Challenge | Refusal | Offer] = [Challenge(NONCE), Refusal("busy"), Offer(80, 0)]
        return [each.encode() for each in chain(tunnels, others)]


def check_server_handshake(data: bytes) -> None:
    """A server admits a client that proves the key and no other, and sends an unauthenticated one only a challenge."""
    script = Script(data)
    mine = key() if script.number() % 2 else None
    client = ScriptedClient(script)
    admitted: list[bool] = []

    def admit(proven: bool) -> contextlib.nullcontext[None]:
        _assert_told_nothing(client.sock.sent, mine)
        admitted.append(proven)
        return contextlib.nullcontext()

    try:
        agreement = accept_client(client.control, mine, TUNNEL, 5.0, admit)
    except OSError as error:
        assert_plain(error)
        _assert_known(error)
        _assert_told_nothing(client.sock.sent, mine)
        assert not admitted
        return
    assert admitted == [mine is not None]
    assert client.control.agreement is agreement
    if mine:
        assert agreement.version == 2
        proof = mine.client_proof(_nonce(client.sock.heard), client._said(b"//challenge"))
        assert proof.encode() in client.sock.heard
    assert parse_opening(client.sock.sent.split(b"\n")[-2]) == agreement.offer
    assert (agreement.session is None) == (mine is None)
    assert bool(agreement.offer.mac) == (mine is not None)


def _nonce(heard: bytes) -> str:
    """The nonce of the hello that was read."""
    return parse_hello(heard.split(b"\n")[0]).nonce


def _assert_known(error: OSError) -> None:
    assert not isinstance(error, RefusedError) or error.reason in REASONS


def _assert_told_nothing(sent: bytes, mine: Key | None) -> None:
    lines = sent.split(b"\n")
    assert sent == b"" or (mine and len(lines) == 2 and isinstance(parse_opening(lines[0]), Challenge))


def check_client_handshake(data: bytes) -> None:
    """A client with a key accepts no server that has not proven it; one without a key sends only its hello."""
    script = Script(data)
    mine = key() if script.number() % 2 else None
    server = ScriptedServer(script)
    try:
        agreement = connect_to_server(server.control, mine)
    except OSError as error:
        assert_plain(error)
    else:
        tunnel = agreement.offer
        assert (agreement.session is None) == (mine is None)
        if mine:
            assert tunnel.version == 2
            assert tunnel.mac in {
                mine.server_proof(server._said(b"//hello"), nonce, tunnel) for nonce in _challenges(server)
            }
    names = [line.partition(b"?")[0] for line in server.sock.sent.split(b"\n")[:-1]]
    assert names in ([b"//hello"], [b"//hello", b"//auth"][: 2 if mine else 1])


def _challenges(server: Peer) -> list[str]:
    lines = server.sock.heard.split(b"\n")
    return [line.partition(b"nonce=")[2][:32].decode("latin-1") for line in lines if b"//challenge" in line]


def check_reader(data: bytes) -> None:
    """Launches come out in order, heartbeats are answered, everything else is counted, and the end has a reason."""
    script = Script(data)
    version = script.number() % 2 + 1
    peer = Peer(script)
    control = peer.control
    control.agree(Agreement(TUNNEL if version > 1 else Offer(80, 0)))
    with plain_log():
        launches = list(control.launches())
    assert control.ending.reason in ("closed", "failed", "silent")
    assert control.ending.words
    lines = peer.sock.heard.split(b"\n")[:-1]
    kinds = [_kind(line) for line in lines if len(line) <= MAX_LINE]
    assert launches == [kind for kind in kinds if isinstance(kind, Launch)]
    answered = sum(isinstance(kind, Heartbeat) for kind in kinds) if version > 1 else 0
    assert peer.sock.sent == b"\n" * answered
    trouble = control._stats.trouble
    assert trouble["signals_malformed"] == kinds.count(None)
    assert trouble["signals_unknown"] == sum(isinstance(kind, Unknown) for kind in kinds)


def _kind(line: bytes) -> Launch | Heartbeat | Unknown | None:
    try:
        return parse_signal(line)
    except ProtocolError:
        return None

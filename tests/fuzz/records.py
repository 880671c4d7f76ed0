"""TLS between two of our streams over a wire that drops, repeats, swaps, cuts and alters records.

Either end passes its records by pyOpenSSL's private names or by its public API.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast
from unittest import mock

from OpenSSL import SSL

from nodepass.log import Log
from nodepass.tls import bio
from nodepass.tls.certificates import ServerCertificate
from nodepass.tls.contexts import _client_context, client_context
from nodepass.tls.stream import TLSStream
from nodepass.tls.verify import Verify
from tests.fuzz.scripted import assert_plain, plain_log
from tests.fuzz.scripts import Script

HEADER = 5
"""Bytes of a record's header; the last two are its length."""

ROUNDS = 12
"""Flights of a handshake, at most; one takes four."""


class Blocked(Exception):
    """A stream wants to wait."""


class End:
    """One end's socket: what arrives here, and where that of the other end is."""

    def __init__(self) -> None:
        self.arrived = b""
        self.is_over = False
        self.wire: list[bytes] = []  # records that the other end has sent and that have not arrived
        self.other: End

    def recv(self, size: int) -> bytes:
        if not self.arrived:
            if self.is_over:
                return b""
            raise BlockingIOError
        data, self.arrived = self.arrived[:size], self.arrived[size:]
        return data

    def recv_into(self, buffer: memoryview) -> int:
        data = self.recv(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def send(self, data: bytes) -> int:
        left = bytes(data)
        while left:
            size = HEADER + int.from_bytes(left[HEADER - 2 : HEADER], "big")
            self.other.wire.append(left[:size])
            left = left[size:]
        return len(data)

    def deliver(self) -> None:
        """Let arrive what is on the wire."""
        self.arrived += b"".join(self.wire)
        self.wire.clear()

    def mangle(self, script: Script) -> None:
        """Do something to the records on their way here."""
        how, which = script.number() % 7, script.number()
        if how == 0:
            self.wire.append(script.take(which % 32))
        elif how == 1:
            self.is_over = True
        if not self.wire:
            return
        place = which % len(self.wire)
        record = self.wire[place]
        if how == 2:
            del self.wire[place]
        elif how == 3:
            self.wire.insert(place, record)
        elif how == 4:
            self.wire.append(self.wire.pop(place))
        elif how == 5:
            self.wire[place] = record[: script.number(2) % (len(record) + 1)]
        elif how == 6:
            bent, at = bytearray(record), script.number(2) % max(1, len(record))
            bent[at : at + 1] = bytes([(bent[at] if bent else 0) ^ (script.number() or 1)])
            self.wire[place] = bytes(bent)


class Side(TLSStream):
    """A stream that says so where it would wait; `said` and `got` are its payload, `is_out` that it has failed."""

    __slots__ = ("end_of", "got", "is_complete", "is_out", "is_ready", "is_saying", "said")

    def __init__(self, end: End, connection: SSL.Connection) -> None:
        super().__init__(cast(Any, end), connection)
        self.end_of = end
        self.said, self.got = b"", b""
        self.is_ready = self.is_out = self.is_complete = False
        self.is_saying = True

    def wait_readable(self) -> None:
        raise Blocked

    def attempt(self, work: Any, *args: Any) -> Any:
        """What it returns; None, and the side is out, after an error of the wire."""
        if self.is_out:
            return None
        try:
            return work(*args)
        except (Blocked, BlockingIOError):
            return None
        except OSError as error:
            assert_plain(error)
            self.is_out = True
            return None

    def shake(self) -> None:
        self.handshake()
        self.is_ready = True

    def say(self, payload: bytes) -> None:
        self.said += payload
        self.write(payload)

    def fall_silent(self) -> None:
        self.half_close()
        self.is_saying = False

    def listen(self) -> None:
        """Read what there is, and check it with what the other end has said."""
        buffer = memoryview(bytearray(70000))
        while not self.is_complete and (received := self.attempt(self.read, buffer)) is not None:
            self.got += buffer[:received]
            self.is_complete = not received


@cache
def contexts() -> tuple[SSL.Context, SSL.Context, SSL.Context]:
    """A server's, a client's, and a client's that speaks TLS 1.2 only."""
    with plain_log():
        server = ServerCertificate("", "", Log("fuzz")).context
    old = _client_context.__wrapped__(False, False, 0)  # one that no other connection uses
    old.set_max_proto_version(SSL.TLS1_2_VERSION)
    return server, client_context(Verify.IGNORE), old


def connect(is_old: int, is_client_public: int, is_server_public: int) -> tuple[Side, Side]:
    """A client and a server before their handshake."""
    server, new, old = contexts()
    near, far = End(), End()
    near.other, far.other = far, near
    client = make_side(near, SSL.Connection(old if is_old else new, None), is_client_public)
    client._connection.set_connect_state()
    service = make_side(far, SSL.Connection(server, None), is_server_public)
    service._connection.set_accept_state()
    return client, service


def make_side(end: End, connection: SSL.Connection, is_public: int) -> Side:
    """One end, with records by the public API or by private names."""
    with mock.patch.object(bio, "Implementation", bio.PublicRecords if is_public else bio.PrivateRecords):
        return Side(end, connection)


def check_tls(data: bytes) -> None:
    """What arrives is what was sent from its first byte on; it is complete only where it was ended and is whole."""
    script = Script(data)
    kind = script.number()
    sides = connect(kind & 1, kind & 2, kind & 4)
    spoilt = script.number()  # the flight of the handshake that is mangled, if there is one
    for turn in range(ROUNDS):
        side = sides[turn % 2]
        if turn == spoilt:
            side.end_of.mangle(script)
        side.end_of.deliver()
        if not side.is_ready:
            side.attempt(side.shake)
    if spoilt >= ROUNDS:
        assert all(side.is_ready for side in sides)
    while script:
        _act(script, sides)
    for side in sides:
        side.end_of.deliver()
        side.end_of.is_over = True
        if side.is_ready:
            side.listen()
            assert side.is_complete or side.is_out
    for side, other in (sides, sides[::-1]):
        side._records.close()  # the sockets are not real ones to close
        assert other.said.startswith(side.got)
        assert not side.is_complete or (side.got == other.said and not other.is_saying)


def _act(script: Script, sides: tuple[Side, Side]) -> None:
    act = script.number()
    side = sides[act % 2]
    act = act // 2 % 7
    if act == 5:
        side.end_of.mangle(script)
    elif not side.is_ready:
        return
    elif act == 0 and side.is_saying:
        side.attempt(side.say, b"%c" % script.number() * (script.number(2) or 1))
    elif act == 1 and side.is_saying:
        side.attempt(side.fall_silent)
    elif act == 2:
        side.end_of.deliver()
    elif act == 3:
        side.listen()
    elif act == 4 and not side.is_out:
        assert side.peek() in (None, True, False)
    elif act == 6:
        assert side._records.shrink() != side.pending

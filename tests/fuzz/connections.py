"""Data connections from their first bytes on: sorting, proofs, frames, datagrams, and where a datagram was sent to."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any, cast
from unittest import mock

from nodepass.errors import ClosedError, ProtocolError
from nodepass.net.stream import TCPStream, recv_exactly
from nodepass.net.udp import receive_datagram
from nodepass.server import control_listener as sorting
from nodepass.server.data_listener import verify_proof
from nodepass.tunnel.udp import SPLIT_FROM, read_datagram
from nodepass.wire.auth import PROOF_LENGTH, SessionKey
from nodepass.wire.frames import HEADER, FrameBuffer, encode_frame
from nodepass.wire.signals import DATA_PREFIX, TLS_RECORD
from tests.fuzz.scripted import PEER, ScriptedSocket
from tests.fuzz.scripts import LONG, Script, pieces

LARGEST = 8192
"""UDP_DATA_BUF_SIZE in `check_datagram`."""


def check_frames(data: bytes) -> None:
    """Frames are the same however they arrive; what was not given out is less than one and still held."""
    script = Script(data)
    sizes, stream = script.sizes(), script.rest().replace(LONG, b"x" * 1000)
    whole = list(FrameBuffer().feed(stream))
    buffer, got = FrameBuffer(), []
    for piece in pieces(stream, sizes):
        got += list(buffer.feed(memoryview(bytearray(piece))))
        assert len(buffer._held) < HEADER.size + 65535
    assert got == whole
    assert b"".join(encode_frame(*frame) for frame in got) + buffer._held == stream


class Arrival:
    """A connection whose bytes arrive in time, as its script says; its clock, gevent's here, moves only by waiting."""

    def __init__(self, script: Script) -> None:
        self.now = 0.0
        self.taken = b""
        self._deadline = float("inf")
        self._late = TimeoutError()
        self._arrivals: list[tuple[float, bytes]] = []
        moment = 0.0
        while script and len(self._arrivals) < 16:
            moment += script.number() / 500
            self._arrivals.append((moment, script.take(script.number() % 9)))

    @contextlib.contextmanager
    def Timeout(self, seconds: float, late: TimeoutError) -> Iterator[None]:  # noqa: N802  # gevent's name
        """Raise an error where what is inside takes longer."""
        self._deadline, self._late = self.now + seconds, late
        try:
            yield
        finally:
            self._deadline = float("inf")

    def sleep(self, seconds: float) -> None:
        self._wait_until(self.now + seconds)

    def _wait_until(self, moment: float) -> None:
        self.now = min(moment, self._deadline)
        if moment > self._deadline:
            raise self._late

    def arrived(self, now: float) -> bytes:
        """What has come so far."""
        return b"".join(data for moment, data in self._arrivals if moment <= now)

    def recv(self, size: int, flags: int = 0) -> bytes:
        if not (data := self.arrived(self.now)[len(self.taken) :]):
            soon = [moment for moment, data in self._arrivals if data and moment > self.now]
            if not soon and self._arrivals and len(self._arrivals) % 2:
                return b""  # its end of stream
            assert self._deadline < float("inf"), "it would wait forever"
            self._wait_until(soon[0] if soon else float("inf"))
            data = self.arrived(self.now)[len(self.taken) :]
        if not flags & socket.MSG_PEEK:
            self.taken += data[:size]
        return data[:size]


def check_sorting(data: bytes) -> None:
    """What begins as a data connection is one, nothing else is, and only the prefix is read, all in good time."""
    arrival = Arrival(Script(data))
    with mock.patch.object(sorting, "gevent", arrival):
        is_data = sorting.is_data_connection(cast(socket.socket, arrival))
    assert arrival.now <= sorting.FIRST_BYTES_WITHIN
    begin = arrival.arrived(arrival.now)
    marked, records = begin.startswith(DATA_PREFIX), begin.startswith(TLS_RECORD)
    assert arrival.taken == (DATA_PREFIX if is_data and not records else b"")
    assert not is_data or marked or records
    in_time = arrival.arrived(sorting.FIRST_BYTES_WITHIN - 2 * sorting._STEP)
    assert is_data or not in_time.startswith((DATA_PREFIX, TLS_RECORD))


def check_proof(data: bytes) -> None:
    """A data connection's proof is right, wrong or cut, however it arrives; no byte behind it is read."""
    script = Script(data)
    session, id = SessionKey(b"k" * PROOF_LENGTH), "deadbeef"
    right = session.data_proof(id)
    is_right, sizes = script.number() % 2, script.sizes()
    said = (right if is_right else b"") + script.rest()
    parts = pieces(said, sizes)
    sock = ScriptedSocket(lambda: next(parts, b""))
    try:
        verify_proof(recv_exactly(TCPStream(cast(Any, sock)), PROOF_LENGTH), right)
    except ClosedError:
        assert len(said) < PROOF_LENGTH
    except ProtocolError:
        assert said[:PROOF_LENGTH] != right
    else:
        assert said[:PROOF_LENGTH] == right
    assert sock.heard == said[:PROOF_LENGTH]


def check_datagram(data: bytes) -> None:
    """Wire v1: a datagram is put together, or refused where it is too large, and never cut in silence."""
    script = Script(data)
    parts: list[bytes] = []
    while script:
        length = script.number(2) % 12000
        parts.append(b"%c" % script.number() * length)
    arriving = iter(parts)

    def reply() -> bytes:
        part = next(arriving, None)
        if part == b"":
            raise TimeoutError  # a pause
        return part or b""

    try:
        datagram = read_datagram(TCPStream(cast(Any, ScriptedSocket(reply))), LARGEST, 5)
    except ProtocolError:
        assert sum(map(len, parts)) > LARGEST
        return
    except TimeoutError:
        assert parts[0] == b""
        return
    until_pause = parts[: parts.index(b"")] if b"" in parts else parts
    together = b"".join(until_pause) if until_pause and len(until_pause[0]) >= SPLIT_FROM else b"".join(until_pause[:1])
    assert datagram == together
    assert len(datagram) <= LARGEST


class Ancillary:
    """A UDP socket whose kernel says this beside a datagram."""

    def __init__(self, items: list[tuple[int, int, bytes]]) -> None:
        self._items = items

    def recvmsg(self, _size: int, _ancillary: int) -> tuple[bytes, list[tuple[int, int, bytes]], int, tuple[str, int]]:
        return b"payload", self._items, 0, PEER


LEVELS = ((socket.IPPROTO_IP, 8), (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO), (socket.SOL_SOCKET, 1))


def check_ancillary(data: bytes) -> None:
    """A datagram is received whatever is said beside it; what is answered with has the form that the kernel takes."""
    script, items = Script(data), []
    while script:
        level, kind = LEVELS[script.number() % len(LEVELS)]
        items.append((level, kind, script.take(script.number() % 40)))
    payload, visitor = receive_datagram(cast(socket.socket, Ancillary(items)))
    assert payload == b"payload"
    assert str(visitor) == "192.0.2.7:4711"
    for level, kind, info in visitor.control:
        assert (level, kind) in LEVELS[:2]
        assert len(info) == (12 if level == socket.IPPROTO_IP else 20)
    hash(visitor)

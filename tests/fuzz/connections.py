"""Data connections from their first bytes on: sorting, proofs, frames, datagrams, and where a datagram was sent to."""

from __future__ import annotations

import contextlib
import socket
from typing import Any, cast
from unittest import mock

from nodepass.errors import ClosedError, ProtocolError, TLSError
from nodepass.net.stream import TCPStream, recv_exactly
from nodepass.net.udp import receive_datagram
from nodepass.server.data_listener import verify_proof
from nodepass.server.opening import Opening
from nodepass.tls import stream as tls
from nodepass.tls.certificates import ServerCertificate
from nodepass.tunnel.udp import SPLIT_FROM, read_datagram
from nodepass.wire.auth import PROOF_LENGTH, SessionKey
from nodepass.wire.frames import HEADER, FrameBuffer
from nodepass.wire.lines import MAX_OPENING
from nodepass.wire.negotiation import Hello, parse_first
from tests.fuzz.scripted import PEER, ScriptedSocket, assert_plain
from tests.fuzz.scripts import LONG, Script, pieces

LARGEST = 8192
"""UDP_DATA_BUF_SIZE in `check_datagram`."""


def check_frames(data: bytes) -> None:
    """Frames are the same however they arrive; what was not given out is less than one and still held."""
    script = Script(data)
    sizes, stream = script.sizes(), script.rest().replace(LONG, b"x" * 1000)
    whole, rest = _split_frames(stream)
    buffer, got = FrameBuffer(), []
    for piece in pieces(stream, sizes):
        got += list(buffer.feed(memoryview(bytearray(piece))))
        assert len(buffer._held) < HEADER.size + 2 + 65535
    assert got == whole
    assert buffer._held == rest


def _split_frames(stream: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """The datagrams in a stream, and the part of a frame at its end, by slicing."""
    frames = []
    while len(stream) >= 6:
        is_text = stream[4:6] == b"\xff\xff"
        begin = 8 if is_text else 6
        end = begin + int.from_bytes(stream[begin - 2 : begin], "big")
        if len(stream) < max(begin, end):
            break
        if not is_text:
            frames.append((int.from_bytes(stream[:4], "big"), stream[begin:end]))
        stream = stream[end:]
    return frames, stream


def check_sorting(data: bytes) -> None:
    """The first byte and the first line say what a connection is; nothing else is taken, nor read any further."""
    script = Script(data)
    certificate = cast(ServerCertificate, mock.Mock()) if script.number() % 2 else None
    sizes, said = script.sizes(), script.rest().replace(LONG, b"x" * 1000)
    arriving = pieces(said, sizes)
    sock = ScriptedSocket(lambda: next(arriving, b""))
    opening = Opening(cast(Any, sock), certificate)
    accept = mock.Mock(side_effect=TLSError("no TLS"))
    try:
        with mock.patch.object(tls, "accept_tls", accept):
            opening.read()
    except OSError as error:
        assert_plain(error)
    else:
        line, _, behind = said.partition(b"\n")
        assert not certificate, "in the clear it serves no connection"
        assert opening.version == 2
        assert (opening.line, sock.heard) == (line, line + b"\n")
        assert opening.said == parse_first(line)
        assert not behind or len(sizes) > 1 or sizes[0] <= len(line) + 1
    assert len(sock.heard) <= MAX_OPENING + 1
    assert said[:1] == b"/" or not sock.heard
    started = _is_hello(sock.heard)
    assert sock.sent == (b"//tls\n" if certificate and started else b"")
    assert accept.called == bool(certificate and (said[:1] == b"\x16" or started))


def _is_hello(heard: bytes) -> bool:
    """Whether one whole line was read, and it is a hello."""
    with contextlib.suppress(ProtocolError):
        return heard.find(b"\n") == len(heard) - 1 and isinstance(parse_first(heard[:-1]), Hello)
    return False


def check_proof(data: bytes) -> None:
    """A data connection's proof is right, wrong or cut, however it arrives; no byte behind it is read."""
    script = Script(data)
    session, id = SessionKey(b"k" * PROOF_LENGTH), "deadbeef"
    right = session.data_proof(id, b"x" * 32)
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

"""The control connection's lines: how they are split, and what each is taken for."""

from __future__ import annotations

import re

from nodepass.errors import ProtocolError
from nodepass.wire.signals import (
    KIND_NAMES,
    MAX_LINE,
    Challenge,
    Heartbeat,
    Launch,
    LineBuffer,
    Offer,
    Refusal,
    parse_auth,
    parse_hello,
    parse_id,
    parse_opening,
    parse_signal,
    printable,
)
from tests.fuzz.scripted import assert_plain
from tests.fuzz.scripts import LONG, Script, pieces


def check_lines(data: bytes) -> None:
    """Lines are the same however they arrive, over-long ones are counted, and no more than one is held."""
    script = Script(data)
    sizes, stream = script.sizes(), script.rest().replace(LONG, b"x" * 1000)
    buffer, got = LineBuffer(), []
    for piece in pieces(stream, sizes):
        got += buffer.feed(piece)
        assert len(buffer._held) <= MAX_LINE
    *ended, rest = stream.split(b"\n")
    assert got == [line for line in ended if len(line) <= MAX_LINE]
    assert buffer.skipped == sum(len(line) > MAX_LINE for line in (*ended, rest))


def check_signal(data: bytes) -> None:
    """A later line is a launch, a heartbeat, unknown or refused; a launch is what its own encoding says."""
    assert printable(data).isprintable()
    assert len(printable(data)) <= 4 * 60 + 10
    try:
        signal = parse_signal(data)
    except ProtocolError as error:
        assert_plain(error)
        return
    if isinstance(signal, Launch):
        assert signal.kind in KIND_NAMES
        assert parse_id(signal.id.encode()) == signal.id
        assert parse_signal(signal.encode()) == signal
    elif isinstance(signal, Heartbeat):
        assert not data.strip()
    else:
        assert signal.line == data.strip()
        assert signal.line


def check_opening(data: bytes) -> None:
    """A line of the handshake that a client reads is within bounds and survives being written again."""
    try:
        opening = parse_opening(data)
    except ProtocolError as error:
        assert_plain(error)
        return
    assert parse_opening(opening.encode()) == opening
    if isinstance(opening, Offer):
        assert 1 <= opening.data_port <= 65535
        assert opening.tls in (0, 1, 2)
        assert opening.heartbeat is None or 1 <= opening.heartbeat < 10**9
        assert opening.version == 2 or not (opening.mux or opening.fingerprint or opening.mac)
        assert re.fullmatch("([0-9a-f]{64})?", opening.fingerprint)
        assert re.fullmatch("([0-9a-f]{64})?", opening.mac)
    elif isinstance(opening, Challenge):
        assert re.fullmatch("[0-9a-f]{32}", opening.nonce)
    else:
        assert isinstance(opening, Refusal)
        assert re.fullmatch("[a-z-]{1,32}", opening.reason)


def check_introduction(data: bytes) -> None:
    """What a server reads in the handshake, and an id, are whole or refused."""
    try:
        hello = parse_hello(data)
        assert hello.version != "2" or parse_hello(hello.encode()) == hello
        assert re.fullmatch("[0-9a-f]{32}", hello.nonce) or hello.version != "2"
    except ProtocolError as error:
        assert_plain(error)
    try:
        auth = parse_auth(data)
        assert re.fullmatch("[0-9a-f]{64}", auth.mac)
        assert parse_auth(auth.encode()) == auth
    except ProtocolError as error:
        assert_plain(error)
    try:
        assert parse_id(data).encode() == data
        assert re.fullmatch(b"[0-9a-f]{8}", data)
    except ProtocolError as error:
        assert_plain(error)

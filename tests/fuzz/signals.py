"""The control connection's lines: how they are split, and what each is taken for. Also what a proxy says first."""

from __future__ import annotations

import re
from ipaddress import ip_address

from nodepass.config.hostport import split_host_port
from nodepass.errors import ProtocolError, ProxyHeaderError
from nodepass.wire.lines import MAX_LINE, MAX_OPENING, LineBuffer, printable
from nodepass.wire.negotiation import (
    HEARTBEATS,
    Challenge,
    DataHello,
    Offer,
    Refusal,
    StartTLS,
    parse_auth,
    parse_first,
    parse_opening,
    without_mac,
)
from nodepass.wire.proxy_protocol import LARGEST, encode_v1, encode_v2, find_length, parse_header, split_datagram
from nodepass.wire.signals import (
    LANE,
    TCP,
    UDP,
    Beat,
    BeatAnswer,
    Bye,
    Heartbeat,
    Launch,
    Signal,
    Unknown,
    parse_id,
    parse_signal,
    parse_v1_signal,
)
from tests.fuzz.scripted import assert_plain
from tests.fuzz.scripts import LONG, Script, pieces

VISIBLE = re.compile(rb"[!-~]*")


def check_lines(data: bytes) -> None:
    """Lines are the same however they arrive, over-long ones are counted, and no more than one is held."""
    script = Script(data)
    limit = (MAX_LINE, MAX_OPENING)[script.number() % 2]
    sizes, stream = script.sizes(), script.rest().replace(LONG, b"x" * 1000)
    buffer, got = LineBuffer(limit), []
    for piece in pieces(stream, sizes):
        got += buffer.feed(piece)
        assert len(buffer._held) <= limit
    *ended, rest = stream.split(b"\n")
    assert got == [line for line in ended if len(line) <= limit]
    assert buffer.skipped == sum(len(line) > limit for line in (*ended, rest))
    assert buffer.is_empty == (not rest)


def check_signal(data: bytes) -> None:
    """A line after the handshake is a signal of its version, unknown or refused; a signal is what its encoding says."""
    assert printable(data).isprintable()
    assert len(printable(data)) <= 4 * 60 + 10
    try:
        _check_v1_signal(data, parse_v1_signal(data))
    except ProtocolError as error:
        assert_plain(error)
    try:
        _check_v2_signal(data, parse_signal(data))
    except ProtocolError as error:
        assert_plain(error)


def _check_v1_signal(data: bytes, signal: Signal) -> None:
    if isinstance(signal, Launch):
        assert signal.kind in (TCP, UDP)
        assert parse_id(signal.id.encode()) == signal.id
        assert not signal.visitor
        assert not signal.local
        assert parse_v1_signal(signal.encode()) == signal
    elif isinstance(signal, Heartbeat):
        assert not data.strip()
    else:
        assert isinstance(signal, Unknown)
        assert signal.line == data.strip()
        assert signal.line


def _check_v2_signal(data: bytes, signal: Signal) -> None:
    assert VISIBLE.fullmatch(data)
    if isinstance(signal, Launch):
        assert signal.kind in (TCP, LANE)
        for address in (signal.visitor, signal.local):
            _check_address(address)
        if signal.visitor or not signal.local:
            assert parse_signal(signal.encode()[:-1]) == signal
    elif isinstance(signal, Unknown):
        assert signal.line == data
    else:
        assert isinstance(signal, Beat | BeatAnswer | Bye)
        assert parse_signal(signal.encode()[:-1]) == signal


def _check_address(text: str) -> None:
    """An address and a port, without a zone, or nothing."""
    if text:
        host, port = split_host_port(text)
        assert ip_address(host)
        assert 0 <= port <= 65535
        assert "%" not in text


def check_opening(data: bytes) -> None:
    """A line of the handshake that a client reads is within bounds and survives being written again."""
    try:
        opening = parse_opening(data)
    except ProtocolError as error:
        assert_plain(error)
        return
    assert parse_opening(opening.encode()[:-1]) == opening
    if isinstance(opening, Offer):
        _check_offer(data, opening)
        return
    assert VISIBLE.fullmatch(data)
    if isinstance(opening, Challenge):
        assert re.fullmatch("[0-9a-f]{32}", opening.nonce)
    elif isinstance(opening, StartTLS):
        assert data == b"//tls"
    else:
        assert isinstance(opening, Refusal)
        assert re.fullmatch("[a-z-]{1,32}", opening.reason)


def _check_offer(data: bytes, offer: Offer) -> None:
    assert 1 <= offer.data_port <= 65535
    assert offer.tls in (0, 1, 2)
    if offer.heartbeat is None:
        assert offer.version == 1
        assert (offer.mux, offer.sid, offer.mac) == (False, "", "")
        return
    assert VISIBLE.fullmatch(data)
    assert HEARTBEATS[0] <= offer.heartbeat <= HEARTBEATS[1]
    assert re.fullmatch("([0-9a-f]{32})?", offer.sid)
    assert re.fullmatch("([0-9a-f]{64})?", offer.mac)
    if offer.mac:
        try:
            covered = without_mac(data, offer.mac)
        except ProtocolError as error:
            assert_plain(error)
        else:
            before, mark, fragment = covered.rpartition(b"#")
            assert before + b"&mac=" + offer.mac.encode() + mark + fragment == data
            assert len(covered) == len(data) - 69


def check_introduction(data: bytes) -> None:
    """What a server reads in the handshake, and an id, are whole or refused."""
    try:
        first = parse_first(data)
        assert VISIBLE.fullmatch(data)
        if isinstance(first, DataHello):
            assert re.fullmatch("[0-9a-f]{32}", first.sid)
        elif first.version == "2":
            assert re.fullmatch(
                "[0-9a-f]{32} [0-9a-f]{16} [A-Za-z0-9._-]{0,64}", f"{first.nonce} {first.client} {first.name}"
            )
        assert getattr(first, "version", "2") != "2" or parse_first(first.encode()[:-1]) == first
    except ProtocolError as error:
        assert_plain(error)
    try:
        auth = parse_auth(data)
        assert VISIBLE.fullmatch(data)
        assert re.fullmatch("[0-9a-f]{64}", auth.mac)
        assert parse_auth(auth.encode()[:-1]) == auth
    except ProtocolError as error:
        assert_plain(error)
    try:
        assert parse_id(data).encode() == data
        assert re.fullmatch(b"[0-9a-f]{8}", data)
    except ProtocolError as error:
        assert_plain(error)


def check_proxy_header(data: bytes) -> None:
    """A header of the PROXY protocol has the same length however it arrives, and is refused or can be written again."""
    script = Script(data)
    sizes, stream = script.sizes(), script.rest().replace(LONG, b"x" * 1000)
    held, length = b"", 0
    try:
        for piece in pieces(stream, sizes):
            held += piece
            length = length or find_length(held)
            assert length == find_length(held)
            assert length <= LARGEST
        ends = parse_header(held[:length]) if 0 < length <= len(held) else None
    except ProxyHeaderError as error:
        assert_plain(error)
    else:
        if ends:
            for header in (encode_v1(ends), encode_v2(ends, "web", datagram=True)):
                assert find_length(header + held) == len(header)
                assert parse_header(header) == ends
            assert split_datagram(encode_v2(ends, "web", datagram=True) + held) == (ends, held)
    try:
        _, payload = split_datagram(stream)
    except ProxyHeaderError as error:
        assert_plain(error)
    else:
        assert stream.endswith(payload)

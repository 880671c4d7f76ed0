"""Signals to and from bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import is_dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodepass.errors import ProtocolError
from nodepass.wire import signals as module
from nodepass.wire.signals import (
    HEARTBEAT,
    LANE,
    MAX_LINE,
    REASONS,
    TCP,
    UDP,
    Auth,
    Challenge,
    Heartbeat,
    Hello,
    Launch,
    LineBuffer,
    Offer,
    Refusal,
    Unknown,
    parse_auth,
    parse_hello,
    parse_id,
    parse_opening,
    parse_signal,
    printable,
)

NONCE, MAC, FINGERPRINT = "0" * 32, "a" * 64, "f" * 64

# Each signal, its bytes, and what reads it.
WIRE = [
    (Hello(NONCE), b"//hello?v=2&nonce=" + b"0" * 32 + b"\n", parse_hello),
    (Challenge(NONCE), b"//challenge?nonce=" + b"0" * 32 + b"\n", parse_opening),
    (Auth(MAC), b"//auth?mac=" + b"a" * 64 + b"\n", parse_auth),
    *((Refusal(reason), b"//error?reason=%b\n" % reason.encode(), parse_opening) for reason in REASONS),
    (Offer(10102, 1), b"//10102#1\n", parse_opening),
    (Offer(1, 0, 5000), b"//1?v=2&hb=5000#0\n", parse_opening),
    (Offer(65535, 2, 1, True), b"//65535?v=2&hb=1&mux=1#2\n", parse_opening),
    (
        Offer(1, 1, 5000, True, FINGERPRINT, MAC),
        b"//1?v=2&hb=5000&mux=1&fp=" + b"f" * 64 + b"&mac=" + b"a" * 64 + b"#1\n",
        parse_opening,
    ),
    (Launch("deadbeef", TCP), b"//deadbeef#1\n", parse_signal),
    (Launch("00000000", UDP), b"//00000000#2\n", parse_signal),
    (Launch("12345678", LANE), b"//12345678#3\n", parse_signal),
    (HEARTBEAT, b"\n", parse_signal),
]


@pytest.mark.parametrize(("signal", "line", "parse"), WIRE, ids=[repr(line) for _, line, _ in WIRE])
def test_a_signal_is_one_line_in_both_directions(
    signal: Hello | Challenge | Auth | Refusal | Offer | Launch | Heartbeat,
    line: bytes,
    parse: Callable[[bytes], object],
) -> None:
    assert signal.encode() == line
    assert parse(line) == signal
    assert line.count(b"\n") == 1
    assert len(line) < MAX_LINE


def test_every_signal_is_in_the_table() -> None:
    """But those that are only read."""
    signals = {each for each in vars(module).values() if is_dataclass(each) and hasattr(each, "encode")}
    assert {type(signal) for signal, _, _ in WIRE} == {each for each in signals if isinstance(each, type)}


@pytest.mark.parametrize("line", [b"  //deadbeef#1\r", b"\t//deadbeef?v=2&x=1#1"])
def test_white_space_and_a_query_are_ignored(line: bytes) -> None:
    assert parse_signal(line) == Launch("deadbeef", TCP)


@pytest.mark.parametrize("line", [b"//deadbeef#4", b"//deadbeef#", b"//deadbeef", b"//hello?v=2", b"//x#y"])
def test_an_unknown_signal_is_told_from_a_malformed_one(line: bytes) -> None:
    assert parse_signal(line) == Unknown(line)


@pytest.mark.parametrize("line", [b"hello", b"/x#1", b"//deadbee#1", b"//DEADBEEF#1", b"//#1", b"//a b#1", b"\xff\xfe"])
def test_a_malformed_signal_is_refused(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_signal(line)


@pytest.mark.parametrize(
    "line", [b"", b"//#1", b"//0#1", b"//65536#0", b"//80#3", b"//80", b"//-1#1", b"HTTP/1.1 200 OK"]
)
def test_a_bad_tunnel_signal_is_refused(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_opening(line)


@pytest.mark.parametrize(
    "line",
    [
        b"//hello?v=2",
        b"//hello?v=2&nonce=0",
        b"//hello?v=2&nonce=" + b"G" * 32,
        b"//data",
        b"//hello",
        b"GET / HTTP/1.1",
    ],
)
def test_a_hello_without_a_good_nonce_is_refused_or_of_another_version(line: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert parse_hello(line).version != "2"


@pytest.mark.parametrize("query", [b"v=2", b"v=2&hb=0", b"v=2&hb=x", b"v=2&hb=1&fp=00", b"v=2&hb=1&mac="])
def test_a_tunnel_signal_of_v2_needs_all_its_parameters_in_order(query: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_opening(b"//80?" + query + b"#1")


def test_an_unknown_parameter_is_ignored() -> None:
    assert parse_opening(b"//80?v=2&hb=7&new=x#0") == Offer(80, 0, 7)
    assert parse_opening(b"//80?v=3&hb=7#0") == Offer(80, 0)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_signal_or_a_protocol_error(line: bytes) -> None:
    for parse in (parse_signal, parse_opening, parse_hello, parse_auth, parse_id):
        with contextlib.suppress(ProtocolError):
            parse(line)


@given(st.lists(st.binary(max_size=50).map(lambda line: line.replace(b"\n", b""))), st.data())
def test_lines_are_the_same_however_they_arrive(lines: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(line + b"\n" for line in lines)
    buffer, got = LineBuffer(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        got += buffer.feed(stream[:size])
        stream = stream[size:]
    assert got == lines
    assert not buffer.skipped


@given(st.integers(1, 3 * MAX_LINE), st.integers(1, 5000))
def test_an_over_long_line_is_skipped_counted_and_never_held(length: int, piece: int) -> None:
    buffer, got = LineBuffer(), []
    stream = b"x" * length + b"\n//deadbeef#1\n"
    for start in range(0, len(stream), piece):
        got += buffer.feed(stream[start : start + piece])
        assert len(buffer._held) <= MAX_LINE
    assert got[-1] == b"//deadbeef#1"
    assert (len(got), buffer.skipped) == ((2, 0) if length <= MAX_LINE else (1, 1))


def test_a_peers_bytes_cannot_forge_a_log_line() -> None:
    assert printable(b"a\nb\x1b[31m") == r"'a\nb\x1b[31m'"
    assert len(printable(b"x" * 1000)) < 70

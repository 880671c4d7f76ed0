"""Signals to and from bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import is_dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodepass.errors import ProtocolError
from nodepass.tunnel.control import Sendable
from nodepass.wire import negotiation as opening
from nodepass.wire import signals as later
from nodepass.wire.lines import MAX_LINE, MAX_OPENING, LineBuffer, printable
from nodepass.wire.negotiation import (
    REASONS,
    Auth,
    Challenge,
    DataHello,
    Hello,
    Offer,
    Refusal,
    StartTLS,
    parse_auth,
    parse_first,
    parse_opening,
    without_mac,
)
from nodepass.wire.signals import (
    BYES,
    HEARTBEAT,
    LANE,
    TCP,
    UDP,
    Beat,
    BeatAnswer,
    Bye,
    Launch,
    Unknown,
    parse_id,
    parse_signal,
    parse_v1_signal,
)
from tests.support.table import each_row

NONCE, CLIENT, SID, MAC = "0123456789abcdef" * 2, "0011223344556677", "f0" * 16, "a9" * 32
HELLO = b"//hello?v=2&nonce=" + NONCE.encode() + b"&client=0011223344556677&name="
OFFER = b"//80?v=2&hb=5000"
PARSERS = (parse_first, parse_auth, parse_opening, parse_signal, parse_v1_signal, parse_id)

# Each signal, its bytes, and what reads it.
WIRE: list[tuple[Sendable, bytes, Callable[[bytes], object]]] = [
    (Hello(NONCE, CLIENT), HELLO, parse_first),
    (Hello(NONCE, CLIENT, "A-z_0.9" * 9, True), HELLO + b"A-z_0.9" * 9 + b"&want=from", parse_first),
    (Hello(NONCE, CLIENT, "a", off="tcp"), HELLO + b"a&off=tcp", parse_first),
    (Hello(NONCE, CLIENT, "a", off="udp"), HELLO + b"a&off=udp", parse_first),
    (DataHello(SID), b"//data?sid=" + SID.encode(), parse_first),
    (StartTLS(), b"//tls", parse_opening),
    (Challenge(NONCE), b"//challenge?nonce=" + NONCE.encode(), parse_opening),
    (Auth(MAC), b"//auth?mac=" + MAC.encode(), parse_auth),
    *((Refusal(reason), b"//error?reason=%b" % reason.encode(), parse_opening) for reason in REASONS),
    (Offer(10102, 1), b"//10102#1", parse_opening),
    (Offer(1, 0, 10), b"//1?v=2&hb=10#0", parse_opening),
    (Offer(65535, 2, 60_000, mux=True), b"//65535?v=2&hb=60000&mux=1#2", parse_opening),
    (Offer(80, 1, 5000, mac=MAC), OFFER + b"&mac=" + MAC.encode() + b"#1", parse_opening),
    (
        Offer(80, 1, 5000, SID, True, MAC),
        OFFER + b"&sid=" + SID.encode() + b"&mux=1&mac=" + MAC.encode() + b"#1",
        parse_opening,
    ),
    (HEARTBEAT, b"", parse_v1_signal),
    (Launch("deadbeef", TCP), b"//deadbeef#1", parse_v1_signal),
    (Launch("00000000", UDP), b"//00000000#2", parse_v1_signal),
    (Launch("deadbeef", TCP), b"//deadbeef#1", parse_signal),
    (Launch("12345678", LANE), b"//12345678#3", parse_signal),
    (
        Launch("deadbeef", TCP, "192.0.2.7:4711", "[2001:db8::1]:443"),
        b"//deadbeef?from=192.0.2.7:4711&to=[2001:db8::1]:443#1",
        parse_signal,
    ),
    (Beat(0), b"//beat?idle=0", parse_signal),
    (Beat(999_999_999), b"//beat?idle=999999999", parse_signal),
    (BeatAnswer(True), b"//beat?ok=1", parse_signal),
    (BeatAnswer(False), b"//beat?ok=0", parse_signal),
    *((Bye(reason), b"//bye?reason=%b" % reason.encode(), parse_signal) for reason in BYES),
    (Unknown(b"//later?than=us#9"), b"//later?than=us#9", parse_signal),
]


def test_a_signal_is_one_line_in_both_directions() -> None:
    for signal, line, parse in WIRE:
        assert signal.encode() == line + b"\n"
        assert parse(line) == signal, line
        assert len(line) <= MAX_OPENING


def test_every_signal_is_in_the_table() -> None:
    signals = {
        each for each in (vars(opening) | vars(later)).values() if is_dataclass(each) and hasattr(each, "encode")
    }
    found: set[type] = {type(signal) for signal, _, _ in WIRE}
    assert found == {each for each in signals if isinstance(each, type)}


# The bytes of a line


INVISIBLE = (b"\0", b"\t", b"\r", b"\x0b", b" ", b"\x1f", b"\x7f", b"\x80", b"\xff")


@each_row("place", ["before", "inside", "behind"])
@each_row(
    ("line", "parse"),
    [
        (HELLO + b"web", parse_first),
        (b"//data?sid=" + SID.encode(), parse_first),
        (b"//auth?mac=" + MAC.encode(), parse_auth),
        (b"//challenge?nonce=" + NONCE.encode(), parse_opening),
        (b"//error?reason=busy", parse_opening),
        (b"//tls", parse_opening),
        (OFFER + b"#1", parse_opening),
        (b"//deadbeef#1", parse_signal),
        (b"//deadbeef?from=1.2.3.4:5&to=1.2.3.4:5#1", parse_signal),
        (b"//beat?idle=1", parse_signal),
        (b"//bye?reason=reload", parse_signal),
        (b"//later", parse_signal),
    ],
)
def test_a_line_of_v2_has_visible_characters_only_and_nothing_is_trimmed(
    line: bytes, parse: Callable[[bytes], object], place: str
) -> None:
    assert parse(line)
    for byte in INVISIBLE:
        spoilt = {"before": byte + line, "inside": line[:4] + byte + line[4:], "behind": line + byte}[place]
        with pytest.raises(ProtocolError):
            parse(spoilt)


@pytest.mark.parametrize("line", [b"  //deadbeef#1\r", b"\t//deadbeef?v=2&x=1#1", b"//deadbeef?from=x&to=y#1 "])
def test_v1_trims_white_space_and_ignores_a_query(line: bytes) -> None:
    assert parse_v1_signal(line) == Launch("deadbeef", TCP)


@each_row("line", [b" //80#2\r", b"//80?hb=9&mux=1#2\t", b"//80?w=2#2", b"//80?#2"])
def test_an_offer_without_a_version_is_one_of_v1(line: bytes) -> None:
    assert parse_opening(line) == Offer(80, 2)
    assert Offer(80, 2).version == 1


@each_row("version", [b"", b"1", b"3", b"02", b"2x"])
def test_an_offer_of_another_version_is_refused(version: bytes) -> None:
    """It is not taken for one of v1, whose signals are in the clear."""
    with pytest.raises(ProtocolError):
        parse_opening(b"//80?v=" + version + b"&hb=5000#2")


# Parameters


@each_row(
    "query",
    [
        b"",
        b"v=2",
        *(b"v=2&hb=" + value for value in (b"", b"0", b"9", b"09", b"010", b"60001", b"100000", b"x", b"-10", b"1e3")),
        b"v=2&hb=5000&sid=",
        b"v=2&hb=5000&sid=" + b"F" * 32,
        b"v=2&hb=5000&sid=" + b"f" * 31,
        b"v=2&hb=5000&mac=",
        b"v=2&hb=5000&mac=" + b"a" * 63,
        b"v=2&hb=5000&mac=" + b"A" * 64,
        b"v=2&hb=9&hb=5000",
        b"v=2&hb=+500",
        b"v=2&hb=\xd9\xa1\xd9\xa2",
    ],
)
def test_an_offer_of_v2_needs_its_parameters_in_their_form(query: bytes) -> None:
    line = b"//80?" + query + b"#1"
    if query:
        with pytest.raises(ProtocolError):
            parse_opening(line)
    else:
        assert parse_opening(line) == Offer(80, 1)


@each_row("heartbeat", [10, 11, 5000, 59_999, 60_000])
def test_a_heartbeat_within_bounds_is_taken(heartbeat: int) -> None:
    assert parse_opening(b"//80?v=2&hb=%d#0" % heartbeat) == Offer(80, 0, heartbeat)


@each_row(
    ("line", "parse", "expected"),
    [
        (b"//80?v=2&v=3&hb=7000&hb=8&new=x#0", parse_opening, Offer(80, 0, 7000)),
        (b"//80?mux=1&hb=7000&v=2#0", parse_opening, Offer(80, 0, 7000, mux=True)),
        (b"//80?v=2&hb=7000&mux=0#0", parse_opening, Offer(80, 0, 7000)),
        (HELLO + b"a&name=b&name=c&want=from&want=x&&=", parse_first, Hello(NONCE, CLIENT, "a", True)),
        (HELLO + b"&want=to", parse_first, Hello(NONCE, CLIENT)),
        (b"//data?sid=" + SID.encode() + b"&sid=x", parse_first, DataHello(SID)),
        (b"//auth?new&mac=" + MAC.encode() + b"&mac=0", parse_auth, Auth(MAC)),
        (b"//challenge?nonce=" + NONCE.encode() + b"&nonce=0", parse_opening, Challenge(NONCE)),
        (b"//error?reason=later-than-us&reason=busy", parse_opening, Refusal("later-than-us")),
        (b"//beat?idle=1&idle=x&new", parse_signal, Beat(1)),
        (b"//beat?ok=1&ok=0", parse_signal, BeatAnswer(True)),
        (b"//bye?reason=later&x=1#9", parse_signal, Bye("later")),
        (b"//deadbeef?new=1&to=1.2.3.4:5&from=1.2.3.4:6&from=x#1", parse_signal,
         Launch("deadbeef", TCP, "1.2.3.4:6", "1.2.3.4:5")),
    ],
)  # fmt: skip
def test_parameters_are_read_by_name_the_first_of_two_counts_and_unknown_ones_are_ignored(
    line: bytes, parse: Callable[[bytes], object], expected: object
) -> None:
    assert parse(line) == expected


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"//80?v=2&hb=5000", b"#1"),
        (b"//80?v=2&hb=5000&sid=" + SID.encode() + b"&mux=1&new=x&new=x&&", b"#0"),
    ],
)
def test_a_proof_covers_an_offer_without_its_mac_and_nothing_else(before: bytes, after: bytes) -> None:
    parameter = b"&mac=" + MAC.encode()
    assert without_mac(before + parameter + after, MAC) == before + after
    assert len(parameter) == 69


@each_row("behind", [b"&mux=1#1", b"&#1", b"&mac=#1", b"", b"0#1"])
def test_a_mac_that_does_not_stand_last_is_refused(behind: bytes) -> None:
    with pytest.raises(ProtocolError, match="mac is not the last"):
        without_mac(OFFER + b"&mac=" + MAC.encode() + behind, MAC)


# What is refused


@each_row(
    "line",
    [b"", b"//#1", b"//0#1", b"//65536#0", b"//000080#1", b"//80#3", b"//80", b"//80#", b"//-1#1", b"//80/x#1",
     b"//80?v=2&hb=5000", b"//80?v=2&hb=5000#3", b"//0?v=2&hb=5000#1", b"HTTP/1.1 200 OK", b"//tls#1", b"//tls?x",
     b"//tlss", b"//TLS", b"//error", b"//error?reason=", b"//error?reason=BUSY", b"//error?reason=" + b"x" * 33,
     b"//error?reason=a%20b", b"//challenge", b"//challenge?nonce=0", b"//challenge?nonce=" + b"G" * 32, HELLO,
     b"//auth?mac=" + MAC.encode(), b"//deadbeef#1"],
)  # fmt: skip
def test_a_bad_line_of_a_server_is_refused_in_the_handshake(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_opening(line)


@each_row(
    "line",
    [b"", b"//", b"//hello/?v=2", b"GET / HTTP/1.1", b"//data", b"//data?sid=", b"//data?sid=" + b"0" * 31,
     b"//data?sid=" + b"G" * 32, b"//tls", b"//auth?mac=" + MAC.encode(), b"//80#1", b"//beat?ok=1",
     b"//hello?v=2",
     HELLO.removesuffix(b"&name="),
     HELLO.replace(b"&client=0011223344556677", b""),
     HELLO.replace(NONCE.encode(), b"0" * 31),
     HELLO.replace(NONCE.encode(), b"F" * 32),
     HELLO.replace(CLIENT.encode(), b"0" * 15),
     HELLO.replace(CLIENT.encode(), b"0" * 17),
     *(HELLO + name for name in (b"a" * 65, b"a/b", b"a%20b", b"a=b", b"~"))],
)  # fmt: skip
def test_a_bad_first_line_of_a_client_is_refused(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_first(line)


@each_row("line", [b"//auth", b"//auth?mac=", b"//auth?mac=" + b"A" * 64, b"//auth?mac=" + b"0" * 65, HELLO])
def test_a_bad_answer_to_the_challenge_is_refused(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_auth(line)


@each_row("line", [b"//hello", b"//hello?v=", b"//hello?v=3&new=form", b"//hello?v=1", b"//hello?v=02"])
def test_a_hello_of_another_version_is_told_from_a_malformed_one(line: bytes) -> None:
    hello = parse_first(line)
    assert isinstance(hello, Hello)
    assert hello.version != "2"


# Signals of the two versions

SIGNALS = [
    # line, in v1, in v2
    (b"", HEARTBEAT, None),
    (b"\r", HEARTBEAT, None),
    (b"//deadbeef#1", Launch("deadbeef", TCP), Launch("deadbeef", TCP)),
    (b"//deadbeef#2", Launch("deadbeef", UDP), Unknown(b"//deadbeef#2")),
    (b"//deadbeef#3", Unknown(b"//deadbeef#3"), Launch("deadbeef", LANE)),
    (b"//deadbeef#4", Unknown(b"//deadbeef#4"), Unknown(b"//deadbeef#4")),
    (b"//deadbeef", Unknown(b"//deadbeef"), Unknown(b"//deadbeef")),
    (b"//deadbeef#", Unknown(b"//deadbeef#"), Unknown(b"//deadbeef#")),
    (b"//x#y", Unknown(b"//x#y"), Unknown(b"//x#y")),
    (b"//beat?idle=5", Unknown(b"//beat?idle=5"), Beat(5)),
    (b"//beat?ok=1", Unknown(b"//beat?ok=1"), BeatAnswer(True)),
    (b"//bye?reason=reload", Unknown(b"//bye?reason=reload"), Bye("reload")),
    (b"//beat", Unknown(b"//beat"), None),
    (b"//beat?idle=", Unknown(b"//beat?idle="), None),
    (b"//beat?idle=-1", Unknown(b"//beat?idle=-1"), None),
    (b"//beat?idle=1234567890", Unknown(b"//beat?idle=1234567890"), None),
    (b"//beat?ok=2", Unknown(b"//beat?ok=2"), None),
    (b"//bye", Unknown(b"//bye"), None),
    (b"//bye?reason=No", Unknown(b"//bye?reason=No"), None),
    *((line, None, None) for line in (b"hello", b"/x#1", b"//deadbee#1", b"//DEADBEEF#1", b"//#1", b"//a b#1",
                                      b"//x/y#1", b"\xff\xfe")),
]  # fmt: skip


def parsed(parse: Callable[[bytes], object], line: bytes) -> object:
    """What a line is; None, malformed."""
    try:
        return parse(line)
    except ProtocolError:
        return None


def test_a_line_is_a_signal_unknown_or_malformed() -> None:
    for line, in_v1, in_v2 in SIGNALS:
        assert parsed(parse_v1_signal, line) == in_v1, line
        assert parsed(parse_signal, line) == in_v2, line


ADDRESSES = {
    "1.2.3.4:5": True,
    "255.255.255.255:65535": True,
    "[::1]:0": True,
    "[2001:db8::ffff]:443": True,
    "[::ffff:1.2.3.4]:443": True,
    "": False,
    "x": False,
    ":80": False,
    "1.2.3.4": False,
    "1.2.3.4:": False,
    "1.2.3.4:65536": False,
    "1.2.3.4:-1": False,
    "1.2.3:80": False,
    "01.2.3.4:80": False,
    "::1:80": False,
    "[::1]": False,
    "[::1]80": False,
    "[1.2.3.4]:80": False,
    "[fe80::1%eth0]:80": False,
    "fe80::1%eth0:80": False,
    "[::g]:80": False,
    "localhost:80": False,
    "[localhost]:80": False,
    "%31.2.3.4:80": False,
    "/run/socket": False,
}


@pytest.mark.parametrize("kind", [TCP, LANE])
def test_an_address_in_a_launch_is_taken_as_it_is_and_what_is_none_is_dropped(kind: int) -> None:
    good = "192.0.2.7:4711"
    for text, is_one in ADDRESSES.items():
        for visitor, local in ((text, good), (good, text)):
            launch = parse_signal(f"//deadbeef?from={visitor}&to={local}#{kind}".encode())
            kept = [each if each == good or is_one else "" for each in (visitor, local)]
            assert launch == Launch("deadbeef", kind, *kept)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_signal_or_a_protocol_error(line: bytes) -> None:
    for parse in PARSERS:
        with contextlib.suppress(ProtocolError):
            parse(line)


# Lines in a stream


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
    assert buffer.is_empty


@given(st.sampled_from([MAX_OPENING, MAX_LINE]), st.integers(-600, 9000), st.integers(1, 5000))
def test_an_over_long_line_is_skipped_counted_and_never_held(limit: int, beyond: int, piece: int) -> None:
    length = max(0, limit + beyond)
    buffer, got = LineBuffer(limit), []
    stream = b"x" * length + b"\n//deadbeef#1\n"
    for start in range(0, len(stream), piece):
        got += buffer.feed(stream[start : start + piece])
        assert len(buffer._held) <= limit
    assert got[-1] == b"//deadbeef#1"
    assert (len(got), buffer.skipped) == ((2, 0) if length <= limit else (1, 1))


@each_row(("arrived", "empty"), [(b"", True), (b"a\n", True), (b"a", False), (b"a\nb", False), (b"x" * 600, False)])
def test_a_buffer_is_empty_where_nothing_of_a_next_line_has_arrived(arrived: bytes, empty: bool) -> None:
    buffer = LineBuffer(MAX_OPENING)
    buffer.feed(arrived)
    assert buffer.is_empty == empty


def test_a_peers_bytes_cannot_forge_a_log_line() -> None:
    assert printable(b"a\nb\x1b[31m") == r"'a\nb\x1b[31m'"
    assert len(printable(b"x" * 1000)) < 70

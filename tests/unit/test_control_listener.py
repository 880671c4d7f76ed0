"""The tunnel port: which connection becomes the client's, which is refused, and which is a data connection."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import gevent
import pytest
from gevent import socket

from nodepass.errors import TLSError
from nodepass.log import Limit, Log
from nodepass.net.sockets import Endpoint
from nodepass.server import control_listener
from nodepass.server import opening as opening_module
from nodepass.tunnel import control as control_module
from nodepass.tunnel.control import Agreement
from nodepass.wire.auth import Key, SessionKey, Transcript
from nodepass.wire.negotiation import Auth, Challenge, DataHello, Hello, Offer, parse_opening, without_mac
from nodepass.wire.signals import ID_LENGTH
from tests.unit.controls import is_closed, read_line, until
from tests.unit.keys import KEY, NEXT_KEY, WEB_KEY
from tests.unit.secure_peers import OTHER, V1, SecurePeer
from tests.unit.servers import SOON, OpenPort, a_server_room, occupy

NONCE, ONE, TWO = "0" * 32, "1" * 16, "2" * 16
HERE = Endpoint(socket.AF_INET, ("127.0.0.1", 0))

Peer = socket.socket | SecurePeer


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    with a_server_room(monkeypatch) as stack:
        yield stack


def hello(client: str = ONE, name: str = "", version: str = "2") -> bytes:
    return Hello(NONCE, client, name, version=version).encode()


def take_offer(peer: Peer) -> Offer:
    offer = parse_opening(read_line(peer)[:-1])  # type: ignore[arg-type]  # as a socket
    assert isinstance(offer, Offer), offer
    return offer


def prove(peer: Peer, key: Key, said: bytes, channel: bytes = b"") -> Transcript:
    """Answer the challenge that must come now."""
    line = read_line(peer)[:-1]  # type: ignore[arg-type]
    assert isinstance(parse_opening(line), Challenge), line
    transcript = Transcript(said[:-1], line, channel)
    peer.sendall(Auth(key.client_proof(transcript)).encode())
    return transcript


def secure(stack: ExitStack, port: OpenPort, *lines: bytes, source: str = "127.0.0.1") -> SecurePeer:
    """A v2 peer under TLS that has said something inside."""
    peer = SecurePeer(stack, port.connect(source=source))
    for line in lines:
        peer.sendall(line)
    return peer


# A v2 client


def test_a_client_is_admitted_and_gets_heartbeats_until_it_leaves(stack: ExitStack) -> None:
    port = OpenPort(stack, report_interval=0.2)  # after three times as long it is given up, on a busy machine too
    client = port.connect(hello())
    assert take_offer(client) == Offer(port.port.data[0].getsockname()[1], 0, 200)
    for _ in range(3):
        assert read_line(client) == b"//beat?idle=0\n"
        client.sendall(b"//beat?ok=1\n")
    assert port.slot.version == 2
    assert port.common.stats.connects == 1
    client.close()
    until(lambda: port.slot.control is None)


def test_a_connected_client_is_not_pending(stack: ExitStack) -> None:
    """It is not dropped, however many connections follow."""
    port = OpenPort(stack)
    take_offer(port.connect(hello()))
    assert len(port.control_listener._pending) == 0


@pytest.mark.parametrize(("interval", "heartbeat"), [(0.001, 10), (0.5, 500), (120, 60_000)])
def test_heartbeats_are_offered_within_the_bounds_of_the_wire(
    stack: ExitStack, interval: float, heartbeat: int
) -> None:
    port = OpenPort(stack, report_interval=interval)
    assert take_offer(port.connect(hello())).heartbeat == heartbeat


def test_another_client_is_refused_while_the_first_is_alive(stack: ExitStack) -> None:
    port = OpenPort(stack)
    client = port.connect(hello(ONE))
    take_offer(client)
    second = port.connect(hello(TWO))
    assert read_line(client) == b"//beat?idle=0\n"
    client.sendall(b"//beat?ok=1\n")
    assert read_line(second) == b"//error?reason=busy\n"
    assert second.recv(1) == b""
    assert port.control_failures == {"busy": 1}
    assert port.common.stats.connects == 1


def test_another_client_replaces_one_that_does_not_respond(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_module, "LIFE_SIGN_WITHIN", SOON)
    port = OpenPort(stack)
    silent = port.connect(hello(ONE))
    take_offer(silent)
    take_offer(port.connect(hello(TWO)))
    assert [read_line(silent) for _ in range(2)] == [b"//beat?idle=0\n", b"//bye?reason=replaced\n"]


def test_the_same_client_is_admitted_again_at_once_after_its_old_connection_has_ended(stack: ExitStack) -> None:
    port = OpenPort(stack)
    old = port.connect(hello())
    take_offer(old)
    new = port.connect(hello())
    take_offer(new)
    old.settimeout(0)  # it has been said before the offer was
    assert read_line(old) == b"//bye?reason=replaced\n"
    assert old.recv(1) == b""
    assert port.slot.control
    assert port.slot.control.endpoint.sockaddr == new.getsockname()


def test_clients_that_come_and_go_do_not_fill_the_log(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a key, anyone can be such a client, thousands of times in a second."""
    written: Counter[str] = Counter()
    logger = logging.getLogger("nodepass")
    stack.callback(logger.setLevel, logger.level)
    logger.setLevel(logging.INFO)
    monkeypatch.setattr(Log, "_write", lambda _self, _level, event, *_: written.update([event]))
    port = OpenPort(stack)
    for _ in range(4 * Limit.burst):
        take_offer(client := port.connect(hello()))
        client.shutdown(socket.SHUT_WR)
    until(lambda: port.common.stats.connects == 4 * Limit.burst and written["client.disconnected"])
    for event in ("client.connected", "client.disconnected"):
        assert 0 < written[event] <= 2 * Limit.burst  # two seconds may have passed


@pytest.mark.parametrize(
    "words", [b"GET / HTTP/1.1\r\n\r\n", b"/" * 600 + b"\n", b"\n", b"//auth?mac=\n"], ids=["HTTP", "long", "", "auth"]
)
@pytest.mark.parametrize("tls", [0, 1])
def test_a_peer_that_is_no_client_is_closed_without_an_answer_and_counted(
    stack: ExitStack, words: bytes, tls: int
) -> None:
    port = OpenPort(stack, tls=tls)
    assert is_closed(port.connect(words))
    assert port.control_failures == {"protocol": 1}


def test_a_client_of_a_later_version_is_told_that_it_is_not_supported(stack: ExitStack) -> None:
    port = OpenPort(stack)
    assert read_line(port.connect(hello(version="3"))) == b"//error?reason=version\n"
    assert port.control_failures == {"version": 1}


def test_from_the_first_byte_on_the_handshakes_timeout_counts(stack: ExitStack) -> None:
    port = OpenPort(stack, handshake_timeout=SOON)
    assert is_closed(port.connect(b"//hello"))
    assert port.control_failures == {"timeout": 1}


def test_the_reason_of_a_rejection_reaches_a_peer_that_goes_on_writing(stack: ExitStack) -> None:
    """A close with bytes unread would be a reset, which overtakes the line."""
    port = OpenPort(stack)
    peer = port.connect(hello(version="3"))
    until(lambda: port.control_failures)
    peer.sendall(bytes(10_000))
    assert read_line(peer) == b"//error?reason=version\n"
    assert peer.recv(1) == b""


def test_a_slot_that_stops_refuses_clients(stack: ExitStack) -> None:
    port = OpenPort(stack)
    client = port.connect(hello(ONE))
    take_offer(client)
    port.slot.stop(0)
    late = port.connect(hello(ONE))
    assert read_line(late) == b"//error?reason=shutdown\n"
    assert late.recv(1) == b""
    assert port.slot.control is not None


def test_a_listener_that_closes_ends_its_client_and_everything_pending(stack: ExitStack) -> None:
    port = OpenPort(stack)
    client, silent = port.connect(hello()), port.connect()
    take_offer(client)
    until(lambda: len(port.control_listener._pending) == 1)
    port.control_listener.close()
    assert is_closed(client)
    assert silent.recv(1) == b""
    assert port.slot.control is None
    assert not port.control_listener.find_ended()


# Keys


def connect_keyed(port: OpenPort, key: Key, client: str = ONE, name: str = "") -> tuple[Peer, SessionKey]:
    """A client that has been admitted with a key; the server's proof is right."""
    said = hello(client, name)
    peer = port.connect(said)
    transcript = prove(peer, key, said)
    line = read_line(peer)[:-1]
    offer = parse_opening(line)
    assert isinstance(offer, Offer), line
    text = without_mac(line, offer.mac)
    assert offer.mac == key.server_proof(transcript, text)
    return peer, key.session(transcript, text)


def test_a_client_proves_its_key_and_the_server_proves_it_too(stack: ExitStack) -> None:
    port = OpenPort(stack, KEY)
    connect_keyed(port, KEY)
    assert port.slot.agreement
    assert port.slot.agreement.key == KEY


def test_during_a_rotation_each_of_two_keys_is_accepted(stack: ExitStack) -> None:
    port = OpenPort(stack, KEY, NEXT_KEY)
    for key in (KEY, NEXT_KEY):
        connect_keyed(port, key)
        until(lambda: port.slot.agreement)
        assert port.slot.agreement
        assert port.slot.agreement.key == key


def test_a_client_whose_key_is_removed_is_told_and_cannot_come_back(stack: ExitStack) -> None:
    port = OpenPort(stack, KEY, NEXT_KEY)
    client, _ = connect_keyed(port, KEY)
    port.slot.set_keys([NEXT_KEY])
    assert read_line(client) == b"//bye?reason=reload\n"  # type: ignore[arg-type]
    said = hello()
    late = port.connect(said)
    prove(late, KEY, said)
    assert read_line(late) == b"//error?reason=key-mismatch\n"


def test_a_client_with_another_key_is_refused(stack: ExitStack) -> None:
    port = OpenPort(stack, KEY)
    said = hello()
    peer = port.connect(said)
    prove(peer, NEXT_KEY, said)
    assert read_line(peer) == b"//error?reason=key-mismatch\n"
    assert is_closed(peer)
    assert port.slot.control is None


@pytest.mark.parametrize("answer", [b"//auth?mac=" + b"0" * 63 + b"\n", b"//hello?v=2\n", b"?\n"], ids=repr)
def test_an_answer_to_the_challenge_that_is_no_proof_is_a_mismatch(stack: ExitStack, answer: bytes) -> None:
    port = OpenPort(stack, KEY)
    peer = port.connect(hello())
    assert read_line(peer).startswith(b"//challenge")
    peer.sendall(answer)
    assert read_line(peer) == b"//error?reason=key-mismatch\n"


@pytest.mark.parametrize("after", ["nothing", "half of a hello", "the challenge"])
def test_a_client_that_does_not_prove_a_key_in_time_is_told_that_one_is_required(stack: ExitStack, after: str) -> None:
    """The time before the first byte counts."""
    port = OpenPort(stack, KEY, handshake_timeout=SOON)
    peer = port.connect(*{"nothing": [], "half of a hello": [b"//hel"], "the challenge": [hello()]}[after])
    if after == "the challenge":
        assert read_line(peer).startswith(b"//challenge")
    assert read_line(peer) == b"//error?reason=key-required\n"
    assert peer.recv(1) == b""
    assert port.control_failures == {"key_required": 1}


def test_wire_2_serves_no_v1_client(stack: ExitStack) -> None:
    port = OpenPort(stack, wire="2", handshake_timeout=SOON)
    assert read_line(port.connect()) == b"//error?reason=key-required\n"


@pytest.mark.parametrize("keys", [[], [KEY]], ids=["no key", "a key"])
def test_a_client_that_has_waited_for_its_turn_for_too_long_is_told_that_the_place_is_taken(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, keys: list[Key]
) -> None:
    """What it had to say it has said."""
    port = OpenPort(stack, *keys, handshake_timeout=5 * SOON)
    occupy(stack, port.slot, Agreement(Offer(10102, 0, 5000), client=TWO, key=keys[0] if keys else None))
    monkeypatch.setattr(control_module, "LIFE_SIGN_WITHIN", 5)
    said = hello(ONE)
    peer = port.connect(said)
    if keys:
        prove(peer, KEY, said)
    assert read_line(peer) == b"//error?reason=busy\n"
    assert port.control_failures == {"busy": 1}
    assert port.slot.control


@pytest.mark.parametrize("keys", [(), (KEY,)], ids=["no key", "key"])
def test_a_connection_dropped_at_any_moment_of_its_admission_holds_nothing(stack: ExitStack, keys: list[Key]) -> None:
    port, said = OpenPort(stack, *keys), hello(ONE)
    for turns in range(12):
        peer = port.connect(said)
        if keys:
            prove(peer, KEY, said)
        for _ in range(turns):
            gevent.sleep(1e-9)  # an iteration of the event loop
        before = len(port.control_listener._pending)
        for pending in list(port.control_listener._pending._by_socket.values()):
            port.control_listener._pending._drop(pending)
        if before:
            with contextlib.suppress(ConnectionError):
                while peer.recv(1000):  # up to the end
                    pass
            assert port.slot.control is None
        client = port.connect(said)
        if keys:
            prove(client, KEY, said)
        take_offer(client)  # the place was not left locked
        client.close()
        peer.close()
        until(lambda: port.slot.control is None)
    assert port.common.stats.trouble["pending_dropped"]


# Names


def test_a_client_gets_the_tunnel_of_its_name_and_a_sid(stack: ExitStack) -> None:
    """Where several tunnels share the port, a data connection says whose it is."""
    port = OpenPort(stack, tunnels={"": [], "web": []})
    first, web = take_offer(port.connect(hello(ONE))), take_offer(port.connect(hello(TWO, "web")))
    assert [slot.agreement.offer for slot in port.slots if slot.agreement] == [first, web]
    assert len({first.sid, web.sid, ""}) == 3
    assert first.data_port == web.data_port


def test_a_sid_is_new_in_each_offer(stack: ExitStack) -> None:
    port = OpenPort(stack, tunnels={"": [], "web": []})
    assert len({take_offer(port.connect(hello())).sid for _ in range(3)}) == 3


@pytest.mark.parametrize("mux", [True, False])
def test_a_port_of_one_tunnel_needs_a_sid_only_where_it_takes_data_connections(stack: ExitStack, mux: bool) -> None:
    port = OpenPort(stack, mux=mux)
    offer = take_offer(port.connect(hello()))
    assert (offer.mux, bool(offer.sid)) == (mux, mux)


def test_an_unknown_name_is_named_where_no_tunnel_has_a_key(stack: ExitStack) -> None:
    port = OpenPort(stack, tunnels={"web": []})
    assert read_line(port.connect(hello(ONE, "mail"))) == b"//error?reason=unknown-name\n"
    assert port.control_failures == {"unknown_name": 1}


def test_an_unknown_name_is_not_told_from_a_wrong_key_where_one_tunnel_has_a_key(stack: ExitStack) -> None:
    port = OpenPort(stack, tunnels={"": [], "web": [WEB_KEY]})
    for name in ("mail", "web"):
        said = hello(ONE, name)
        peer = port.connect(said)
        prove(peer, NEXT_KEY, said)
        assert read_line(peer) == b"//error?reason=key-mismatch\n"
    assert port.control_failures == {"key_mismatch": 2}


def test_a_tunnel_without_a_key_asks_for_none_beside_one_that_has_one(stack: ExitStack) -> None:
    port = OpenPort(stack, tunnels={"": [], "web": [WEB_KEY]})
    take_offer(port.connect(hello(ONE)))
    connect_keyed(port, WEB_KEY, TWO, "web")
    assert all(slot.control for slot in port.slots)


def test_the_clients_of_two_tunnels_do_not_concern_each_other(stack: ExitStack) -> None:
    port = OpenPort(stack, tunnels={"": [], "web": []})
    for name in ("", "web"):
        take_offer(port.connect(hello(ONE, name)))
    first, web = port.slots
    assert first.control
    assert web.control
    first.set_keys([KEY])
    assert not first.control
    assert web.control


# TLS


def test_a_client_under_tls_is_admitted(stack: ExitStack) -> None:
    port = OpenPort(stack, tls=1)
    assert take_offer(secure(stack, port, hello())).tls == 1


def test_a_clients_proof_covers_the_channel(stack: ExitStack) -> None:
    port = OpenPort(stack, KEY, tls=1)
    said = hello()
    peer = secure(stack, port, said)
    prove(peer, KEY, said, peer.stream.exporter())
    assert take_offer(peer).mac
    other = secure(stack, port, said)
    prove(other, KEY, said, peer.stream.exporter())
    assert read_line(other) == b"//error?reason=key-mismatch\n"  # type: ignore[arg-type]


def test_a_client_that_begins_in_the_clear_is_told_to_begin_with_tls(stack: ExitStack) -> None:
    port = OpenPort(stack, tls=1)
    clear = port.connect(hello(ONE, "another-name"))
    assert read_line(clear) == b"//tls\n"
    peer = SecurePeer(stack, clear)
    peer.sendall(hello())
    assert take_offer(peer).tls == 1


def test_a_server_without_tls_tells_a_client_that_begins_with_it(stack: ExitStack) -> None:
    port = OpenPort(stack)
    assert read_line(port.connect(b"\x16\x03\x01")) == b"//error?reason=no-tls\n"
    assert port.control_failures == {"no_tls": 1}


@pytest.mark.parametrize(("kind", "why"), [(V1, "protocol"), (OTHER, "tls")], ids=["no ALPN", "another"])
def test_tls_without_our_protocol_is_closed(stack: ExitStack, kind: tuple[int, list[bytes]], why: str) -> None:
    port = OpenPort(stack, tls=1)
    with contextlib.suppress(TLSError):
        assert is_closed(SecurePeer(stack, port.connect(), kind))  # type: ignore[arg-type]
    until(lambda: port.control_failures == {why: 1})


@pytest.mark.parametrize("words", [b"//hello", b"\x16\x03", hello()], ids=["a line", "a ClientHello", "a hello"])
def test_nothing_more_is_said_in_the_clear_to_a_peer_that_begins_and_does_not_go_on(
    stack: ExitStack, words: bytes
) -> None:
    """Where TLS is used, an error in the clear could be anybody's."""
    port = OpenPort(stack, KEY, tls=1, handshake_timeout=SOON)
    peer = port.connect(words)
    if words == hello():
        assert read_line(peer) == b"//tls\n"
    assert is_closed(peer)
    assert port.control_failures == {"key_required": 1}


def test_a_silent_peer_is_told_that_a_key_is_required_with_tls_too(stack: ExitStack) -> None:
    """It may be a v1 client, which reads a line in the clear."""
    port = OpenPort(stack, KEY, tls=1, handshake_timeout=SOON)
    assert read_line(port.connect()) == b"//error?reason=key-required\n"


# v1 on trial


def test_a_silent_connection_gets_the_line_of_v1_and_no_place(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = OpenPort(stack, report_interval=SOON)
    client = port.try_v1(monkeypatch)
    assert port.slot.control is None
    assert port.common.stats.connects == 0
    assert len(port.control_listener._pending) == 1
    take_offer(port.connect(hello()))
    client.settimeout(3 * SOON)
    with pytest.raises(TimeoutError):
        client.recv(1)  # no heartbeat


def test_the_first_data_connection_makes_the_youngest_on_trial_the_client(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = OpenPort(stack, report_interval=SOON)
    older, youngest = port.try_v1(monkeypatch), port.try_v1(monkeypatch)
    elsewhere = port.try_v1(monkeypatch, "127.0.0.2")
    data = port.connect_data()
    id = data.recv(ID_LENGTH).decode()
    assert port.slot.control
    assert port.slot.control.endpoint.sockaddr == youngest.getsockname()
    assert id in port.slot.pool
    assert [read_line(youngest) for _ in range(3)] == [b"\n"] * 3
    assert port.common.stats.connects == 1
    assert len(port.control_listener._pending) == 2
    for other in (older, elsewhere):
        other.close()
    youngest.close()
    until(lambda: port.slot.control is None)


def test_a_trial_ends_after_the_handshakes_timeout(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    port = OpenPort(stack, handshake_timeout=3 * SOON)
    assert is_closed(port.try_v1(monkeypatch))
    assert not port.slot.trials
    assert port.control_failures == {"silent": 1}


@pytest.mark.parametrize(("byte", "is_late"), [(hello(), True), (b"\x16", True), (b"\n", False), (b"G", False)])
def test_a_byte_ends_a_trial_and_that_of_a_v2_client_is_remembered(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, byte: bytes, is_late: bool
) -> None:
    port = OpenPort(stack)
    client = port.try_v1(monkeypatch)
    client.sendall(byte)
    while client.recv(100):  # to the end, which is no reset
        pass
    assert not port.slot.trials
    assert port.port.was_late(HERE) is is_late
    monkeypatch.setattr(control_listener, "SILENCE_AFTER_LATE_HELLO", 5)
    assert port.control_listener._patience(HERE) == (5 if is_late else control_listener.SILENCE)


@pytest.mark.parametrize(("byte", "is_late"), [(hello(), True), (b"\n", False)])
def test_a_byte_of_a_connected_v1_client_ends_it(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, byte: bytes, is_late: bool
) -> None:
    port = OpenPort(stack)
    client = port.try_v1(monkeypatch)
    assert port.connect_data().recv(ID_LENGTH)
    assert port.slot.control
    client.sendall(byte)
    while client.recv(100):  # to the end, which is no reset
        pass
    until(lambda: port.slot.control is None)
    assert port.port.was_late(HERE) is is_late


def test_no_client_is_on_trial_where_another_is_alive(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    port = OpenPort(stack)
    client = port.connect(hello())
    take_offer(client)
    with monkeypatch.context() as brief:
        brief.setattr(control_listener, "SILENCE", SOON)
        silent = port.connect()
        assert read_line(client) == b"//beat?idle=0\n"
    client.sendall(b"//beat?ok=1\n")
    assert read_line(silent) == b"//error?reason=busy\n"


def test_v1_clients_are_those_of_the_tunnel_without_a_name(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    port = OpenPort(stack, tunnels={"web": [], "": []})
    port.try_v1(monkeypatch)
    assert [len(slot.trials) for slot in port.slots] == [0, 1]


def test_v1_under_tls_is_told_so_in_the_clear(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    port = OpenPort(stack, tls=1)
    port.try_v1(monkeypatch)
    assert port.port.offer(1).tls == 1


# Data connections at the same port


def test_at_one_port_a_data_connection_says_whose_it_is(stack: ExitStack) -> None:
    port = OpenPort(stack, mux=True)
    offer = take_offer(port.connect(hello()))
    data = port.connect(DataHello(offer.sid).encode())
    assert data.recv(ID_LENGTH).decode() in port.slot.pool
    assert len(port.control_listener._pending) == 0
    assert len(port.slot.pool) == 1


def test_at_one_port_a_data_connection_under_tls_says_so_inside(stack: ExitStack) -> None:
    port = OpenPort(stack, mux=True, tls=1)
    offer = take_offer(secure(stack, port, hello()))
    data = secure(stack, port, DataHello(offer.sid).encode())
    assert data.recv(ID_LENGTH).decode() in port.slot.pool


def test_at_one_port_silence_of_a_v1_client_is_a_data_connection(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = OpenPort(stack, mux=True)
    port.try_v1(monkeypatch)
    for _ in range(2):  # on trial, then connected
        assert port.connect().recv(ID_LENGTH).decode() in port.slot.pool
    assert port.slot.version == 1
    other = port.connect(source="127.0.0.2")
    until(lambda: len(port.control_listener._pending) == 1)
    assert len(port.slot.pool) == 2
    other.close()


def test_at_one_port_a_v2_client_of_the_same_address_is_told_from_v1_data(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It speaks at once."""
    monkeypatch.setattr(control_listener, "SILENCE_OF_V1_DATA", 5)
    port = OpenPort(stack, mux=True)
    client = port.try_v1(monkeypatch)
    take_offer(port.connect(hello()))
    client.close()


def test_at_one_port_tls_without_alpn_is_a_data_connection_of_a_v1_client(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = OpenPort(stack, mux=True, tls=1)
    assert is_closed(SecurePeer(stack, port.connect(), V1))  # type: ignore[arg-type]
    assert port.data_failures == {"no_client": 1}
    port.try_v1(monkeypatch)
    data = SecurePeer(stack, port.connect(), V1)
    assert data.recv(ID_LENGTH).decode() in port.slot.pool
    assert port.slot.version == 1


def test_at_one_port_with_tls_silence_is_never_a_data_connection(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = OpenPort(stack, mux=True, tls=1)
    port.try_v1(monkeypatch)
    assert SecurePeer(stack, port.connect(), V1).recv(ID_LENGTH)
    silent = port.connect()
    gevent.sleep(2 * opening_module.SILENCE_OF_V1_DATA)
    assert len(port.slot.pool) == 1
    silent.close()

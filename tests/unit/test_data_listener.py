"""Data connections on the server: whose are taken, what they must prove, and where they go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from gevent import socket

from nodepass.server import pending as pending_module
from nodepass.server.client_slot import ClientSlot
from nodepass.server.pending import PendingConnections
from nodepass.tunnel.control import STOPPING, Agreement
from nodepass.wire.auth import PROOF_LENGTH, Key, SessionKey
from nodepass.wire.negotiation import DataHello, Offer
from nodepass.wire.signals import ID_LENGTH
from tests.unit.controls import V1 as V1_AGREEMENT
from tests.unit.controls import is_closed, until
from tests.unit.keys import KEY
from tests.unit.secure_peers import OLD_V1, OLD_V2, V1, V2, SecurePeer
from tests.unit.servers import SOON, OpenPort, a_server_room, fill, occupy
from tests.unit.streams import receive_all

SESSION = SessionKey(b"k" * 32)
SIDS = "1" * 32, "2" * 32
CLIENT = "0" * 16
SHARED: dict[str, list[Key]] = {"": [], "web": []}


def agreed(session: SessionKey | None = None, sid: str = "", tls: int = 0) -> Agreement:
    """With a v2 client, which has a key where there is a session key."""
    return Agreement(Offer(10102, tls, 5000, sid), session, KEY if session else None, CLIENT)


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    with a_server_room(monkeypatch) as stack:
        yield stack


@pytest.fixture
def port(stack: ExitStack) -> OpenPort:
    """A port of one tunnel without a key, whose client is connected."""
    port = OpenPort(stack)
    occupy(stack, port.slot)
    return port


@pytest.fixture
def keyed(stack: ExitStack) -> OpenPort:
    """A port of one tunnel with a key, whose client is connected."""
    port = OpenPort(stack, KEY)
    occupy(stack, port.slot, agreed(SESSION))
    return port


@pytest.fixture
def shared(stack: ExitStack) -> OpenPort:
    """A port of two tunnels, whose clients are connected."""
    port = OpenPort(stack, tunnels=SHARED)
    for slot, sid in zip(port.slots, SIDS, strict=True):
        occupy(stack, slot, agreed(sid=sid))
    return port


Peer = socket.socket | SecurePeer


def receive_id(peer: Peer, session: SessionKey | None = None, channel: bytes = b"") -> str:
    """The id, with the server's proof of the key where there is one."""
    size = ID_LENGTH + (PROOF_LENGTH if session else 0)
    received = b""
    while len(received) < size:
        more = peer.recv(size - len(received))
        assert more, f"the end after {received!r}"
        received += more
    id = received[:ID_LENGTH].decode()
    assert received[ID_LENGTH:] == (session.id_proof(id, channel) if session else b"")
    return id


def assert_pooled(slot: ClientSlot, id: str) -> None:
    until(lambda: id in slot.pool)


# One tunnel, without TLS: the server speaks first


def test_a_clients_connection_gets_an_id_at_once_and_is_put_into_the_pool(port: OpenPort) -> None:
    peers = [port.connect_data() for _ in range(3)]
    ids = {receive_id(peer) for peer in peers}
    assert len(ids) == 3
    assert all(id in port.slot.pool for id in ids)
    assert not port.data_failures
    assert len(port.data_listener._pending) == 0


def test_without_a_client_no_connection_is_taken(stack: ExitStack) -> None:
    port = OpenPort(stack)
    assert is_closed(port.connect_data())
    assert port.data_failures == {"no_client": 1}


def test_a_connection_from_another_address_is_rejected(port: OpenPort) -> None:
    assert is_closed(port.connect_data(source="127.0.0.2"))
    assert port.data_failures == {"wrong_address": 1}


def test_a_connected_v1_client_gets_its_connections(stack: ExitStack) -> None:
    port = OpenPort(stack)
    occupy(stack, port.slot, V1_AGREEMENT)
    assert receive_id(port.connect_data()) in port.slot.pool
    assert is_closed(port.connect_data(source="127.0.0.2"))


@pytest.mark.parametrize("source", ["127.0.0.1", "127.0.0.2"])
def test_a_silent_connection_that_was_there_before_the_client_keeps_none_of_its_connections_out(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """It has got the line of v1, as a health check does."""
    port = OpenPort(stack)
    port.try_v1(monkeypatch, source)
    _, control = occupy(stack, port.slot)
    assert receive_id(port.connect_data()) in port.slot.pool
    assert port.slot.control is control


def test_connections_beyond_the_largest_pool_are_rejected(stack: ExitStack) -> None:
    port = OpenPort(stack, min_pool_capacity=1, max_pool_capacity=2)
    occupy(stack, port.slot)
    fill(stack, port.slot, "00000001", "00000002")
    assert is_closed(port.connect_data())
    assert port.data_failures == {"pool_full": 1}


# Keys


def test_with_a_key_a_connection_may_come_from_any_address_and_both_ends_prove_it(keyed: OpenPort) -> None:
    peer = keyed.connect_data(source="127.0.0.2")
    id = receive_id(peer, SESSION)
    assert id not in keyed.slot.pool
    peer.sendall(SESSION.data_proof(id, b""))
    assert_pooled(keyed.slot, id)
    until(lambda: len(keyed.data_listener._pending) == 0)


@pytest.mark.parametrize(
    ("session", "channel", "proof"),
    [(SessionKey(b"x" * 32), b"", "data_proof"), (SESSION, b"x" * 32, "data_proof"), (SESSION, b"", "id_proof")],
    ids=["another key", "another channel", "the server's own"],
)
def test_a_wrong_proof_is_rejected(keyed: OpenPort, session: SessionKey, channel: bytes, proof: str) -> None:
    peer = keyed.connect_data()
    id = receive_id(peer, SESSION)
    peer.sendall(getattr(session, proof)(id, channel))
    assert is_closed(peer)
    assert keyed.data_failures == {"protocol": 1}
    assert len(keyed.slot.pool) == 0


def test_a_proof_for_another_id_is_rejected(keyed: OpenPort) -> None:
    peer = keyed.connect_data()
    receive_id(peer, SESSION)
    peer.sendall(SESSION.data_proof("00000000", b""))
    assert is_closed(peer)
    assert len(keyed.slot.pool) == 0


def test_a_proof_that_ends_early_is_rejected(keyed: OpenPort) -> None:
    peer = keyed.connect_data()
    peer.sendall(SESSION.data_proof(receive_id(peer, SESSION), b"")[:-1])
    peer.shutdown(socket.SHUT_WR)
    assert is_closed(peer)
    assert keyed.data_failures == {"closed": 1}


def test_a_proof_that_does_not_come_is_waited_for_until_the_handshake_timeout(stack: ExitStack) -> None:
    port = OpenPort(stack, KEY, handshake_timeout=SOON)
    occupy(stack, port.slot, agreed(SESSION))
    peer = port.connect_data()
    receive_id(peer, SESSION)
    assert is_closed(peer)
    assert port.data_failures == {"timeout": 1}


def test_connections_that_are_prepared_together_do_not_exceed_the_largest_pool(stack: ExitStack) -> None:
    port = OpenPort(stack, KEY, min_pool_capacity=1, max_pool_capacity=2)
    occupy(stack, port.slot, agreed(SESSION))
    peers = [port.connect_data() for _ in range(4)]
    for peer in peers:
        peer.sendall(SESSION.data_proof(receive_id(peer, SESSION), b""))
    until(lambda: port.data_failures == {"pool_full": 2})
    assert len(port.slot.pool) == 2


def test_a_proof_for_the_client_before_is_worth_nothing(stack: ExitStack, keyed: OpenPort) -> None:
    peer = keyed.connect_data()
    id = receive_id(peer, SESSION)
    occupy(stack, keyed.slot, agreed(SessionKey(b"n" * 32)))
    peer.sendall(SESSION.data_proof(id, b""))
    assert is_closed(peer)
    assert len(keyed.slot.pool) == 0


def test_a_silent_peer_holds_up_no_other(keyed: OpenPort) -> None:
    silent, other = keyed.connect_data(), keyed.connect_data()
    receive_id(silent, SESSION)
    id = receive_id(other, SESSION)
    other.sendall(SESSION.data_proof(id, b""))
    assert_pooled(keyed.slot, id)


# Several tunnels: a sid says whose a connection is


def test_a_connection_goes_to_the_tunnel_of_its_sid(shared: OpenPort) -> None:
    for slot, sid in zip(shared.slots, SIDS, strict=True):
        id = receive_id(shared.connect_data(DataHello(sid).encode()))
        assert_pooled(slot, id)
    assert [len(slot.pool) for slot in shared.slots] == [1, 1]


@pytest.mark.parametrize("mux", [False, True], ids=["data port", "tunnel port"])
@pytest.mark.parametrize("begins", ["with its line", "silently", "with half of it"])
def test_a_line_without_tls_and_key_is_answered_without_a_greenlet_unless_it_comes_in_parts(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, mux: bool, begins: str
) -> None:
    served = []
    original = PendingConnections._run

    def run_work(pending: PendingConnections, *args: Any) -> None:
        served.append(args)
        original(pending, *args)

    monkeypatch.setattr(PendingConnections, "_run", run_work)
    port = OpenPort(stack, mux=mux, clients=2)
    occupy(stack, port.slot, agreed(sid=SIDS[0]))
    line = DataHello(SIDS[0]).encode()
    cut = {"with its line": len(line), "silently": 0, "with half of it": 20}[begins]
    peer = port.connect_data(line[:cut])
    listener = port.control_listener if mux else port.data_listener
    if begins != "with its line":
        until(lambda: len(listener._pending) == 1)
    if begins == "with half of it":
        until(lambda: served)
    peer.sendall(line[cut:])
    assert_pooled(port.slot, receive_id(peer))
    until(lambda: len(listener._pending) == 0)
    assert len(served) == (begins == "with half of it")


@pytest.mark.parametrize("at", ["tunnel port", "data port", "one port"])
def test_what_has_waited_too_long_in_a_long_queue_is_turned_away_at_each_port(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    port = OpenPort(stack, tunnels=SHARED, mux=at == "one port")
    occupy(stack, port.slot, agreed(sid=SIDS[0]))
    queues = []
    monkeypatch.setattr(pending_module, "since_last_bytes", lambda _: 60.0)
    monkeypatch.setattr(pending_module, "count_waiting", lambda sock: queues.append(sock) or pending_module.LONG_QUEUE)
    assert is_closed(port.connect_data() if at == "data port" else port.connect())
    assert port.common.stats.trouble["pending_late"] == 1
    assert queues == (port.port.data if at == "data port" else port.port.tunnel)


def test_an_unknown_sid_is_rejected(shared: OpenPort) -> None:
    assert is_closed(shared.connect_data(DataHello("3" * 32).encode()))
    assert shared.data_failures == {"unknown_sid": 1}


def test_a_sid_ends_with_its_control_connection(stack: ExitStack, shared: OpenPort) -> None:
    occupy(stack, shared.slot, agreed(sid="4" * 32))
    assert is_closed(shared.connect_data(DataHello(SIDS[0]).encode()))
    assert receive_id(shared.connect_data(DataHello("4" * 32).encode()))
    assert shared.slots[1].control
    shared.slots[1].release(shared.slots[1].control, STOPPING)
    assert is_closed(shared.connect_data(DataHello(SIDS[1]).encode()))


def test_a_sid_is_worth_nothing_from_another_address_where_there_is_no_key(shared: OpenPort) -> None:
    assert is_closed(shared.connect_data(DataHello(SIDS[0]).encode(), source="127.0.0.2"))
    assert shared.data_failures == {"wrong_address": 1}


def test_a_sid_of_a_client_elsewhere_is_worth_nothing_at_the_address_of_another(stack: ExitStack) -> None:
    """The address is that of some client, so that only the sid tells whose the connection would be."""
    port = OpenPort(stack, tunnels={"": [], "web": [KEY]})
    occupy(stack, port.slots[0], agreed(sid=SIDS[0]))
    occupy(stack, port.slots[1], agreed(SESSION, SIDS[1]))
    assert is_closed(port.connect_data(DataHello(SIDS[0]).encode(), source="127.0.0.2"))
    assert port.data_failures == {"wrong_address": 1}
    peer = port.connect_data(DataHello(SIDS[1]).encode(), source="127.0.0.2")
    id = receive_id(peer, SESSION)
    peer.sendall(SESSION.data_proof(id, b""))
    assert_pooled(port.slots[1], id)


def test_where_a_sid_is_in_use_a_silent_connection_gets_no_id(stack: ExitStack) -> None:
    port = OpenPort(stack, tunnels=SHARED, handshake_timeout=SOON)
    for slot, sid in zip(port.slots, SIDS, strict=True):
        occupy(stack, slot, agreed(sid=sid))
    assert receive_all(port.connect_data()) == b""
    assert port.data_failures == {"timeout": 1}


@pytest.mark.parametrize(
    "words", [b"GET / HTTP/1.1\r\n", b"//hello?v=2&nonce=" + b"0" * 32 + b"&client=" + b"0" * 16 + b"&name=\n", b"\n"]
)
def test_anything_else_is_closed_without_an_answer(shared: OpenPort, words: bytes) -> None:
    assert is_closed(shared.connect_data(words))
    assert shared.data_failures == {"protocol": 1}


def test_tls_where_there_is_none_is_closed_without_an_answer(shared: OpenPort) -> None:
    assert is_closed(shared.connect_data(b"\x16\x03\x01"))
    assert shared.data_failures == {"tls": 1}


def test_a_full_pool_rejects_what_is_for_it_and_nothing_else(stack: ExitStack) -> None:
    port = OpenPort(stack, tunnels=SHARED, min_pool_capacity=1, max_pool_capacity=1)
    for slot, sid in zip(port.slots, SIDS, strict=True):
        occupy(stack, slot, agreed(sid=sid))
    fill(stack, port.slot, "00000001")
    assert is_closed(port.connect_data(DataHello(SIDS[0]).encode()))
    assert port.data_failures == {"pool_full": 1}
    assert receive_id(port.connect_data(DataHello(SIDS[1]).encode()))


def test_a_v1_client_shares_the_port_with_v2_clients(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connections are those that say nothing."""
    port = OpenPort(stack, tunnels=SHARED)
    occupy(stack, port.slots[1], agreed(sid=SIDS[1]))
    port.try_v1(monkeypatch)
    assert receive_id(port.connect_data()) in port.slots[0].pool
    assert port.slots[0].version == 1
    assert receive_id(port.connect_data()) in port.slots[0].pool


# TLS


@pytest.fixture
def secured(stack: ExitStack) -> OpenPort:
    port = OpenPort(stack, tls=1)
    occupy(stack, port.slot, agreed(tls=1))
    return port


def test_a_connection_under_tls_gets_its_id_inside(stack: ExitStack, secured: OpenPort) -> None:
    assert_pooled(secured.slot, receive_id(SecurePeer(stack, secured.connect_data())))


def test_with_a_key_the_proofs_cover_the_channel(stack: ExitStack) -> None:
    port = OpenPort(stack, KEY, tls=1)
    occupy(stack, port.slot, agreed(SESSION, tls=1))
    peer, other = (SecurePeer(stack, port.connect_data()) for _ in range(2))
    for each in (peer, other):
        id = receive_id(each, SESSION, each.stream.exporter())
        each.sendall(SESSION.data_proof(id, peer.stream.exporter()))
        if each is peer:
            assert_pooled(port.slot, id)
    assert other.recv(1) == b""
    assert port.data_failures == {"protocol": 1}


def test_a_connection_from_another_address_is_rejected_before_tls(secured: OpenPort) -> None:
    assert is_closed(secured.connect_data(source="127.0.0.2"))
    assert secured.data_failures == {"wrong_address": 1}


def test_a_sid_is_said_inside(stack: ExitStack) -> None:
    port = OpenPort(stack, tunnels=SHARED, tls=1)
    occupy(stack, port.slots[1], agreed(sid=SIDS[1], tls=1))
    peer = SecurePeer(stack, port.connect_data())
    peer.sendall(DataHello(SIDS[1]).encode())
    assert_pooled(port.slots[1], receive_id(peer))
    assert is_closed(port.connect_data(DataHello(SIDS[1]).encode()))
    assert port.data_failures == {"protocol": 1}


@pytest.mark.parametrize("kind", [V1, OLD_V1], ids=["TLS 1.3", "TLS 1.2"])
def test_tls_without_alpn_is_a_v1_clients(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, kind: tuple[int, list[bytes]]
) -> None:
    port = OpenPort(stack, tls=1)
    port.try_v1(monkeypatch)
    for _ in range(2):  # on trial, then connected
        assert_pooled(port.slot, receive_id(SecurePeer(stack, port.connect_data(), kind)))
    assert port.slot.version == 1


def test_tls_without_alpn_is_not_a_v2_clients(stack: ExitStack, secured: OpenPort) -> None:
    assert SecurePeer(stack, secured.connect_data(), V1).recv(1) == b""
    assert secured.data_failures == {"no_client": 1}


def test_tls_with_alpn_is_not_a_v1_clients(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    port = OpenPort(stack, tls=1)
    port.try_v1(monkeypatch)
    assert SecurePeer(stack, port.connect_data(), V2).recv(1) == b""
    assert port.data_failures == {"no_client": 1}
    assert port.slot.trials


def test_wire_v2_under_an_older_tls_is_closed_without_an_answer(stack: ExitStack, secured: OpenPort) -> None:
    assert SecurePeer(stack, secured.connect_data(), OLD_V2).recv(1) == b""
    assert secured.data_failures == {"tls": 1}


@pytest.mark.parametrize("version", [1, 2])
def test_with_tls_a_silent_connection_never_gets_an_id(stack: ExitStack, version: int) -> None:
    port = OpenPort(stack, tls=1, handshake_timeout=SOON)
    occupy(stack, port.slot, V1_AGREEMENT if version == 1 else agreed(tls=1))
    assert receive_all(port.connect_data()) == b""
    assert port.data_failures == {"timeout": 1}
    assert len(port.slot.pool) == 0


# Ends


def test_a_slot_that_stops_still_takes_connections_for_the_sessions_that_drain(port: OpenPort) -> None:
    port.slot.stop(0)
    assert receive_id(port.connect_data())


def test_a_listener_that_closes_ends_what_is_pending(keyed: OpenPort) -> None:
    peer = keyed.connect_data()
    receive_id(peer, SESSION)
    keyed.data_listener.close()
    assert is_closed(peer)
    assert len(keyed.data_listener._pending) == 0
    assert not keyed.data_listener.find_ended()


def test_a_connection_of_a_client_that_leaves_meanwhile_is_closed(keyed: OpenPort) -> None:
    peer = keyed.connect_data()
    id = receive_id(peer, SESSION)
    assert keyed.slot.control
    keyed.slot.release(keyed.slot.control, STOPPING)
    peer.sendall(SESSION.data_proof(id, b""))
    assert is_closed(peer)
    assert len(keyed.slot.pool) == 0

"""Data connections on the server: whose are taken, what they must prove, and where they go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import gevent
import pytest
from gevent import socket

from nodepass.server.client_slot import ClientSlot
from nodepass.server.data_listener import DataListener
from nodepass.tunnel.control import STOPPING, Agreement
from nodepass.tunnel.part import Common
from nodepass.wire.auth import Key, SessionKey
from nodepass.wire.signals import ID_LENGTH, Offer
from tests.unit.controls import is_closed, until
from tests.unit.servers import a_server_room, connect, fill, listen_on, make_slot, occupy, start

SESSION = SessionKey(b"k" * 32)
KEYED = Agreement(Offer(10102, 0, 5000), SESSION)


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    with a_server_room(monkeypatch) as stack:
        yield stack


class Port:
    """A data port that is served."""

    def __init__(self, stack: ExitStack, key: Key | None = None, **settings: object) -> None:
        self._stack = stack
        self.common: Common
        self.slot: ClientSlot
        self.common, self.slot = make_slot(stack, key, **settings)
        self._sock = listen_on(stack)
        self.listener: DataListener = start(stack, DataListener(self.common, [self._sock], self.slot, None))

    def connect(self, source: str = "127.0.0.1") -> socket.socket:
        return connect(self._stack, self._sock, source)

    @property
    def failures(self) -> dict[str, int]:
        """What has been rejected, by reason."""
        return {why: number for why, number in self.common.stats.data_failures.items() if number}


@pytest.fixture
def port(stack: ExitStack) -> Port:
    return Port(stack)


@pytest.fixture
def keyed(stack: ExitStack) -> Port:
    port = Port(stack, Key("correct horse battery staple"))
    occupy(stack, port.slot, KEYED)
    return port


def test_a_clients_connection_gets_an_id_and_is_put_into_the_pool(stack: ExitStack, port: Port) -> None:
    occupy(stack, port.slot)
    peers = [port.connect() for _ in range(3)]
    ids = {peer.recv(ID_LENGTH).decode() for peer in peers}
    assert len(ids) == 3
    assert all(id in port.slot.pool for id in ids)
    assert not port.failures


def test_without_a_client_no_connection_is_taken(port: Port) -> None:
    assert is_closed(port.connect())
    assert port.failures == {"no_client": 1}


def test_a_connection_from_another_address_is_rejected(stack: ExitStack, port: Port) -> None:
    occupy(stack, port.slot)
    assert is_closed(port.connect("127.0.0.2"))
    assert port.failures == {"wrong_address": 1}


def test_with_a_key_a_connection_may_come_from_any_address_and_must_prove_the_key(keyed: Port) -> None:
    peer = keyed.connect("127.0.0.2")
    id = peer.recv(ID_LENGTH).decode()
    assert id not in keyed.slot.pool
    peer.sendall(SESSION.data_proof(id))
    until(lambda: id in keyed.slot.pool)
    assert len(keyed.listener._pending) == 0


def test_a_wrong_proof_is_rejected(keyed: Port) -> None:
    peer = keyed.connect()
    id = peer.recv(ID_LENGTH).decode()
    peer.sendall(SessionKey(b"x" * 32).data_proof(id))
    assert is_closed(peer)
    assert keyed.failures == {"protocol": 1}
    assert len(keyed.slot.pool) == 0


def test_a_proof_that_ends_early_is_rejected(keyed: Port) -> None:
    peer = keyed.connect()
    peer.sendall(SESSION.data_proof(peer.recv(ID_LENGTH).decode())[:-1])
    peer.shutdown(socket.SHUT_WR)
    assert is_closed(peer)
    assert keyed.failures == {"closed": 1}


def test_a_proof_that_does_not_come_is_waited_for_until_the_handshake_timeout(stack: ExitStack) -> None:
    port = Port(stack, Key("correct horse battery staple"), handshake_timeout=0.05)
    occupy(stack, port.slot, KEYED)
    peer = port.connect()
    assert peer.recv(ID_LENGTH)
    assert is_closed(peer)
    assert port.failures == {"timeout": 1}


def test_a_proof_for_the_client_before_is_worth_nothing(stack: ExitStack, keyed: Port) -> None:
    peer = keyed.connect()
    id = peer.recv(ID_LENGTH).decode()
    occupy(stack, keyed.slot, Agreement(Offer(10102, 0, 5000), SessionKey(b"n" * 32)))
    peer.sendall(SESSION.data_proof(id))
    assert is_closed(peer)
    assert len(keyed.slot.pool) == 0


def test_connections_beyond_the_largest_pool_are_rejected(stack: ExitStack) -> None:
    port = Port(stack, min_pool_capacity=1, max_pool_capacity=2)
    occupy(stack, port.slot)
    fill(stack, port.slot, "00000001", "00000002")
    assert is_closed(port.connect())
    assert port.failures == {"pool_full": 1}


def test_a_silent_peer_holds_up_no_other(keyed: Port) -> None:
    silent, other = keyed.connect(), keyed.connect()
    assert silent.recv(ID_LENGTH)
    id = other.recv(ID_LENGTH).decode()
    other.sendall(SESSION.data_proof(id))
    until(lambda: id in keyed.slot.pool)


def test_a_listener_that_stops_still_takes_connections_for_the_sessions_that_drain(
    stack: ExitStack, port: Port
) -> None:
    occupy(stack, port.slot)
    port.listener.stop(0)
    assert port.connect().recv(ID_LENGTH)


def test_a_listener_that_closes_ends_what_is_pending(keyed: Port) -> None:
    peer = keyed.connect()
    assert peer.recv(ID_LENGTH)
    keyed.listener.close()
    assert is_closed(peer)
    late = keyed.connect()
    gevent.sleep(0)
    assert len(keyed.listener._pending) == 0
    late.close()


def test_a_connection_of_a_client_that_leaves_meanwhile_is_closed(keyed: Port) -> None:
    peer = keyed.connect()
    id = peer.recv(ID_LENGTH).decode()
    assert keyed.slot.control
    keyed.slot.release(keyed.slot.control, STOPPING)
    peer.sendall(SESSION.data_proof(id))
    assert is_closed(peer)
    assert len(keyed.slot.pool) == 0

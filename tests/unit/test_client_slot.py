"""The server's place for its client: who gets it, who keeps it, and what launches do while it changes hands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import gevent
import pytest
from gevent import Greenlet, socket

from nodepass.errors import ClosedError, NoDataConnection, RefusedError
from nodepass.net.sockets import Endpoint
from nodepass.server import client_slot as module
from nodepass.server.client_slot import ClientSlot
from nodepass.tunnel.control import CLOSED, STOPPING, Agreement, Ending, ServerControl
from nodepass.wire.auth import Key
from nodepass.wire.signals import LANE, TCP
from tests.unit.controls import V1, V2, Ends, connect_ends, is_closed, read_line, run, until
from tests.unit.servers import PATIENT, a_server_room, fill, make_slot, occupy
from tests.unit.streams import tcp_pair

SOON = 0.05  # seconds for what never happens


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    with a_server_room(monkeypatch) as stack:
        yield stack


@pytest.fixture
def slot(stack: ExitStack) -> ClientSlot:
    return make_slot(stack)[1]


def ask_for(stack: ExitStack, slot: ClientSlot, proven: bool = False) -> tuple[ServerControl, Greenlet[..., object]]:
    """A client that asks for the slot, and its admission, which may have to wait."""
    control = connect_ends(stack).server_control()

    def be_admitted() -> None:
        with slot.admission(control, proven):
            control.agree(V2)

    return control, run(stack, be_admitted)


def serve(stack: ExitStack, ends: Ends, control: ServerControl, agreement: Agreement = V2) -> None:
    """Let both ends of a client's control connection do what they do."""
    run(stack, control.wait_until_ended)
    run(stack, list, ends.client_control(agreement).launches())


def launch(stack: ExitStack, slot: ClientSlot, kind: int = TCP) -> str:
    """The id of the data connection of a launch that succeeds."""
    id, stream = slot.launch(kind, PATIENT)
    stack.callback(stream.close)
    assert stream.peek() is None
    return id


# Admission


def test_a_free_slot_is_given_to_the_first_client(stack: ExitStack, slot: ClientSlot) -> None:
    assert (slot.version, repr(slot)) == (0, "<ClientSlot free>")
    assert not slot.wait_for_client(0)
    _, control = occupy(stack, slot)
    assert slot.control is control
    assert (slot.version, slot.wait_for_client(0)) == (2, True)
    assert repr(slot) == f"<ClientSlot {control!r}>"


def test_a_client_that_is_alive_keeps_its_slot(stack: ExitStack, slot: ClientSlot) -> None:
    ends, incumbent = occupy(stack, slot)
    serve(stack, ends, incumbent)
    _, asking = ask_for(stack, slot)
    with pytest.raises(RefusedError, match="connected and responding") as refused:
        asking.get()
    assert refused.value.reason == "busy"
    assert slot.control is incumbent
    assert incumbent.sock.fileno() >= 0


def test_a_v1_client_is_alive_while_its_kernel_acknowledges(stack: ExitStack, slot: ClientSlot) -> None:
    _, incumbent = occupy(stack, slot, V1)
    _, asking = ask_for(stack, slot)
    with pytest.raises(RefusedError):
        asking.get()
    assert slot.control is incumbent


def test_a_client_that_gives_no_sign_of_life_is_replaced(
    stack: ExitStack, slot: ClientSlot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LIFE_SIGN_WITHIN", SOON)
    _, incumbent = occupy(stack, slot)
    run(stack, incumbent.wait_until_ended)
    control, asking = ask_for(stack, slot)
    asking.get()
    assert slot.control is control
    assert (incumbent.ending.reason, incumbent.vanished) == ("silent", True)
    assert incumbent.sock.fileno() < 0


def test_a_client_that_has_proven_the_key_takes_over_from_one_that_is_alive(stack: ExitStack) -> None:
    _, slot = make_slot(stack, Key("correct horse battery staple"))
    ends, incumbent = occupy(stack, slot)
    serve(stack, ends, incumbent)
    control, asking = ask_for(stack, slot, proven=True)
    asking.get()
    assert slot.control is control
    assert (incumbent.ending.reason, incumbent.vanished) == ("replaced", False)


def test_a_client_that_has_left_while_it_waited_replaces_nothing(stack: ExitStack, slot: ClientSlot) -> None:
    _, incumbent = occupy(stack, slot)
    ends = connect_ends(stack)
    control = ends.server_control()
    ends.client.close()
    until(lambda: control.sock.recv(1) == b"")
    with pytest.raises(ClosedError), slot.admission(control, True):
        pytest.fail("it is admitted")
    assert slot.control is incumbent


def test_a_client_whose_handshake_fails_does_not_get_the_slot(stack: ExitStack, slot: ClientSlot) -> None:
    control = connect_ends(stack).server_control()
    with pytest.raises(BrokenPipeError), slot.admission(control, False):
        raise BrokenPipeError
    assert slot.control is None
    assert not slot.wait_for_client(0)


def test_clients_are_admitted_one_after_another(stack: ExitStack, slot: ClientSlot) -> None:
    """The second finds the first connected, not a slot that both have found free."""
    first = connect_ends(stack).server_control()
    with slot.admission(first, False):
        _, asking = ask_for(stack, slot)
        gevent.sleep(0)
        assert not asking.ready()
        first.agree(V1)
    with pytest.raises(RefusedError):
        asking.get()
    assert slot.control is first


# Release


def test_a_released_slot_is_free_and_its_idle_connections_are_closed(stack: ExitStack, slot: ClientSlot) -> None:
    _, control = occupy(stack, slot)
    [peer] = fill(stack, slot, "00000001")
    slot.release(control, CLOSED)
    assert slot.control is None
    assert not slot.wait_for_client(0)
    assert len(slot.pool) == 0
    assert peer.recv(1) == b""
    assert control.ending == CLOSED


def test_a_client_that_was_replaced_releases_nothing_of_its_successors(stack: ExitStack) -> None:
    _, slot = make_slot(stack, Key("correct horse battery staple"))
    _, first = occupy(stack, slot)
    _, second = occupy(stack, slot)
    fill(stack, slot, "00000001")
    slot.release(first, CLOSED)
    assert slot.control is second
    assert len(slot.pool) == 1


def test_a_slot_that_closes_ends_its_client(stack: ExitStack, slot: ClientSlot) -> None:
    ends, control = occupy(stack, slot)
    slot.close()
    assert control.ending == STOPPING
    assert ends.client.recv(1) == b""
    slot.close()


# Whose data connections are taken


def test_without_a_key_data_connections_must_come_from_the_clients_address(stack: ExitStack, slot: ClientSlot) -> None:
    here, elsewhere = (Endpoint(socket.AF_INET, (host, 4711)) for host in ("127.0.0.1", "127.0.0.2"))
    assert slot.agreement_with(here) is None
    _, control = occupy(stack, slot)
    assert slot.agreement_with(here) is control.agreement
    assert slot.agreement_with(elsewhere) is None


def test_with_a_key_data_connections_may_come_from_anywhere(stack: ExitStack) -> None:
    _, slot = make_slot(stack, Key("correct horse battery staple"))
    elsewhere = Endpoint(socket.AF_INET, ("192.0.2.1", 4711))
    assert slot.agreement_with(elsewhere) is None
    _, control = occupy(stack, slot)
    assert slot.agreement_with(elsewhere) is control.agreement


# Launches


def test_a_launch_names_the_data_connection_that_it_returns(stack: ExitStack, slot: ClientSlot) -> None:
    ends, _ = occupy(stack, slot)
    fill(stack, slot, "00000001")
    assert launch(stack, slot) == "00000001"
    assert read_line(ends.client) == b"//00000001#1\n"


def test_a_launch_waits_for_a_data_connection(stack: ExitStack, slot: ClientSlot) -> None:
    occupy(stack, slot)
    launching = run(stack, launch, stack, slot)
    gevent.sleep(0)
    assert not launching.ready()
    fill(stack, slot, "00000001")
    assert launching.get() == "00000001"


def test_a_launch_gives_up_after_its_timeout(slot: ClientSlot) -> None:
    with pytest.raises(NoDataConnection):
        slot.launch(TCP, SOON)


def test_a_lane_is_not_launched_at_a_v1_client(stack: ExitStack, slot: ClientSlot) -> None:
    occupy(stack, slot, V1)
    [peer] = fill(stack, slot, "00000001")
    with pytest.raises(NoDataConnection, match="no lanes"):
        slot.launch(LANE, PATIENT)
    assert peer.recv(1) == b""


def test_a_launch_that_cannot_be_sent_waits_for_the_next_client(stack: ExitStack, slot: ClientSlot) -> None:
    _, control = occupy(stack, slot)
    control.close(Ending("failed", "it is broken"))
    [lost] = fill(stack, slot, "00000001")
    launching = run(stack, launch, stack, slot)
    assert lost.recv(1) == b"", "its client would wait for it in vain"
    slot.release(control, CLOSED)
    ends, _ = occupy(stack, slot)
    fill(stack, slot, "00000002")
    assert launching.get() == "00000002"
    assert read_line(ends.client) == b"//00000002#1\n"


def test_no_client_is_told_of_a_connection_of_the_client_before_it(stack: ExitStack, slot: ClientSlot) -> None:
    """The connection arrives for a waiting visitor, and before that one runs again the client is replaced."""
    before, old = occupy(stack, slot)
    launching = run(stack, launch, stack, slot)
    after = connect_ends(stack)
    control = after.server_control()
    stream, lost = stack.enter_context(tcp_pair())
    slot.pool.add("00000001", stream)  # from here on no other greenlet runs
    slot.release(old, STOPPING)
    with slot.admission(control, False):
        control.agree(V2)
    assert is_closed(lost), "the client before would wait for it in vain"
    fill(stack, slot, "00000002")
    assert launching.get() == "00000002"
    assert read_line(after.client) == b"//00000002#1\n"
    assert is_closed(before.client)

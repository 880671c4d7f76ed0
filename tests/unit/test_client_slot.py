"""The server's place for its client: who gets it, who keeps it, and what launches do while it changes hands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import gevent
import pytest
from gevent import Greenlet, socket

from nodepass.errors import ClosedError, RefusedError
from nodepass.net.sockets import Endpoint
from nodepass.server.client_slot import ClientSlot, Trial
from nodepass.tunnel import control as module
from nodepass.tunnel.control import CLOSED, STOPPING, Agreement, ServerControl
from nodepass.tunnel.handshake import Candidate
from nodepass.wire.auth import Key, SessionKey
from nodepass.wire.negotiation import Offer
from tests.unit.controls import V1, V2, Ends, connect_ends, read_line, run, until
from tests.unit.keys import KEY as OLD_KEY
from tests.unit.keys import NEXT_KEY as NEW_KEY
from tests.unit.servers import PATIENT, SOON, a_server_room, connect, fill, listen_on, make_clients, occupy

ONE, OTHER = "0" * 16, "1" * 16
"""What clients call themselves."""

SESSION = SessionKey(b"k" * 32)


def agreed(client: str = ONE, key: Key | None = None) -> Agreement:
    """With a v2 client that calls itself so."""
    return Agreement(Offer(10102, 0, 5000), SESSION if key else None, key, client)


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    with a_server_room(monkeypatch) as stack:
        yield stack


@pytest.fixture
def slot(stack: ExitStack) -> ClientSlot:
    return make_clients(stack)[1].slots[0]


def from_elsewhere(stack: ExitStack) -> Ends:
    """A connection from another address than the others'."""
    listener = listen_on(stack)
    client = connect(stack, listener, "127.0.0.2")
    sock, _ = listener.accept()
    return Ends(stack.enter_context(sock), client)


def ask_for(
    stack: ExitStack, slot: ClientSlot, agreement: Agreement = V2, ends: Ends | None = None
) -> tuple[ServerControl, Greenlet[..., object]]:
    """A client that asks for the slot, and its admission, which may have to wait."""
    control = (ends or connect_ends(stack)).server_control()

    def be_admitted() -> None:
        with slot.admission(Candidate(control, agreement.client, agreement.key)):
            control.agree(agreement)

    return control, run(stack, be_admitted)


def serve(stack: ExitStack, ends: Ends, control: ServerControl, agreement: Agreement = V2) -> None:
    """Let both ends of a client's control connection do what they do."""
    run(stack, control.wait_until_ended)
    run(stack, list, ends.client_control(agreement).signals(lambda: True))


# Admission


def test_a_free_slot_is_given_to_the_first_client(stack: ExitStack, slot: ClientSlot) -> None:
    assert (slot.version, repr(slot)) == (0, "<ClientSlot free>")
    _, control = occupy(stack, slot)
    assert slot.control is control
    assert slot.version == 2
    assert repr(slot) == f"<ClientSlot {control!r}>"


def test_another_client_is_refused_while_the_first_is_alive(stack: ExitStack, slot: ClientSlot) -> None:
    ends, incumbent = occupy(stack, slot, agreed(ONE))
    serve(stack, ends, incumbent)
    _, asking = ask_for(stack, slot, agreed(OTHER))
    with pytest.raises(RefusedError, match="connected and responding") as refused:
        asking.get()
    assert refused.value.reason == "busy"
    assert slot.control is incumbent
    assert incumbent.sock.fileno() >= 0


def test_another_client_is_refused_with_a_key_as_well(stack: ExitStack) -> None:
    """Having the key is no right to another's place."""
    slot = make_clients(stack, OLD_KEY)[1].slots[0]
    ends, incumbent = occupy(stack, slot, agreed(ONE, OLD_KEY))
    serve(stack, ends, incumbent)
    _, asking = ask_for(stack, slot, agreed(OTHER, OLD_KEY))
    with pytest.raises(RefusedError):
        asking.get()
    assert slot.control is incumbent


def test_a_v1_client_is_alive_while_its_kernel_acknowledges(stack: ExitStack, slot: ClientSlot) -> None:
    _, incumbent = occupy(stack, slot, V1)
    _, asking = ask_for(stack, slot, agreed())
    with pytest.raises(RefusedError):
        asking.get()
    assert slot.control is incumbent


def test_a_client_that_gives_no_sign_of_life_is_replaced_and_told_so(
    stack: ExitStack, slot: ClientSlot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LIFE_SIGN_WITHIN", SOON)
    ends, incumbent = occupy(stack, slot, agreed(ONE))
    run(stack, incumbent.wait_until_ended)
    control, asking = ask_for(stack, slot, agreed(OTHER))
    asking.get()
    assert slot.control is control
    assert (incumbent.ending.reason, incumbent.vanished) == ("silent", True)
    assert [read_line(ends.client) for _ in range(3)] == [b"//beat?idle=0\n", b"//bye?reason=replaced\n", b""]


def test_a_distant_client_has_four_round_trips_to_show_that_it_is_alive(
    stack: ExitStack, slot: ClientSlot, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience: list[float] = []
    _, incumbent = occupy(stack, slot, agreed(ONE))
    monkeypatch.setattr(incumbent, "shows_life", lambda seconds: patience.append(seconds) or True)
    for incumbent.round_trip in (None, 0.01, 0.7):
        with pytest.raises(RefusedError):
            ask_for(stack, slot, agreed(OTHER))[1].get()
    assert patience == [1.0, 1.0, pytest.approx(2.8)]


def test_the_same_client_takes_its_place_again_at_once(stack: ExitStack, slot: ClientSlot) -> None:
    """It is not asked whether its old connection is alive; that one ends before the offer is written."""
    ends, incumbent = occupy(stack, slot, agreed())
    with slot.admission(Candidate(connect_ends(stack).server_control(), ONE, None)):
        assert slot.control is None
        assert read_line(ends.client) == b"//bye?reason=replaced\n"
        assert ends.client.recv(1) == b""
    assert (incumbent.ending.reason, incumbent.vanished) == ("returned", False)


def test_without_a_key_only_a_client_of_the_same_address_is_the_same(stack: ExitStack, slot: ClientSlot) -> None:
    """What a client calls itself stands in the clear."""
    ends, incumbent = occupy(stack, slot, agreed())
    serve(stack, ends, incumbent)
    _, asking = ask_for(stack, slot, agreed(), from_elsewhere(stack))
    with pytest.raises(RefusedError) as refused:
        asking.get()
    assert refused.value.reason == "busy"


def test_with_a_key_the_same_client_may_come_again_from_anywhere(stack: ExitStack) -> None:
    slot = make_clients(stack, OLD_KEY)[1].slots[0]
    ends, incumbent = occupy(stack, slot, agreed(ONE, OLD_KEY))
    serve(stack, ends, incumbent)
    control, asking = ask_for(stack, slot, agreed(ONE, OLD_KEY), from_elsewhere(stack))
    asking.get()
    assert slot.control is control
    assert incumbent.ending.reason == "returned"


def test_a_client_that_has_no_name_for_itself_is_never_the_same(stack: ExitStack, slot: ClientSlot) -> None:
    """A v1 client has none, and two of them are not one."""
    _, incumbent = occupy(stack, slot, V1)
    _, asking = ask_for(stack, slot, V1)
    with pytest.raises(RefusedError):
        asking.get()
    assert slot.control is incumbent


@pytest.mark.parametrize("client", [ONE, OTHER])
def test_a_client_that_has_left_while_it_waited_replaces_nothing(
    stack: ExitStack, slot: ClientSlot, monkeypatch: pytest.MonkeyPatch, client: str
) -> None:
    monkeypatch.setattr(module, "LIFE_SIGN_WITHIN", SOON)
    _, incumbent = occupy(stack, slot, agreed(ONE))
    ends = connect_ends(stack)
    control = ends.server_control()
    ends.client.close()
    until(lambda: control.sock.recv(1) == b"")
    with pytest.raises(ClosedError), slot.admission(Candidate(control, client, None)):
        pytest.fail("it is admitted")
    assert slot.control is incumbent
    assert not incumbent.ending.reason


def test_a_client_whose_handshake_fails_does_not_get_the_slot(stack: ExitStack, slot: ClientSlot) -> None:
    control = connect_ends(stack).server_control()
    with pytest.raises(BrokenPipeError), slot.admission(Candidate(control, ONE, None)):
        raise BrokenPipeError
    assert slot.control is None


def test_clients_are_admitted_one_after_another(stack: ExitStack, slot: ClientSlot) -> None:
    """The second finds the first connected, not a slot that both have found free."""
    first = connect_ends(stack).server_control()
    with slot.admission(Candidate(first, "", None)):
        _, asking = ask_for(stack, slot, agreed(OTHER))
        gevent.sleep(0)
        assert not asking.ready()
        first.agree(V1)
    with pytest.raises(RefusedError):
        asking.get()
    assert slot.control is first


def test_a_client_is_not_admitted_by_a_slot_that_stops_while_it_waits(
    stack: ExitStack, slot: ClientSlot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would be the client of a tunnel that is not served any more."""
    monkeypatch.setattr(module, "LIFE_SIGN_WITHIN", SOON)
    occupy(stack, slot, agreed(ONE))
    _, asking = ask_for(stack, slot, agreed(OTHER))
    gevent.sleep(0)
    slot.close()
    with pytest.raises(RefusedError) as refused:
        asking.get()
    assert refused.value.reason == "shutdown"
    assert slot.control is None


def test_a_slot_that_stops_refuses_clients_and_keeps_the_one_that_is_connected(
    stack: ExitStack, slot: ClientSlot
) -> None:
    _, control = occupy(stack, slot, agreed())
    slot.stop(0)
    _, asking = ask_for(stack, slot, agreed())
    with pytest.raises(RefusedError) as refused:
        asking.get()
    assert refused.value.reason == "shutdown"
    assert slot.control is control


def test_one_probe_serves_all_that_ask_and_the_same_client_does_not_wait_for_it(
    stack: ExitStack, slot: ClientSlot
) -> None:
    """A crowd of strangers, each with a probe of its own, would keep a returning client out for as many round trips."""
    ends, incumbent = occupy(stack, slot, agreed(ONE))
    asking = [ask_for(stack, slot, agreed(OTHER))[1] for _ in range(10)]
    assert read_line(ends.client) == b"//beat?idle=0\n"
    _, returned = occupy(stack, slot, agreed(ONE))
    assert slot.control is returned
    assert not any(each.ready() for each in asking)
    ends.client.settimeout(0)
    assert read_line(ends.client) == b"//bye?reason=replaced\n"
    assert incumbent.ending.reason == "returned"


def test_a_client_that_returns_all_the_time_holds_two_connections(stack: ExitStack, slot: ClientSlot) -> None:
    """It need not end its side of those that it has left: without a key, that may be a stranger."""
    controls = [occupy(stack, slot, agreed())[1] for _ in range(10)]
    assert sum(control.sock.fileno() >= 0 for control in controls) == 2


# A v1 client on trial


@contextmanager
def on_trial(stack: ExitStack, slot: ClientSlot) -> Iterator[tuple[Ends, Trial]]:
    ends = connect_ends(stack)
    control = ends.server_control()
    with slot.trial(control, control.agree(V1)) as trial:
        yield ends, trial


def test_a_client_on_trial_holds_no_place(stack: ExitStack, slot: ClientSlot) -> None:
    with on_trial(stack, slot) as (_, trial):
        assert slot.control is None
        assert slot.trials == [trial]
        _, control = occupy(stack, slot, agreed())
        assert not slot.promote(trial)
        assert not trial.wait(PATIENT)
        assert slot.control is control
    assert not slot.trials


def test_any_number_may_be_on_trial_and_the_youngest_of_an_address_counts(stack: ExitStack, slot: ClientSlot) -> None:
    with on_trial(stack, slot) as (_, first), on_trial(stack, slot) as (_, second):
        assert slot.trials == [first, second]
        peer = second.control.endpoint
        assert slot.trial_of(peer) is second
        assert slot.trial_of(Endpoint(peer.family, ("127.0.0.2", peer.sockaddr[1]))) is None


def test_a_client_on_trial_becomes_the_client_once(stack: ExitStack, slot: ClientSlot) -> None:
    with on_trial(stack, slot) as (_, trial):
        waiting = run(stack, trial.wait, PATIENT)
        assert slot.promote(trial)
        assert slot.promote(trial), "its other data connections ask as well"
        assert waiting.get() is True
    assert slot.control is trial.control


def test_no_client_is_on_trial_where_the_place_is_taken(stack: ExitStack, slot: ClientSlot) -> None:
    ends, incumbent = occupy(stack, slot, agreed())
    serve(stack, ends, incumbent)
    with pytest.raises(RefusedError) as refused, on_trial(stack, slot):
        pytest.fail("it is on trial")
    assert refused.value.reason == "busy"


def test_a_client_on_trial_takes_the_place_of_one_that_does_not_respond_with_its_first_data_connection(
    stack: ExitStack, slot: ClientSlot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LIFE_SIGN_WITHIN", SOON)
    _, incumbent = occupy(stack, slot, agreed())
    with on_trial(stack, slot) as (_, trial):
        assert slot.control is incumbent
        assert slot.promote(trial)
    assert slot.control is trial.control
    assert incumbent.ending.reason == "silent"


def test_a_client_that_comes_while_one_on_trial_takes_a_place_finds_that_one(
    stack: ExitStack, slot: ClientSlot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked in its turn, and not replaced because the one before it was silent."""
    monkeypatch.setattr(module, "LIFE_SIGN_WITHIN", SOON)
    occupy(stack, slot, agreed(ONE))
    with on_trial(stack, slot) as (_, trial):
        _, asking = ask_for(stack, slot, agreed(OTHER))
        gevent.sleep(0)
        assert slot.promote(trial)
        with pytest.raises(RefusedError):
            asking.get()
        assert slot.control is trial.control


def test_of_two_clients_that_take_the_place_of_a_silent_one_only_the_first_has_it(
    stack: ExitStack, slot: ClientSlot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others run while the lanes of the silent one end; a client that was forgotten then would never connect again."""
    monkeypatch.setattr(module, "LIFE_SIGN_WITHIN", SOON)
    occupy(stack, slot, agreed(ONE))
    with on_trial(stack, slot) as (_, trial), monkeypatch.context() as patch:
        patch.setattr(slot._flows, "end_all", lambda _: occupy(stack, slot, agreed(OTHER)))
        assert not slot.promote(trial)
        assert trial.is_over
    assert slot.control
    assert slot.agreement == agreed(OTHER)


def test_a_client_on_trial_that_takes_the_place_first_keeps_it(
    stack: ExitStack, slot: ClientSlot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LIFE_SIGN_WITHIN", SOON)
    occupy(stack, slot, agreed(ONE))
    with on_trial(stack, slot) as (_, trial), monkeypatch.context() as patch:
        patch.setattr(slot._flows, "end_all", lambda _: slot.promote(trial))
        with pytest.raises(RefusedError) as refused:
            occupy(stack, slot, agreed(OTHER))
        assert refused.value.reason == "busy"
        assert slot.control is trial.control


@pytest.mark.parametrize("end", ["stop", "close"])
def test_no_client_on_trial_becomes_the_client_of_a_slot_that_stops(
    stack: ExitStack, slot: ClientSlot, end: str
) -> None:
    with on_trial(stack, slot) as (_, trial):
        slot.close() if end == "close" else slot.stop(0)
        assert not slot.promote(trial)
        assert slot.control is None
        assert not trial.wait(PATIENT)


def test_no_client_whose_trial_is_over_becomes_the_client(stack: ExitStack, slot: ClientSlot) -> None:
    """It may have spoken in the very moment in which its data connection came."""
    with on_trial(stack, slot) as (_, trial):
        trial.end(False)
        assert not slot.promote(trial)
    assert slot.control is None


def test_no_client_on_trial_becomes_the_client_where_a_key_is_required_now(stack: ExitStack, slot: ClientSlot) -> None:
    with on_trial(stack, slot) as (_, trial):
        slot.set_keys([NEW_KEY])
        assert not slot.promote(trial)
        assert not trial.wait(PATIENT)
    assert slot.control is None


def test_a_client_whose_service_ends_in_the_moment_of_its_promotion_leaves_the_place_free(
    stack: ExitStack, slot: ClientSlot
) -> None:
    def wait() -> None:
        with on_trial(stack, slot) as (_, trial):
            trial.wait(PATIENT)

    waiting = run(stack, wait)
    until(lambda: slot.trials)
    waiting.kill(block=False)  # as where too many connections are pending
    assert slot.promote(slot.trials[0])
    waiting.join()
    assert slot.control is None


# Release


def test_a_released_slot_is_free_and_its_idle_connections_are_closed(stack: ExitStack, slot: ClientSlot) -> None:
    _, control = occupy(stack, slot)
    [peer] = fill(stack, slot, "00000001")
    slot.release(control, CLOSED)
    assert slot.control is None
    assert len(slot.pool) == 0
    assert peer.recv(1) == b""
    assert control.ending == CLOSED


def test_a_client_that_was_replaced_releases_nothing_of_its_successors(stack: ExitStack, slot: ClientSlot) -> None:
    _, first = occupy(stack, slot, agreed())
    _, second = occupy(stack, slot, agreed())
    fill(stack, slot, "00000001")
    slot.release(first, CLOSED)
    assert slot.control is second
    assert len(slot.pool) == 1


def test_a_slot_that_closes_ends_its_client_and_says_why(stack: ExitStack, slot: ClientSlot) -> None:
    ends, control = occupy(stack, slot)
    slot.close()
    assert control.ending == STOPPING
    assert read_line(ends.client) == b"//bye?reason=shutdown\n"
    assert ends.client.recv(1) == b""
    slot.close()


def test_a_v1_client_is_not_told_why(stack: ExitStack, slot: ClientSlot) -> None:
    ends, _ = occupy(stack, slot, V1)
    slot.close()
    assert ends.client.recv(1) == b""


# Keys


@pytest.mark.parametrize(
    ("keys", "stays"), [([NEW_KEY, OLD_KEY], True), ([NEW_KEY], False), ([], False)], ids=["rotation", "gone", "none"]
)
def test_a_client_stays_while_the_key_that_it_has_proven_is_there(
    stack: ExitStack, keys: list[Key], stays: bool
) -> None:
    slot = make_clients(stack, OLD_KEY)[1].slots[0]
    ends, control = occupy(stack, slot, agreed(ONE, OLD_KEY))
    assert slot.set_keys(keys) is not stays
    assert (OLD_KEY in slot.keys) is stays
    assert (slot.control is control) is stays
    if not stays:
        assert read_line(ends.client) == b"//bye?reason=reload\n"
        assert control.ending.reason == "reload"


def test_a_client_without_a_key_ends_where_one_is_required_now(stack: ExitStack, slot: ClientSlot) -> None:
    _, control = occupy(stack, slot, agreed())
    slot.set_keys([])
    assert slot.control is control
    slot.set_keys([NEW_KEY])
    assert slot.control is None


def test_a_client_whose_key_goes_while_it_waits_for_its_turn_is_not_admitted(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LIFE_SIGN_WITHIN", SOON)
    slot = make_clients(stack, OLD_KEY)[1].slots[0]
    occupy(stack, slot, agreed(ONE, OLD_KEY))
    _, asking = ask_for(stack, slot, agreed(OTHER, OLD_KEY))
    gevent.sleep(0)
    slot.set_keys([NEW_KEY])
    with pytest.raises(RefusedError) as refused:
        asking.get()
    assert refused.value.reason == "key-mismatch"
    assert slot.control is None


@pytest.mark.parametrize(("change", "reason"), [("keys", "key-mismatch"), ("stop", "shutdown")])
def test_a_client_is_not_admitted_where_that_changes_while_the_lanes_of_the_one_before_it_end(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, change: str, reason: str
) -> None:
    monkeypatch.setattr(module, "LIFE_SIGN_WITHIN", SOON)
    slot = make_clients(stack, OLD_KEY)[1].slots[0]
    occupy(stack, slot, agreed(ONE, OLD_KEY))

    def end_lanes(*_: object) -> None:
        slot.set_keys([NEW_KEY]) if change == "keys" else slot.stop(0)

    with monkeypatch.context() as ending:
        ending.setattr(slot._flows, "end_all", end_lanes)
        with pytest.raises(RefusedError) as refused:
            occupy(stack, slot, agreed(OTHER, OLD_KEY))
    assert refused.value.reason == reason
    assert slot.control is None


# Whose data connections are taken


def test_without_a_key_data_connections_must_come_from_the_clients_address(stack: ExitStack, slot: ClientSlot) -> None:
    here, elsewhere = (Endpoint(socket.AF_INET, (host, 4711)) for host in ("127.0.0.1", "127.0.0.2"))
    assert slot.agreement_with(here) is None
    _, control = occupy(stack, slot)
    assert slot.agreement_with(here) is control.agreement
    assert slot.agreement_with(elsewhere) is None


def test_with_a_key_data_connections_may_come_from_anywhere(stack: ExitStack) -> None:
    slot = make_clients(stack, OLD_KEY)[1].slots[0]
    elsewhere = Endpoint(socket.AF_INET, ("192.0.2.1", 4711))
    assert slot.agreement_with(elsewhere) is None
    _, control = occupy(stack, slot, agreed(ONE, OLD_KEY))
    assert slot.agreement_with(elsewhere) is control.agreement

"""The clients of a tunnel: which slot each gets, and which of them the sessions go to."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

import gevent
import pytest

from nodepass.errors import NoDataConnection, NoTarget, RefusedError
from nodepass.server import clients as module
from nodepass.server.clients import Clients
from nodepass.server.udp_flows import VisitorFlows
from nodepass.tunnel import control as control_module
from nodepass.tunnel.control import CLOSED, STOPPING, Agreement, Ending, ServerControl
from nodepass.tunnel.handshake import Candidate
from nodepass.wire.auth import Key, SessionKey
from nodepass.wire.negotiation import Offer
from nodepass.wire.signals import LANE, TCP, BeatAnswer
from tests.unit.controls import V1, V2, Ends, connect_ends, is_closed, read_line, run, until
from tests.unit.keys import KEY as OLD_KEY
from tests.unit.keys import NEXT_KEY as NEW_KEY
from tests.unit.servers import PATIENT, SOON, a_server_room, fill, make_clients, occupy
from tests.unit.streams import tcp_pair


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    with a_server_room(monkeypatch) as stack:
        yield stack


@pytest.fixture
def clients(stack: ExitStack) -> Clients:
    return make_clients(stack)[1]


def launch(stack: ExitStack, clients: Clients, kind: int = TCP) -> str:
    """The id of the data connection of a launch that succeeds."""
    id, stream, _ = clients.launch(kind, PATIENT)
    stack.callback(stream.close)
    assert stream.peek() is None
    return id


# Launches


def test_a_launch_names_the_data_connection_that_it_returns(stack: ExitStack, clients: Clients) -> None:
    ends, _ = occupy(stack, clients)
    fill(stack, clients.slots[0], "00000001")
    assert launch(stack, clients) == "00000001"
    assert read_line(ends.client) == b"//00000001#1\n"


def test_a_launch_waits_for_a_data_connection(stack: ExitStack, clients: Clients) -> None:
    occupy(stack, clients)
    launching = run(stack, launch, stack, clients)
    gevent.sleep(0)
    assert not launching.ready()
    fill(stack, clients.slots[0], "00000001")
    assert launching.get() == "00000001"


def test_a_launch_gives_up_after_its_timeout(clients: Clients) -> None:
    with pytest.raises(NoDataConnection):
        clients.launch(TCP, SOON)


def test_a_lane_is_not_launched_at_a_v1_client(stack: ExitStack, clients: Clients) -> None:
    occupy(stack, clients, V1)
    [peer] = fill(stack, clients.slots[0], "00000001")
    with pytest.raises(NoDataConnection, match="no lanes"):
        clients.launch(LANE, PATIENT)
    assert peer.recv(1) == b""


def test_a_launch_that_cannot_be_sent_waits_for_the_next_client(stack: ExitStack, clients: Clients) -> None:
    _, control = occupy(stack, clients)
    control.close(Ending("failed", "it is broken"))
    [lost] = fill(stack, clients.slots[0], "00000001")
    launching = run(stack, launch, stack, clients)
    assert lost.recv(1) == b"", "its client would wait for it in vain"
    clients.slots[0].release(control, CLOSED)
    ends, _ = occupy(stack, clients)
    fill(stack, clients.slots[0], "00000002")
    assert launching.get() == "00000002"
    assert read_line(ends.client) == b"//00000002#1\n"


def test_no_client_is_told_of_a_connection_of_the_client_before_it(stack: ExitStack, clients: Clients) -> None:
    """The connection arrives for a waiting visitor, and before that one runs again the client is replaced."""
    before, old = occupy(stack, clients)
    launching = run(stack, launch, stack, clients)
    after = connect_ends(stack)
    control = after.server_control()
    stream, lost = stack.enter_context(tcp_pair())
    clients.slots[0].pool.add("00000001", stream)  # from here on no other greenlet runs
    clients.slots[0].release(old, STOPPING)
    with clients.admission(Candidate(control, "", None)):
        control.agree(V2)
    assert is_closed(lost), "the client before would wait for it in vain"
    fill(stack, clients.slots[0], "00000002")
    assert launching.get() == "00000002"
    assert read_line(after.client) == b"//00000002#1\n"
    assert is_closed(before.client)


@pytest.mark.parametrize("wants", [True, False])
def test_a_launch_carries_the_visitors_addresses_where_the_client_wants_them(
    stack: ExitStack, clients: Clients, wants: bool
) -> None:
    ends, _ = occupy(stack, clients, Agreement(Offer(10102, 0, 5000), wants_addresses=wants))
    fill(stack, clients.slots[0], "00000001")
    stream, visitor = stack.enter_context(tcp_pair())
    _, data, _ = clients.launch(TCP, PATIENT, stream.sock)
    stack.callback(data.close)
    source, target = (f"127.0.0.1:{name[1]}" for name in (visitor.getsockname(), visitor.getpeername()))
    query = f"?from={source}&to={target}" if wants else ""
    assert read_line(ends.client) == f"//00000001{query}#1\n".encode()


def test_a_launch_for_a_visitor_that_has_left_carries_no_addresses(stack: ExitStack, clients: Clients) -> None:
    ends, _ = occupy(stack, clients, Agreement(Offer(10102, 0, 5000), wants_addresses=True))
    fill(stack, clients.slots[0], "00000001")
    stream, _ = stack.enter_context(tcp_pair())
    stream.close()
    _, data, _ = clients.launch(TCP, PATIENT, stream.sock)
    stack.callback(data.close)
    assert read_line(ends.client) == b"//00000001#1\n"


# Several clients


def agreed(client: str, key: Key | None = None) -> Agreement:
    """With a v2 client that calls itself so."""
    return Agreement(Offer(10102, 0, 5000), SessionKey(b"k" * 32) if key else None, key, client)


class Several:
    """The clients of one tunnel, and their data connections."""

    def __init__(self, stack: ExitStack, number: int, **settings: object) -> None:
        """Without data connections at first."""
        self._stack = stack
        self.common, self.clients = make_clients(stack, clients=number, **settings)
        self.controls: list[ServerControl] = []
        self.ends: list[Ends] = []
        for each in range(number):
            ends, control = occupy(stack, self.clients, agreed(str(each)))
            self.ends.append(ends)
            self.controls.append(control)
        self.slots = self.clients.slots

    def fill(self, *numbers: int) -> None:
        """Give each client so many more data connections."""
        for slot, number in zip(self.slots, numbers, strict=True):
            for _ in range(number):
                fill(self._stack, slot, os.urandom(4).hex())

    def launch(self, kind: int = TCP, timeout: float = PATIENT) -> int:
        """A session that goes on; the number of the client that serves it."""
        _, stream, slot = self.clients.launch(kind, timeout)
        self._stack.callback(stream.close)
        slot.sessions += 1
        return self.slots.index(slot)

    def answer(self, client: int, ok: bool = True) -> None:
        """What this client says to a heartbeat."""
        self.controls[client]._take_answer(BeatAnswer(ok))


def test_each_client_gets_a_slot_of_its_own_and_keeps_it(stack: ExitStack) -> None:
    several = Several(stack, 3)
    assert [slot.control for slot in several.slots] == several.controls
    _, again = occupy(stack, several.clients, agreed("1"))
    assert several.slots[1].control is again
    several.slots[0].release(several.controls[0], CLOSED)
    _, fourth = occupy(stack, several.clients, agreed("another"))
    assert several.slots[0].control is fourth
    assert "3 of 3 clients" in several.clients.describe()


@pytest.mark.parametrize(("number", "limits"), [(1, (2, 16)), (3, (2, 5)), (16, (1, 1)), (20, (1, 1))])
def test_all_pools_together_keep_to_the_largest_capacity(
    stack: ExitStack, number: int, limits: tuple[int, int]
) -> None:
    _, clients = make_clients(stack, clients=number, min_pool_capacity=2, max_pool_capacity=16)
    capacities = [slot.pool._capacity for slot in clients.slots]
    assert {(each.lowest, each.highest) for each in capacities} == {limits}


def test_one_more_client_is_refused_while_all_respond(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    several = Several(stack, 2)
    for control in several.controls:
        monkeypatch.setattr(control, "shows_life", lambda _: True)
    with pytest.raises(RefusedError) as refused:
        occupy(stack, several.clients, agreed("another"))
    assert refused.value.reason == "busy"
    assert [slot.control for slot in several.slots] == several.controls


@pytest.mark.parametrize("silent", [0, 1, 2])
def test_one_more_client_gets_the_slot_of_the_one_that_does_not_respond(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, silent: int
) -> None:
    several = Several(stack, 3)
    for number, control in enumerate(several.controls):
        monkeypatch.setattr(control, "shows_life", lambda _, number=number: number != silent)
    _, new = occupy(stack, several.clients, agreed("another"))
    expected = several.controls.copy()
    expected[silent] = new
    assert [slot.control for slot in several.slots] == expected


def test_clients_that_come_at_once_get_the_slots_that_there_are(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two choose the same free slot; the one that does not get it takes another."""
    _, clients = make_clients(stack, clients=3)
    monkeypatch.setattr(ServerControl, "shows_life", lambda *_: True)

    def come(name: str) -> str:
        try:
            occupy(stack, clients, agreed(name))
        except RefusedError as error:
            return error.reason
        return ""

    coming = [run(stack, come, str(each)) for each in range(5)]
    assert sorted(str(each.get()) for each in coming) == ["", "", "", "busy", "busy"]
    assert len(clients.connected) == 3


@pytest.mark.parametrize(
    ("spread", "order"),
    [("least", [0, 1, 2, 0, 1, 2]), ("round", [0, 1, 2, 0, 1, 2]), ("first", [0, 0, 0, 0, 0, 0])],
)
def test_sessions_are_spread(stack: ExitStack, spread: str, order: list[int]) -> None:
    several = Several(stack, 3, spread=spread)
    several.fill(6, 6, 6)
    assert [several.launch() for _ in order] == order


def test_the_client_with_the_fewest_sessions_is_preferred(stack: ExitStack) -> None:
    several = Several(stack, 3)
    several.fill(9, 9, 9)
    several.slots[0].sessions, several.slots[1].sessions = 3, 2
    assert [several.launch() for _ in range(6)] == [2, 2, 1, 2, 0, 1]


def test_the_first_client_is_the_one_that_is_connected_longest_and_not_one_that_has_come_back(stack: ExitStack) -> None:
    several = Several(stack, 2, spread="first")
    several.fill(1, 2)
    assert several.launch() == 0
    occupy(stack, several.clients, agreed("0"))
    several.fill(2, 0)
    assert [several.launch(), several.launch()] == [1, 1]
    assert several.launch() == 0, "the other has no data connection"


def test_a_client_without_data_connections_is_passed_over(stack: ExitStack) -> None:
    several = Several(stack, 2)
    several.fill(0, 2)
    assert [several.launch(), several.launch()] == [1, 1]
    assert several.common.stats.found_empty == 0


@pytest.mark.parametrize("spread", ["least", "round", "first"])
def test_a_launch_calls_as_many_functions_with_eight_clients_as_with_two(stack: ExitStack, spread: str) -> None:
    """Each session asks which client it goes to, so what is asked of every client must not be Python's."""
    counts = []
    for number in (2, 8):
        several = Several(stack, number, spread=spread)
        several.fill(*([2] * number))
        several.launch()
        counts.append(count_calls(several.launch))
    assert counts[0] == counts[1] > 0


def test_flows_count_as_sessions_do_where_the_least_busy_client_is_chosen(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = Several(stack, 2, spread="least")
    several.fill(3, 3)
    monkeypatch.setattr(VisitorFlows, "has_lanes", True)
    monkeypatch.setattr(several.clients.flows, "count_by_slot", lambda: Counter({several.slots[0]: 2}))
    assert [several.launch() for _ in range(3)] == [1, 1, 0]


def count_calls(work: Callable[[], object]) -> int:
    """How many functions of Python this calls."""
    calls: list[str] = []
    sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_name) if event == "call" else None)
    try:
        work()
    finally:
        sys.setprofile(None)
    return len(calls)


def test_a_session_that_waits_gets_the_first_connection_of_any_client(stack: ExitStack) -> None:
    several = Several(stack, 3)
    launching = run(stack, several.launch)
    gevent.sleep(0)
    assert not launching.ready()
    several.fill(0, 1, 0)
    assert launching.get() == 1
    assert several.common.stats.found_empty == 1


def test_a_session_that_waits_moves_on_when_a_client_leaves(stack: ExitStack) -> None:
    several = Several(stack, 2)
    launching = run(stack, several.launch)
    gevent.sleep(0)
    several.slots[0].release(several.controls[0], CLOSED)
    several.fill(0, 1)
    assert launching.get() == 1


def test_a_client_whose_target_does_not_answer_serves_no_session(stack: ExitStack) -> None:
    several = Several(stack, 2)
    several.fill(4, 4)
    several.answer(0, ok=False)
    assert [several.launch(), several.launch()] == [1, 1]
    several.answer(1, ok=False)
    with pytest.raises(NoTarget):
        several.launch()
    several.answer(0)
    several.slots[0].sessions += 10
    assert several.launch() == 0


def test_a_client_without_tcp_serves_lanes_only_and_where_none_has_it_no_data_connection_is_used(
    stack: ExitStack,
) -> None:
    several = Several(stack, 2)
    several.fill(0, 2)
    _, several.controls[0] = occupy(stack, several.clients, replace(agreed("0"), off="tcp"))
    several.fill(3, 0)
    assert [several.launch(), several.launch()] == [1, 1]
    assert several.launch(LANE) == 0
    _, several.controls[1] = occupy(stack, several.clients, replace(agreed("1"), off="tcp"))
    several.fill(0, 2)
    with pytest.raises(NoTarget, match="TCP=off"):
        several.launch()
    assert len(several.slots[0].pool) == 2
    assert several.launch(LANE) == 0


def test_a_client_without_udp_serves_no_lanes_and_where_none_has_it_no_data_connection_is_used(
    stack: ExitStack,
) -> None:
    several = Several(stack, 2)
    _, several.controls[0] = occupy(stack, several.clients, replace(agreed("0"), off="udp"))
    several.fill(3, 3)
    assert [several.launch(LANE), several.launch(LANE)] == [1, 1]
    assert several.launch() == 0
    _, several.controls[1] = occupy(stack, several.clients, replace(agreed("1"), off="udp"))
    with pytest.raises(NoTarget, match="UDP=off"):
        several.launch(LANE)
    assert len(several.slots[0].pool) == 2


def without_tcp(stack: ExitStack, several: Several, client: int) -> None:
    """This client comes again, with TCP=off."""
    _, several.controls[client] = occupy(stack, several.clients, replace(agreed(str(client)), off="tcp"))


def test_a_session_that_waits_gets_no_connection_of_a_client_without_tcp_and_a_lane_gets_it(stack: ExitStack) -> None:
    several = Several(stack, 2)
    without_tcp(stack, several, 0)
    launching, carrying = run(stack, several.launch), run(stack, several.launch, LANE)
    gevent.sleep(0)
    several.fill(2, 0)
    assert carrying.get() == 0
    assert not launching.ready()
    assert len(several.slots[0].pool) == 1
    several.fill(0, 1)
    assert launching.get() == 1


def test_of_the_sessions_that_a_client_can_serve_the_one_that_has_waited_longest_is_first(stack: ExitStack) -> None:
    several = Several(stack, 2)
    kinds = [LANE, TCP, TCP, LANE]
    waiting = []
    for kind in kinds:
        waiting.append(run(stack, several.launch, kind))
        gevent.sleep(0)
    for each in waiting:
        several.fill(0, 1)
        assert each.get() == 1


def test_a_doubted_client_serves_the_sessions_that_the_others_cannot(stack: ExitStack) -> None:
    """It is the only one with TCP, and a lane goes to the other."""
    several = Several(stack, 2)
    without_tcp(stack, several, 1)
    several.fill(2, 2)
    several.slots[0].doubt()
    assert [several.launch(), several.launch(LANE)] == [0, 1]


def test_a_visitor_is_refused_where_no_target_of_a_client_with_tcp_answers(stack: ExitStack) -> None:
    several = Several(stack, 2)
    without_tcp(stack, several, 1)
    several.answer(0, ok=False)
    with pytest.raises(NoTarget, match="target does not answer"):
        several.launch()
    several.answer(1, ok=False)
    several.fill(0, 1)
    assert several.launch(LANE) == 1, "heartbeats say nothing of a target of UDP"


@pytest.mark.parametrize("number", [1, 2])
def test_a_session_that_waits_is_refused_once_no_client_can_serve_it(stack: ExitStack, number: int) -> None:
    several = Several(stack, number)

    def find_reason() -> str:
        with pytest.raises(NoTarget) as refused:
            several.launch()
        return refused.value.reason

    refused = run(stack, find_reason)
    gevent.sleep(0)
    for client in range(number):
        without_tcp(stack, several, client)
    assert refused.get() == "tcp_off"
    carrying = run(stack, several.launch, LANE)
    gevent.sleep(0)
    several.fill(1, *[0] * (number - 1))
    assert carrying.get() == 0


def test_a_session_waits_for_a_good_client_rather_than_to_use_a_bad_one(stack: ExitStack) -> None:
    """And takes the bad one once it is the only one, or is good again."""
    for change in ("left", "answers"):
        several = Several(stack, 2)
        several.slots[0].doubt()
        launching = run(stack, several.launch)
        gevent.sleep(0)
        several.fill(1, 0)
        gevent.sleep(0)
        assert not launching.ready()
        if change == "left":
            several.slots[1].release(several.controls[1], CLOSED)
        else:
            several.answer(0)
        assert launching.get() == 0


def test_a_client_one_of_whose_idle_connections_is_dead_gets_no_session_until_it_answers(stack: ExitStack) -> None:
    """The first sign that its machine has died, long before a heartbeat is missed."""
    several = Several(stack, 2)
    several.fill(3, 3)
    [dead] = fill(stack, several.slots[0], "0000dead")
    dead.close()
    assert [several.launch() for _ in range(3)] == [1, 1, 1]
    assert read_line(several.ends[0].client).startswith(b"//beat?idle="), "it is asked at once"
    several.answer(0)
    several.slots[1].sessions += 10
    assert several.launch() == 0


def test_a_client_that_leaves_a_heartbeat_unanswered_gets_no_session(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_module, "LIFE_SIGN_WITHIN", 0.01)
    monkeypatch.setattr(module, "LOOK_EVERY", 0.01)
    several = Several(stack, 2)
    several.fill(3, 3)
    several.controls[0].ask()
    until(lambda: several.controls[0].is_doubted)
    assert [several.launch(), several.launch()] == [1, 1]
    monkeypatch.setattr(control_module, "LIFE_SIGN_WITHIN", PATIENT)
    several.answer(0)
    assert not several.controls[0].is_doubted


def test_only_the_client_whose_key_has_been_removed_is_ended(stack: ExitStack) -> None:
    _, clients = make_clients(stack, OLD_KEY, NEW_KEY, clients=2)
    occupy(stack, clients, agreed("0", OLD_KEY))
    _, other = occupy(stack, clients, agreed("1", NEW_KEY))
    assert clients.set_keys([NEW_KEY]) == [clients.slots[0]]
    assert clients.controls == [other]


def test_a_tunnel_whose_last_key_is_removed_is_closed_and_not_open(stack: ExitStack) -> None:
    _, clients = make_clients(stack, OLD_KEY)
    clients.set_keys([])
    [key] = clients.keys
    assert key not in (OLD_KEY, NEW_KEY)
    assert clients.slots[0].keys == clients.keys


def test_a_client_is_connected_while_one_of_them_is(stack: ExitStack) -> None:
    _, clients = make_clients(stack, clients=2)
    assert not clients.wait_for_client(0)
    controls = [occupy(stack, clients, agreed(name))[1] for name in "ab"]
    for slot, control in zip(clients.slots, controls, strict=True):
        assert clients.wait_for_client(0)
        assert clients.version == 2
        slot.release(control, CLOSED)
    assert not clients.wait_for_client(0)
    assert (clients.version, clients.newest) == (0, None)


def test_every_client_is_told_that_the_server_stops(stack: ExitStack) -> None:
    several = Several(stack, 2)
    several.clients.close()
    assert [read_line(ends.client) for ends in several.ends] == [b"//bye?reason=shutdown\n"] * 2

"""The control connection after its handshake: heartbeats, launches, liveness, and how it ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from unittest import mock

import gevent
import pytest

from nodepass.errors import ProtocolError
from nodepass.tunnel import control as module
from nodepass.tunnel.control import CLOSED, MISSED_HEARTBEATS, SILENT, STOPPING, Agreement, Ending
from nodepass.wire.signals import LANE, MAX_LINE, TCP, Launch, Offer
from tests.unit.controls import V1, V2, Ends, connect_ends, read_line, run, until
from tests.unit.streams import reset

SHORT = 0.01  # seconds between heartbeats, where a test waits for some
VERSIONS = pytest.mark.parametrize("agreement", [V1, V2], ids=["v1", "v2"])
BRISK = Agreement(Offer(10102, 0, round(1000 * SHORT)))  # v2, with a heartbeat every SHORT seconds


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack, gevent.Timeout(20):
        yield stack


@pytest.fixture
def ends(stack: ExitStack) -> Ends:
    return connect_ends(stack)


# Heartbeats


@VERSIONS
def test_a_server_sends_a_heartbeat_every_interval(stack: ExitStack, ends: Ends, agreement: Agreement) -> None:
    run(stack, ends.server_control(agreement, SHORT).beat)
    assert [read_line(ends.client) for _ in range(3)] == [b"\n"] * 3


def test_heartbeats_end_with_the_connection(stack: ExitStack, ends: Ends) -> None:
    control = ends.server_control(V2, SHORT)
    beating = run(stack, control.beat)
    reset(ends.client)
    beating.get()
    assert control.ending.reason == "failed"
    assert control.ending.words.startswith("heartbeat failed: ")
    assert control.sock.fileno() < 0


def test_a_v2_client_answers_each_heartbeat(stack: ExitStack, ends: Ends) -> None:
    run(stack, list, ends.client_control(V2).launches())
    ends.server.sendall(b"\n\n//deadbeef#1\n\n")
    assert [read_line(ends.server) for _ in range(3)] == [b"\n"] * 3


def test_a_v1_client_never_writes(stack: ExitStack, ends: Ends) -> None:
    control = ends.client_control(V1)
    reading = run(stack, lambda: list(control.launches()))
    ends.server.sendall(b"\n\n//deadbeef#1\n\n")
    ends.server.shutdown(1)
    assert reading.get() == [Launch("deadbeef", TCP)]
    control.close(STOPPING)
    assert ends.server.recv(1) == b""


def test_the_round_trip_is_measured_by_the_clients_answers(stack: ExitStack, ends: Ends) -> None:
    server, client = ends.server_control(V2), ends.client_control(V2)
    assert "round trip" not in server.describe()
    for work in (server.wait_until_ended, lambda: list(client.launches())):
        run(stack, work)
    server._beat_once()
    until(lambda: server.round_trip is not None)
    assert server.round_trip is not None
    assert server.round_trip > 0
    assert "(wire v2, round trip " in server.describe()


def test_an_answer_without_a_heartbeat_is_no_round_trip(ends: Ends) -> None:
    control = ends.server_control(V2)
    ends.client.sendall(b"\n\n")
    ends.client.close()
    control.wait_until_ended()
    assert control.round_trip is None


def test_a_client_takes_the_interval_from_the_servers_offer(ends: Ends) -> None:
    control = ends.client_control(interval=60.0)
    control.agree(BRISK)
    assert list(control.launches()) == []
    assert control.vanished, "it would wait for 180 s"


# Liveness


def test_a_v2_client_that_answers_is_alive(stack: ExitStack, ends: Ends) -> None:
    control = ends.server_control(V2)
    run(stack, control.wait_until_ended)
    run(stack, lambda: list(ends.client_control(V2).launches()))
    assert control.shows_life(10.0)


def test_a_v2_client_that_does_not_answer_is_not_alive(stack: ExitStack, ends: Ends) -> None:
    """Its kernel acknowledges the heartbeat all the same."""
    control = ends.server_control(V2)
    run(stack, control.wait_until_ended)
    assert not control.shows_life(0.05)
    assert read_line(ends.client) == b"\n"


def test_an_answer_from_before_the_probe_does_not_count(stack: ExitStack, ends: Ends) -> None:
    control = ends.server_control(V2)
    run(stack, control.wait_until_ended)
    ends.client.sendall(b"\n")
    until(lambda: control._answers)
    assert not control.shows_life(0.05)


def test_a_v1_client_is_alive_while_its_kernel_acknowledges(ends: Ends) -> None:
    assert ends.server_control(V1).shows_life(10.0)


@VERSIONS
def test_a_client_whose_connection_is_gone_is_not_alive(ends: Ends, agreement: Agreement) -> None:
    control = ends.server_control(agreement)
    reset(ends.client)
    assert not control.shows_life(0.05)


# Signals


@pytest.mark.parametrize(
    ("line", "counted", "event"),
    [
        (b"//deadbee#1\n", "signals_malformed", "signal.malformed"),
        (b"not a signal\n", "signals_malformed", "signal.malformed"),
        (b"//deadbeef#9\n", "signals_unknown", "signal.unknown"),
        (b"x" * (MAX_LINE + 1) + b"\n", "signals_over_long", "signal.over_long"),
    ],
)
def test_a_line_that_is_no_signal_is_counted_logged_and_skipped(
    ends: Ends, line: bytes, counted: str, event: str
) -> None:
    control = ends.client_control(V2)
    ends.server.sendall(line + b"//deadbeef#3\n")
    ends.server.close()
    with mock.patch.object(control._log, "warning") as warning:
        assert list(control.launches()) == [Launch("deadbeef", LANE)]
    assert [call.args[0] for call in warning.call_args_list] == [event]
    assert {kind: count for kind, count in control._stats.trouble.items() if count} == {counted: 1}


def test_an_over_long_line_in_a_handshake_is_an_error(ends: Ends) -> None:
    control = ends.client_control()
    ends.server.sendall(b"x" * (MAX_LINE + 1))
    with pytest.raises(ProtocolError, match="4096 bytes"):
        control.read_line()


def test_launches_come_in_the_order_in_which_they_were_sent(ends: Ends) -> None:
    server, client = ends.server_control(V2), ends.client_control(V2)
    sent = [Launch(f"{number:08x}", TCP) for number in range(500)]
    for launch in sent:
        server.send(launch)
    server.close(STOPPING)
    assert list(client.launches()) == sent


def test_a_launch_from_a_client_is_counted_and_ignored(ends: Ends) -> None:
    control = ends.server_control(V2)
    ends.client.sendall(b"//deadbeef#1\n\n")
    ends.client.close()
    control.wait_until_ended()
    assert control._stats.trouble["signals_unknown"] == 1
    assert control._answers == 1


# The end


def test_a_connection_that_the_peer_closes_has_not_vanished(ends: Ends) -> None:
    control = ends.server_control(V2)
    ends.client.close()
    control.wait_until_ended()
    assert (control.ending, control.vanished) == (CLOSED, False)


def test_a_v2_peer_that_misses_three_heartbeats_has_vanished(ends: Ends) -> None:
    control = ends.server_control(V2, SHORT)
    control.wait_until_ended()
    assert (control.ending, control.vanished) == (SILENT, True)


def test_a_connection_that_is_reset_has_vanished(ends: Ends) -> None:
    control = ends.server_control(V2)
    reset(ends.client)
    control.wait_until_ended()
    assert (control.ending, control.vanished) == (Ending("failed", "Connection reset by peer"), True)


def test_a_connection_that_this_end_closes_has_not_vanished(stack: ExitStack, ends: Ends) -> None:
    """The first ending is the one that is reported."""
    control = ends.server_control(V2)
    waiting = run(stack, control.wait_until_ended)
    gevent.sleep(0)
    control.close(STOPPING)
    control.close(SILENT)
    waiting.get()
    assert (control.ending, control.vanished) == (STOPPING, False)


def test_a_connection_that_this_end_finishes_is_read_to_its_end(ends: Ends) -> None:
    control = ends.client_control(V2)
    control.finish()
    assert ends.server.recv(1) == b""
    ends.server.sendall(b"//deadbeef#1\n")
    ends.server.close()
    assert list(control.launches()) == [Launch("deadbeef", TCP)]
    assert (control.ending, control.vanished) == (STOPPING, False)


def test_a_connection_shows_its_peer_and_whether_it_is_open(ends: Ends) -> None:
    control = ends.server_control(V2)
    assert repr(control) == f"<ServerControl {control.peer} open>"
    control.close(STOPPING)
    assert repr(control) == f"<ServerControl {control.peer} closed>"


# Health


@pytest.mark.parametrize(("agreement", "well"), [(V1, True), (V2, False)], ids=["v1", "v2"])
def test_a_v2_peer_that_is_silent_and_was_not_given_up_is_unhealthy(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, agreement: Agreement, well: bool
) -> None:
    """A v1 client never writes."""
    now = 100.0
    monkeypatch.setattr(module, "time", mock.Mock(monotonic=lambda: now))
    control = ends.server_control(agreement, interval=1.0)
    now += MISSED_HEARTBEATS + 0.9
    assert not control.unhealthy_reason()
    now += 0.2
    assert bool(control.unhealthy_reason()) != well
    ends.client.sendall(b"\n")
    control.read_line()
    assert not control.unhealthy_reason()

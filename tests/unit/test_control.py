"""The control connection after its handshake: heartbeats, launches, liveness, and how it ends."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from unittest import mock

import gevent
import pytest
from gevent import socket
from gevent.event import Event

from nodepass.errors import ClosedError, ProtocolError
from nodepass.log import Log
from nodepass.net.stream import Stream
from nodepass.stats import Stats
from nodepass.tunnel import control as module
from nodepass.tunnel.control import (
    CLOSED,
    MISSED_HEARTBEATS,
    SILENT,
    STOPPING,
    Agreement,
    ClientControl,
    Ending,
    ServerControl,
)
from nodepass.wire.lines import MAX_LINE, MAX_OPENING
from nodepass.wire.negotiation import Offer
from nodepass.wire.signals import BYES, LANE, RELOAD, REPLACED, SHUTDOWN, TCP, Beat, Launch, parse_signal
from tests.unit.controls import V1, V2, Ends, connect_ends, read_line, run, run_tls, until
from tests.unit.streams import receive_all, reset, tcp_pair

SHORT = 0.01  # seconds between heartbeats, where a test waits for some
VERSIONS = pytest.mark.parametrize("agreement", [V1, V2], ids=["v1", "v2"])
BRISK = Agreement(Offer(10102, 0, round(1000 * SHORT)))  # v2, with a heartbeat every SHORT seconds
ANSWER = b"//beat?ok=1\n"


@pytest.fixture
def ends(stack: ExitStack) -> Ends:
    return connect_ends(stack)


@pytest.fixture(params=[False, True], ids=["clear", "tls"])
def streams(request: pytest.FixtureRequest, stack: ExitStack, ends: Ends) -> tuple[Stream | None, Stream | None]:
    """The server's stream and the client's: in the clear, and under TLS."""
    return run_tls(stack, ends) if request.param else (None, None)


def no_idle() -> int:
    return 0


def yes() -> bool:
    return True


def read_all(control: ClientControl, target_answers: Callable[[], bool] = yes) -> list[Launch | Beat]:
    return list(control.signals(target_answers))


# Heartbeats


def test_a_v1_server_sends_an_empty_line_every_interval(stack: ExitStack, ends: Ends) -> None:
    run(stack, ends.server_control(V1, SHORT).beat, no_idle)
    assert [read_line(ends.client) for _ in range(3)] == [b"\n"] * 3


def test_a_v2_server_sends_its_count_of_idle_connections_every_interval(stack: ExitStack, ends: Ends) -> None:
    """A heartbeat counts when it is sent."""
    run(stack, ends.server_control(BRISK).beat, count(7).__next__)
    assert [read_line(ends.client) for _ in range(3)] == [b"//beat?idle=%d\n" % idle for idle in (7, 8, 9)]


def test_heartbeats_end_with_the_connection(stack: ExitStack, ends: Ends) -> None:
    control = ends.server_control(BRISK)
    beating = run(stack, control.beat, no_idle)
    reset(ends.client)
    beating.get()
    assert control.ending.reason == "failed"
    assert control.ending.words.startswith("heartbeat failed: ")
    assert control.sock.fileno() < 0


def test_a_v2_client_answers_each_heartbeat_at_once(stack: ExitStack, ends: Ends) -> None:
    """And says each time whether its target answers."""
    answers = iter([True, False, True])
    reading = run(stack, read_all, ends.client_control(V2), answers.__next__)
    ends.server.sendall(b"//beat?idle=5\n//beat?idle=6\n//deadbeef#1\n//beat?idle=7\n")
    assert [read_line(ends.server) for _ in range(3)] == [ANSWER, b"//beat?ok=0\n", ANSWER]
    ends.server.shutdown(1)
    assert reading.get() == [Beat(5), Beat(6), Launch("deadbeef", TCP), Beat(7)]


def test_a_server_that_reads_no_answers_has_vanished(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reports that to a write, and then shows the next read an end of the stream."""
    control = ends.client_control(V2)

    def give_up(_: object) -> None:
        ends.server.close()
        raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")

    monkeypatch.setattr(control, "send", give_up)
    ends.server.sendall(b"//beat?idle=0\n")
    read_all(control)
    assert control.ending == SILENT
    assert control.vanished


def test_an_answer_waits_no_longer_than_a_heartbeat_may_be_missing(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that reads a little now and then would not be given up by the kernel."""
    control = ends.client_control(Agreement(Offer(10102, 0, 10)))
    monkeypatch.setattr(control, "send", lambda _: Event().wait())
    ends.server.sendall(b"//beat?idle=0\n")
    read_all(control)
    assert (control.ending, control.vanished) == (SILENT, True)


def test_a_v1_client_never_writes(stack: ExitStack, ends: Ends) -> None:
    control = ends.client_control(V1)
    reading = run(stack, read_all, control)
    ends.server.sendall(b"\n\n//deadbeef#1\n//beat?idle=5\n//bye?reason=shutdown\n\n")
    ends.server.shutdown(1)
    assert reading.get() == [Launch("deadbeef", TCP)]
    assert control.ending == CLOSED
    control.close(STOPPING)
    assert ends.server.recv(1) == b""


def test_the_round_trip_is_measured_by_the_clients_answers(
    stack: ExitStack, ends: Ends, streams: tuple[Stream | None, Stream | None]
) -> None:
    server, client = ends.server_control(V2, stream=streams[0]), ends.client_control(V2, stream=streams[1])
    assert "round trip" not in server.describe()
    run(stack, server.wait_until_ended)
    run(stack, read_all, client)
    server._beat_once()
    until(lambda: server.round_trip is not None)
    assert server.round_trip is not None
    assert server.round_trip > 0
    assert "(wire v2, round trip " in server.describe()


def test_an_answer_without_a_heartbeat_is_no_round_trip(ends: Ends) -> None:
    control = ends.server_control(V2)
    ends.client.sendall(2 * ANSWER)
    ends.client.close()
    control.wait_until_ended()
    assert control.round_trip is None


def test_a_server_knows_whether_the_target_answers(ends: Ends) -> None:
    control = ends.server_control(V2)
    assert control.target_answers
    for answer, answers in ((b"//beat?ok=0\n", False), (ANSWER, True)):
        ends.client.sendall(answer)
        control._take_answer(parse_signal(control.read_line()))  # type: ignore[arg-type]
        assert control.target_answers == answers
        assert ("its target does not answer" in control.describe()) != answers


def test_a_client_says_at_once_that_a_target_answers_or_not_and_each_once(ends: Ends) -> None:
    control = ends.client_control(V2)
    for answers in (True, False, False, True):
        control.tell(answers)
    ends.server.sendall(b"//beat?idle=0\n")
    signals = control.signals(lambda: False)
    next(signals)
    control.tell(False)
    ends.client.shutdown(socket.SHUT_WR)
    assert receive_all(ends.server) == b"//beat?ok=0\n//beat?ok=1\n//beat?ok=0\n"


def test_what_a_client_says_unasked_is_no_round_trip_and_what_crosses_it_neither(ends: Ends) -> None:
    server = ends.server_control(V2)
    server._beat_once()
    for line, is_measured in ((b"//beat?ok=0\n", False), (b"//beat?ok=0\n", False)):
        server._take_answer(parse_signal(line[:-1]))  # type: ignore[arg-type]
        assert (server.round_trip is not None) == is_measured
    server._beat_once()
    server._take_answer(parse_signal(b"//beat?ok=0"))  # type: ignore[arg-type]
    assert server.round_trip is not None


def test_a_client_takes_the_interval_from_the_servers_offer(ends: Ends) -> None:
    control = ends.client_control(interval=60.0)
    control.agree(BRISK)
    assert read_all(control) == []
    assert control.vanished, "it would wait for 180 s"


# Liveness


def test_a_v2_client_that_answers_is_alive(
    stack: ExitStack, ends: Ends, streams: tuple[Stream | None, Stream | None]
) -> None:
    control = ends.server_control(V2, stream=streams[0])
    run(stack, control.wait_until_ended)
    run(stack, read_all, ends.client_control(V2, stream=streams[1]))
    assert control.shows_life(10.0)


def test_a_v2_client_that_does_not_answer_is_not_alive(stack: ExitStack, ends: Ends) -> None:
    """Its kernel acknowledges the heartbeat all the same."""
    control = ends.server_control(V2)
    run(stack, control.wait_until_ended)
    assert not control.shows_life(0.05)
    assert read_line(ends.client) == b"//beat?idle=0\n"


def test_an_answer_from_before_the_probe_does_not_count(stack: ExitStack, ends: Ends) -> None:
    control = ends.server_control(V2)
    run(stack, control.wait_until_ended)
    ends.client.sendall(ANSWER)
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
    ("agreement", "line", "counted", "event"),
    [
        (V2, b"//deadbee#1\n", "signals_malformed", "signal.malformed"),
        (V2, b"not a signal\n", "signals_malformed", "signal.malformed"),
        (V2, b"\n", "signals_malformed", "signal.malformed"),
        (V2, b"//deadbeef#1\r\n", "signals_malformed", "signal.malformed"),
        (V2, b"//bye\n", "signals_malformed", "signal.malformed"),
        (V2, b"//deadbeef#2\n", "signals_unknown", "signal.unknown"),
        (V2, b"//later?than=us\n", "signals_unknown", "signal.unknown"),
        (V2, ANSWER, "signals_unknown", "signal.unknown"),
        (V2, b"x" * (MAX_LINE + 1) + b"\n", "signals_over_long", "signal.over_long"),
        (V1, b"//deadbee#1\n", "signals_malformed", "signal.malformed"),
        (V1, b"//deadbeef#3\n", "signals_unknown", "signal.unknown"),
        (V1, b"x" * (MAX_LINE + 1) + b"\n", "signals_over_long", "signal.over_long"),
    ],
    ids=range(12),
)
def test_a_line_that_is_no_signal_is_counted_logged_and_skipped(
    ends: Ends, agreement: Agreement, line: bytes, counted: str, event: str
) -> None:
    control = ends.client_control(agreement)
    ends.server.sendall(line + b"//deadbeef#1\n")
    ends.server.close()
    with mock.patch.object(control._log, "warning") as warning:
        assert read_all(control) == [Launch("deadbeef", TCP)]
    assert [call.args[0] for call in warning.call_args_list] == [event]
    assert {kind: count for kind, count in control._stats.trouble.items() if count} == {counted: 1}


@pytest.mark.parametrize(
    ("agreement", "longest", "fits"),
    [(None, MAX_OPENING, False), (V2, MAX_LINE, True)],
    ids=["handshake", "signals"],
)
def test_the_longest_line_is_read_and_a_longer_one_is_an_error_in_the_handshake(
    ends: Ends, agreement: Agreement | None, longest: int, fits: bool
) -> None:
    control = ends.client_control(agreement)
    ends.server.sendall(b"x" * longest + b"\n" + b"y" * (longest + 1) + b"\nz\n")
    assert control.read_line() == b"x" * longest
    if fits:
        assert control.read_line() == b"z"
    else:
        with pytest.raises(ProtocolError, match=f"{longest} bytes"):
            control.read_line()


@pytest.mark.parametrize(
    ("behind", "unread"), [(b"", False), (b"/", True), (b"\n", True)], ids=["none", "part", "line"]
)
def test_what_has_been_read_behind_a_line_is_known(ends: Ends, behind: bytes, unread: bool) -> None:
    control = ends.client_control()
    ends.server.sendall(b"//tls\n" + behind)
    assert control.read_line() == b"//tls"
    assert control.has_unread == unread


def test_launches_come_in_the_order_in_which_they_were_sent(
    ends: Ends, streams: tuple[Stream | None, Stream | None]
) -> None:
    """Under TLS several come in one record."""
    server, client = ends.server_control(V2, stream=streams[0]), ends.client_control(V2, stream=streams[1])
    sent = [Launch(f"{number:08x}", LANE) for number in range(300)]
    for launch in sent[:200]:
        server.send(launch)
    server.stream.write(b"".join(launch.encode() for launch in sent[200:]))
    server.finish(STOPPING, SHUTDOWN)
    assert read_all(client) == sent


@pytest.mark.parametrize("line", [b"//deadbeef#1\n", b"//beat?idle=1\n", b"//deadbeef#3\n"])
def test_a_servers_signal_from_a_client_is_counted_and_ignored(ends: Ends, line: bytes) -> None:
    control = ends.server_control(V2)
    ends.client.sendall(line + ANSWER)
    ends.client.close()
    control.wait_until_ended()
    assert control._stats.trouble["signals_unknown"] == 1
    assert control._answers == 1


# The end


@pytest.mark.parametrize("side", ["server", "client"])
@pytest.mark.parametrize("token", BYES)
def test_a_peer_that_says_goodbye_is_read_to_its_end_and_has_not_vanished(ends: Ends, side: str, token: str) -> None:
    """What it says is the reason, also where the connection is reset behind it."""
    control: ServerControl | ClientControl
    line = b"//bye?reason=%b\n" % token.encode()
    if side == "server":
        control = ends.server_control(V2)
        ends.client.sendall(line + b"//beat?ok=0\n")
        ends.client.close()
        control.wait_until_ended()
        assert not control.target_answers
    else:
        control = ends.client_control(V2)
        ends.server.sendall(line + b"//deadbeef#1\n")
        ends.server.close()
        assert read_all(control) == [Launch("deadbeef", TCP)]
    assert (control.ending, control.vanished) == (Ending(token, BYES[token]), False)


def test_a_goodbye_of_a_reason_that_is_unknown_is_a_close(ends: Ends) -> None:
    control = ends.client_control(V2)
    ends.server.sendall(b"//bye?reason=later-than-us\n//bye?reason=replaced\n")
    ends.server.close()
    read_all(control)
    assert (control.ending, control.vanished) == (CLOSED, False)


def test_a_connection_that_the_peer_closes_has_not_vanished(ends: Ends) -> None:
    control = ends.server_control(V2)
    ends.client.close()
    control.wait_until_ended()
    assert (control.ending, control.vanished) == (CLOSED, False)


def test_under_tls_an_end_without_close_notify_is_a_lost_connection(stack: ExitStack, ends: Ends) -> None:
    server, client = run_tls(stack, ends)
    control = ends.server_control(V2, stream=server)
    client.sock.shutdown(socket.SHUT_WR)
    control.wait_until_ended()
    assert (control.ending.reason, control.vanished) == ("failed", True)
    assert "close_notify" in control.ending.words


def test_under_tls_an_end_with_close_notify_is_a_close(stack: ExitStack, ends: Ends) -> None:
    server, client = run_tls(stack, ends)
    control = ends.server_control(V2, stream=server)
    client.half_close()
    client.close()
    control.wait_until_ended()
    assert (control.ending, control.vanished) == (CLOSED, False)


def test_a_v2_peer_that_misses_three_heartbeats_has_vanished(ends: Ends) -> None:
    control = ends.server_control(BRISK)
    control.wait_until_ended()
    assert (control.ending, control.vanished) == (SILENT, True)


@pytest.mark.parametrize("said", [b"x", b"x" * (MAX_LINE + 1)], ids=["a part of a line", "an over-long line"])
def test_bytes_without_an_end_of_line_are_silence(stack: ExitStack, ends: Ends, said: bytes) -> None:
    def say() -> None:
        while True:
            ends.client.sendall(said)
            gevent.sleep(SHORT / 2)

    control = ends.server_control(BRISK)
    run(stack, say)
    control.wait_until_ended()
    assert (control.ending, control.vanished) == (SILENT, True)


def test_silence_is_counted_from_the_offer_and_from_each_line(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float | None] = []

    class Recorded(gevent.Timeout):
        def __init__(self, seconds: float | None, error: TimeoutError) -> None:
            waits.append(seconds)
            super().__init__(seconds, error)

    control = ends.server_control(V2)
    ends.client.sendall(ANSWER + b"//malformed" + ANSWER)
    ends.client.close()
    monkeypatch.setattr(gevent, "Timeout", Recorded)
    control.wait_until_ended()
    assert waits == [MISSED_HEARTBEATS * 5.0] * 3


def test_a_v1_server_may_be_silent(stack: ExitStack, ends: Ends) -> None:
    control = ends.client_control(V1, SHORT)
    reading = run(stack, read_all, control)
    reading.join(2 * MISSED_HEARTBEATS * SHORT)
    assert not reading.ready()


@pytest.mark.parametrize("secured", [False, True], ids=["clear", "tls"])
def test_a_connection_that_is_reset_has_vanished(stack: ExitStack, ends: Ends, secured: bool) -> None:
    control = ends.server_control(V2, stream=run_tls(stack, ends)[0] if secured else None)
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


def test_a_connection_that_this_end_finishes_is_read_to_its_end(
    ends: Ends, streams: tuple[Stream | None, Stream | None]
) -> None:
    server, client = ends.server_control(V2, stream=streams[0]), ends.client_control(V2, stream=streams[1])
    client.finish(STOPPING, SHUTDOWN)
    server.wait_until_ended()
    assert (server.ending, server.vanished) == (Ending(SHUTDOWN, BYES[SHUTDOWN]), False)
    server.send(Launch("deadbeef", TCP))
    server.finish(CLOSED, REPLACED)
    assert read_all(client) == [Launch("deadbeef", TCP)]
    assert (client.ending, client.vanished) == (STOPPING, False)


@pytest.mark.parametrize(("agreement", "said"), [(V1, b""), (V2, b"//bye?reason=reload\n")], ids=["v1", "v2"])
def test_only_a_v2_peer_is_told_why(ends: Ends, agreement: Agreement, said: bytes) -> None:
    control = ends.server_control(agreement)
    control.finish(STOPPING, RELOAD)
    assert receive_all(ends.client) == said
    assert control.sock.fileno() >= 0


@pytest.mark.parametrize("talks", [False, True], ids=["silent", "talking"])
def test_a_peer_that_does_not_end_its_side_is_closed_after_a_moment(
    stack: ExitStack, ends: Ends, monkeypatch: pytest.MonkeyPatch, talks: bool
) -> None:
    """Also where a read has waited since before, and whatever the peer still says."""
    monkeypatch.setattr(module, "GOODBYE", 0.05)
    control = ends.server_control(V2)
    reading = run(stack, control.wait_until_ended)
    gevent.sleep(0)
    control.finish(STOPPING, REPLACED)
    assert receive_all(ends.client) == b"//bye?reason=replaced\n"
    while talks and not reading.ready():
        ends.client.sendall(ANSWER)
        gevent.sleep(0.01)
    reading.get()
    assert (control.ending, control.vanished) == (STOPPING, False)
    assert control.sock.fileno() < 0


def test_a_connection_that_is_finished_and_closed_is_closed_at_once(ends: Ends) -> None:
    control = ends.server_control(V2)
    control.finish(STOPPING, REPLACED)
    control.close(CLOSED)
    assert (control.ending, control.sock.fileno()) == (STOPPING, -1)


def fill(stream: Stream) -> None:
    """Write until the peer, which reads nothing, takes no more: not even a moment later, where a kernel is busy."""
    refusals = 0  # in a row
    while refusals < 3:
        refusals = refusals + 1 if len(stream.send(b"x" * 65536)) >= 65536 else 0
        gevent.sleep(0.005)


def begin_line(stack: ExitStack, control: ServerControl) -> gevent.Greenlet[..., object]:
    """Send a line that is not taken; on a busy machine the kernel may make room after all, for one or a few."""
    while True:
        sending = run(stack, control.send, Launch("deadbeef", TCP))
        until(lambda sending=sending: control._sending.locked() or sending.ready())  # type: ignore[misc]
        if not sending.ready():
            return sending
        fill(control.stream)


@pytest.mark.parametrize("half_written", [False, True], ids=["between lines", "within a line"])
def test_finishing_does_not_wait_for_a_peer_that_reads_nothing(
    stack: ExitStack, ends: Ends, streams: tuple[Stream | None, Stream | None], half_written: bool
) -> None:
    control = ends.server_control(V2, stream=streams[0])
    fill(control.stream)
    if half_written:
        sending = begin_line(stack, control)
    control.finish(STOPPING, REPLACED)
    assert control.ending == STOPPING
    until(lambda: control.sock.fileno() < 0)  # at once, or after GOODBYE where the kernel still had room for the bye
    if half_written:
        with pytest.raises(OSError, match="closed at this end"):
            sending.get()


@pytest.mark.parametrize(
    ("leave", "first", "reason"),
    [
        (lambda client: client.sendall(b"/"), 0x2F, "protocol"),
        (lambda client: client.sendall(b"\x16\x03\x01"), 0x16, "protocol"),
        (lambda client: client.sendall(b"\n"), 0x0A, "protocol"),
        (lambda client: client.close(), -1, "closed"),
        (reset, -1, "failed"),
    ],
    ids=["line", "TLS", "heartbeat", "end", "reset"],
)
def test_the_first_byte_of_a_v1_client_is_its_end(
    ends: Ends, leave: Callable[[object], object], first: int, reason: str
) -> None:
    control = ends.server_control(V1)
    leave(ends.client)
    assert control.wait_for_byte() == first
    assert control.ending.reason == reason
    assert control.vanished == (reason == "failed")


def test_a_v1_client_that_this_end_closes_is_no_longer_waited_for(stack: ExitStack, ends: Ends) -> None:
    control = ends.server_control(V1)
    waiting = run(stack, control.wait_for_byte)
    gevent.sleep(0)
    control.close(STOPPING)
    assert waiting.get() == -1
    assert (control.ending, control.vanished) == (STOPPING, False)


def test_a_connection_shows_its_peer_and_whether_it_is_open(ends: Ends) -> None:
    control = ends.server_control(V2)
    assert repr(control) == f"<ServerControl {control.peer} open>"
    control.close(STOPPING)
    assert repr(control) == f"<ServerControl {control.peer} closed>"


def test_a_connection_that_is_closed_before_its_handshake_reads_no_line(ends: Ends) -> None:
    control = ends.client_control()
    ends.server.sendall(b"//80")
    ends.server.close()
    with pytest.raises(ClosedError):
        control.read_line()


# Health


@pytest.mark.parametrize(("agreement", "well"), [(V1, True), (V2, False)], ids=["v1", "v2"])
def test_a_v2_peer_that_is_silent_and_was_not_given_up_is_unhealthy(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, agreement: Agreement, well: bool
) -> None:
    """A v1 client never writes."""
    now = 100.0
    monkeypatch.setattr(module, "time", mock.Mock(monotonic=lambda: now))
    control = ends.server_control(agreement, interval=5.0)
    now += 5 * MISSED_HEARTBEATS + 4.9
    assert not control.unhealthy_reason()
    now += 0.2
    assert bool(control.unhealthy_reason()) != well
    ends.client.sendall(ANSWER)
    control.read_line()
    assert not control.unhealthy_reason()


def test_behind_a_proxy_every_signal_is_acknowledged_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy may keep the next launch back until then."""
    acknowledged: list[object] = []
    monkeypatch.setattr(module, "acknowledge", acknowledged.append)
    with tcp_pair() as (stream, server):
        control = ClientControl(stream, 5.0, Log("client"), Stats())
        server.sendall(b"//a\n")
        assert control.read_line() == b"//a"
        assert not acknowledged
        control.note_proxy("server.example:10101 through http://proxy:3128")
        server.sendall(b"//b\n")
        assert control.read_line() == b"//b"
        assert acknowledged == [stream.sock]
        assert control.describe().startswith("server.example:10101 through http://proxy:3128 (wire v1")

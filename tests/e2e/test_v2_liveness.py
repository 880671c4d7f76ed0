"""Heartbeats and their answers, peers that fall silent, and who takes over from whom."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest

from tests.support.process import Environment
from tests.support.sockets import connect, is_silent, until
from tests.support.target import Target
from tests.support.tunnel import BRISK, CALM, OurClient, OurServer, Tunnel, assert_connected
from tests.support.v1_client import V1Client
from tests.support.v1_stream import PlainStream
from tests.support.v2_client import V2Client
from tests.support.v2_control import HELLO_WAIT, Refused, dial
from tests.support.v2_server import V2Server
from tests.support.v2_tunnel import KEYED, SECRET

INTERVAL = 0.2
"""Seconds of REPORT_INTERVAL in BRISK: with these a silent peer is given up soon."""

LIVELY: Environment = {**CALM, "REPORT_INTERVAL": "500ms"}
"""With these heartbeats matter as well, and a peer that answers is in time on a busy machine, too."""

PROBE = 1.0
"""Seconds that an incumbent has to show life."""

MARGIN = 5.0
"""Seconds that a loaded machine may add."""

SLOW: Environment = {"REPORT_INTERVAL": "30s", "SERVICE_COOLDOWN": "500ms"}
"""With these no heartbeat finds anybody dead during a test."""


def test_our_client_answers_every_heartbeat(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(V2Server())
    stack.enter_context(OurClient(server.tunnel_address, ("127.0.0.1", 9)))
    until(lambda: server.answers >= 5)
    assert server.connects == 1


def test_our_client_answers_at_once_and_with_an_empty_line(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(V2Server(heartbeat=None, announced=30))
    stack.enter_context(OurClient(server.tunnel_address, ("127.0.0.1", 9)))
    for number in range(1, 6):
        server.write(b"\n")
        until(lambda expected=number: server.answers == expected)  # type: ignore[misc]


def test_the_round_trip_is_in_the_statistics_line(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(OurServer(env=LIVELY))
    stack.enter_context(V2Client(server.tunnel_address))
    server.wait_for("tunnel.report", level="debug", round_trip=lambda seconds: seconds and 0 < seconds < MARGIN)


def test_a_client_that_answers_is_never_given_up(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(OurServer(env=LIVELY))
    target = stack.enter_context(Target())
    client = stack.enter_context(OurClient(server.tunnel_address, target.address))
    with Tunnel(server, client, target).session() as (visitor, service):
        assert is_silent(visitor, 4.5 * 0.5)
        assert_connected(visitor, service)
    assert not server.find("client.disconnected") + client.find("server.disconnected")


def test_a_v1_client_is_never_asked_for_answers(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(OurServer(env=BRISK))
    target = stack.enter_context(Target())
    client = stack.enter_context(V1Client(server.tunnel_address, target.address))
    with Tunnel(server, client, target).session() as (visitor, service):
        assert is_silent(visitor, 4.5 * INTERVAL)
        assert_connected(visitor, service)
    assert not server.find("client.disconnected")


def test_our_server_gives_a_silent_client_up_after_three_intervals(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(OurServer(env=BRISK))
    client = stack.enter_context(V2Client(server.tunnel_address, automatic=False))
    client.connect()
    assert client.talk.is_ended_by_peer()
    end = server.wait_for("client.disconnected", reason="silent")
    assert 2 * INTERVAL <= end.moment - server.wait_for_client().moment < 4 * INTERVAL + MARGIN


def test_our_client_gives_a_silent_server_up_after_three_of_its_intervals(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(V2Server(heartbeat=None, announced=INTERVAL))
    client = stack.enter_context(OurClient(server.tunnel_address, ("127.0.0.1", 9), env=SLOW))
    end = client.wait_for("server.disconnected", reason="silent")
    assert 2 * INTERVAL <= end.moment - client.wait_until_connected().moment < 4 * INTERVAL + MARGIN
    until(lambda: server.connects >= 2)


def test_the_interval_that_counts_is_the_server_s(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(V2Server(heartbeat=5 * INTERVAL, announced=5 * INTERVAL))
    client = stack.enter_context(OurClient(server.tunnel_address, ("127.0.0.1", 9), env=BRISK))
    until(lambda: server.answers)
    assert server.connects == 1
    assert not client.find("server.disconnected")


def test_with_a_key_a_newcomer_takes_over_at_once_and_running_sessions_go_on(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(OurServer(env={**KEYED, **SLOW}))
    first = stack.enter_context(V2Client(server.tunnel_address, secret=SECRET, automatic=False))
    first.connect()
    streams = dict(first.open_data() for _ in range(3))
    visitor = stack.enter_context(connect(server.visitor_address))
    stream = streams[first.next_launch()[0]]
    assert isinstance(stream, PlainStream)
    assert_connected(visitor, stream.sock)
    target = stack.enter_context(Target())
    second = stack.enter_context(V2Client(server.tunnel_address, target.address, secret=SECRET))
    until(lambda: second.connects)
    server.wait_for("client.disconnected", reason="replaced")  # and was not asked for a sign of life before
    assert first.talk.is_ended_by_peer()
    second.wait_until_full()
    for _ in range(5):
        Tunnel(server, second, target).assert_works()
    assert_connected(visitor, stream.sock)


def incumbent(client: V2Client) -> None:
    """Answer heartbeats and nothing else."""
    with contextlib.suppress(OSError):
        while True:
            client.next_launch()


def test_without_a_key_a_newcomer_is_turned_away_while_the_client_answers(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(OurServer())
    target = stack.enter_context(Target())
    first = stack.enter_context(V2Client(server.tunnel_address, target.address))
    first.wait_until_full()
    with V2Client(server.tunnel_address, automatic=False) as second:
        began = time.monotonic()
        with pytest.raises(Refused, match="busy"):
            second.connect()
        assert time.monotonic() - began < PROBE + MARGIN
    with dial(server.tunnel_address) as silent:
        assert silent.refusal() == "busy"
    server.wait_for("client.rejected", level="warn", reason="busy")
    Tunnel(server, first, target).assert_works()
    assert first.connects == 1


def test_our_second_client_says_that_another_one_is_connected(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(OurServer(env=SLOW))
    target = stack.enter_context(Target())
    first = stack.enter_context(OurClient(server.tunnel_address, target.address, env=SLOW))
    first.wait_until_connected()
    second = stack.enter_context(OurClient(server.tunnel_address, target.address, env=SLOW))
    second.wait_for("server.rejected", level="error", reason="busy")
    server.wait_for("client.rejected", level="warn", reason="busy")
    assert not first.find("server.disconnected")
    mark = second.mark()
    first.stop()
    second.wait_until_connected(after=mark)
    Tunnel(server, second, target).assert_works()


def test_without_a_key_a_newcomer_takes_over_from_a_client_that_does_not_answer(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(OurServer(env=SLOW))
    first = stack.enter_context(V2Client(server.tunnel_address, automatic=False))
    first.connect()
    streams = dict(first.open_data() for _ in range(3))
    visitor = stack.enter_context(connect(server.visitor_address))
    stream = streams[first.next_launch()[0]]
    assert isinstance(stream, PlainStream)
    target = stack.enter_context(Target())
    second = V2Client(server.tunnel_address, target.address)
    began = time.monotonic()
    stack.enter_context(second)
    until(lambda: second.connects)
    assert time.monotonic() - began < PROBE + MARGIN
    assert first.talk.is_ended_by_peer()
    second.wait_until_full()
    Tunnel(server, second, target).assert_works()
    assert_connected(visitor, stream.sock)


def test_an_answer_to_the_probe_alone_keeps_the_client(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(OurServer(env=SLOW))
    first = stack.enter_context(V2Client(server.tunnel_address, automatic=False))
    first.connect()
    answering = threading.Thread(target=incumbent, args=(first,), daemon=True)
    answering.start()
    with dial(server.tunnel_address) as second:
        assert second.refusal() == "busy"
    first.disconnect()
    answering.join(10)


@pytest.mark.parametrize("kind", [V1Client, V2Client], ids=["wire v1", "wire v2"])
def test_a_v1_client_is_protected_by_the_acknowledgements_of_tcp(
    stack: contextlib.ExitStack, kind: type[V1Client]
) -> None:
    server = stack.enter_context(OurServer(env=SLOW))
    target = stack.enter_context(Target())
    first = stack.enter_context(V1Client(server.tunnel_address, target.address))
    first.wait_until_full()
    with dial(server.tunnel_address) as second:
        if kind is V2Client:
            second.say(f"//hello?v=2&nonce={'00' * 16}")
        assert second.refusal(HELLO_WAIT + PROBE + MARGIN) == "busy"
    Tunnel(server, first, target).assert_works()
    assert first.connects == 1

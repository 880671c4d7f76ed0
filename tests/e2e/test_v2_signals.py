"""Signals after the offer: heartbeats and their answers, launches, farewells, and peers that fall silent."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator

import pytest

from tests.support.certificates import Authority
from tests.support.process import Environment
from tests.support.sockets import connect, format_address, has_ipv6, until
from tests.support.target import Target
from tests.support.tunnel import CALM, OurServer, Tunnel, assert_connected
from tests.support.wire2.client import V2Client
from tests.support.wire2.client_side import ClientSide, GoodbyeError
from tests.support.wire2.lines import LONGEST_SIGNAL
from tests.support.wire2.ours import OurClients
from tests.support.wire2.server_side import Listener, ServerSide, Terms
from tests.support.wire2.stage import attached, attached_each
from tests.support.wire2.talk import EndedError

INTERVAL = 0.5
"""Seconds between two heartbeats where a test waits for several: on a busy machine a peer must not be late by three."""

QUICK: Environment = {**CALM, "REPORT_INTERVAL": f"{INTERVAL:g}s"}

MARGIN = 6.0
"""Seconds that a loaded machine may add."""

SLOW: Environment = {**CALM, "REPORT_INTERVAL": "30s"}
"""With these no heartbeat finds a peer dead during a test."""


@pytest.fixture(
    scope="module",
    params=[0, pytest.param(1, marks=pytest.mark.programs)],
    ids=["in the clear", "inside TLS"],
)
def quick(request: pytest.FixtureRequest) -> Iterator[OurServer]:
    with OurServer(request.param, env=QUICK) as running:
        yield running
        assert not running.find_crashes()


# Our server


def test_our_server_beats_to_the_letter_and_counts_the_pool(quick: OurServer) -> None:
    with ClientSide(quick.tunnel_address) as client:
        client.connect()
        for _ in range(3):
            client.open_data()
        heard: list[int | None] = []
        while not heard or heard[-1] != 3:
            client.take_beat(client.talk.hear())
            client.talk.say("//beat?ok=1")
            heard.append(client.idle)
            assert len(heard) < 20, heard
        assert set(heard) <= {0, 1, 2, 3}


def test_a_client_that_answers_is_never_given_up(quick: OurServer) -> None:
    with ClientSide(quick.tunnel_address) as client:
        client.connect()
        mark = quick.mark()
        for ok in (1, 0, 1, 0, 1):
            client.take_beat(client.talk.hear())
            client.talk.say(f"//beat?ok={ok}")
        source = format_address(client.talk.sock.getsockname())
        assert not quick.find("client.disconnected", after=mark, client=source)


def test_any_line_of_a_client_is_a_sign_of_life(quick: OurServer) -> None:
    """Lines of the future are ignored; the last one read counts."""
    with ClientSide(quick.tunnel_address) as client:
        client.connect()
        mark = quick.mark()
        for _ in range(5):
            client.take_beat(client.talk.hear())
            client.talk.say("//news?of=tomorrow")
        source = format_address(client.talk.sock.getsockname())
        assert not quick.find("client.disconnected", after=mark, client=source)


def test_our_server_gives_a_silent_client_up_after_three_heartbeats(quick: OurServer) -> None:
    with ClientSide(quick.tunnel_address) as client:
        mark = quick.mark()
        client.connect()
        began = time.monotonic()
        client.talk.rest()
        assert 2.5 * INTERVAL < time.monotonic() - began < 3 * INTERVAL + MARGIN
        quick.wait_for("client.disconnected", after=mark, reason="silent")


@pytest.mark.programs
def test_the_round_trip_is_in_the_report() -> None:
    with OurServer(env={**CALM, "REPORT_INTERVAL": "500ms"}) as server, V2Client(server.tunnel_address):
        server.wait_for("tunnel.report", level="debug", round_trip=lambda seconds: seconds and 0 < seconds < MARGIN)


LINES_OF_A_CLIENT = {
    "rubbish": b"\xff\xfe\x00\x01",
    "text": b"hello there",
    "a launch": b"//deadbeef#1",
    "an offer": b"//9?v=2&hb=10#0",
    "a hello": b"//hello?v=2",
    "a beat without an answer": b"//beat",
    "a beat that says too much": b"//beat?ok=2",
    "as long as may be": b"//news?x=".ljust(LONGEST_SIGNAL - 1, b"y"),
}


def test_lines_of_a_client_that_mean_nothing_harm_nobody(quick: OurServer) -> None:
    """They are ignored, or end this client's connection; the next one is served."""
    for line in LINES_OF_A_CLIENT.values():
        with ClientSide(quick.tunnel_address) as client:
            client.connect()
            client.talk.say(line)
            client.talk.end()
            client.talk.rest()  # it has read the line
    with ClientSide(quick.tunnel_address) as client:
        client.connect()
        identity, talk = client.open_data()
        with connect(quick.visitor_address) as visitor:
            assert client.hear_launch().host == identity
            talk.write(b"x")
            assert visitor.recv(1) == b"x"


def test_a_line_over_the_limit_is_not_kept(quick: OurServer) -> None:
    with ClientSide(quick.tunnel_address) as client:
        client.connect()
        mark = quick.mark()
        with contextlib.suppress(ConnectionError):
            for _ in range(64):
                client.talk.write(b"y" * 65536)
        quick.wait_for(after=mark, level=lambda level: level != "debug")
        assert not quick.find_crashes()


def test_a_launch_is_to_the_letter_and_says_no_more_than_was_asked_for(quick: OurServer) -> None:
    with ClientSide(quick.tunnel_address) as client:
        client.connect()
        identity, _ = client.open_data()
        with connect(quick.visitor_address):
            assert client.hear_launch().raw == f"//{identity}#1".encode()


def test_a_client_that_wants_addresses_is_told_them(quick: OurServer) -> None:
    with ClientSide(quick.tunnel_address, wants=True) as client:
        client.connect()
        identity, _ = client.open_data()
        with connect(quick.visitor_address) as visitor:
            source, target = visitor.getsockname(), visitor.getpeername()
            expected = f"//{identity}?from={format_address(source)}&to={format_address(target)}#1"
            assert client.hear_launch().raw == expected.encode()


@pytest.mark.programs
@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
def test_an_ipv6_address_is_told_in_brackets() -> None:
    with (
        OurServer(target="[::1]:0") as server,
        ClientSide(server.tunnel_address, wants=True) as client,
    ):
        client.connect()
        client.open_data()
        with connect(server.visitor_address) as visitor:
            launch = client.hear_launch()
            assert launch.parameters["from"] == f"[::1]:{visitor.getsockname()[1]}"
            assert launch.parameters["to"] == f"[::1]:{server.visitor_address[1]}"


def test_our_server_says_bye_when_it_stops() -> None:
    with OurServer(1) as server, ClientSide(server.tunnel_address) as client:
        client.connect()
        server.send(signal.SIGTERM)
        with pytest.raises(GoodbyeError, match="shutdown"):
            client.hear_launch()
        with pytest.raises(EndedError):  # in good order, with a close_notify inside TLS
            client.talk.read_line()
        assert server.wait() == 0


def test_why_a_client_left_is_in_our_server_s_log(quick: OurServer) -> None:
    with ClientSide(quick.tunnel_address) as client:
        mark = quick.mark()
        client.connect()
        client.talk.say("//bye?reason=reload")
        client.talk.end()
        quick.wait_for("client.disconnected", after=mark, reason="reload")


def test_a_farewell_cannot_forge_a_line_of_the_log(quick: OurServer) -> None:
    with ClientSide(quick.tunnel_address) as client:
        mark = quick.mark()
        client.connect()
        client.talk.say("//bye?reason=%0a" + "x" * 3000)
        client.talk.end()
        assert len(quick.wait_for("client.disconnected", after=mark).line) < 1500


# Our client


def test_our_client_answers_every_heartbeat_at_once_and_says_bye_when_it_stops(authority: Authority) -> None:
    with attached(Terms(1, authority.local, hb=60_000)) as (side, _, clients):
        clients.wait_for("server.connected", wire=2)  # with the longest interval that there is
        for idle in (0, 7, 1024, 99999):
            side.beat(idle)
            side.hear_answer()
        assert not clients.find("server.disconnected")
        clients.send(signal.SIGTERM)
        assert side.talk.hear().raw == b"//bye?reason=shutdown"
        with pytest.raises(EndedError):
            side.talk.read_line()
        assert clients.wait() == 0


def test_our_client_gives_a_silent_server_up_after_three_of_its_heartbeats() -> None:
    with attached(Terms(hb=round(1000 * INTERVAL)), env=SLOW) as (side, _, clients):
        began = time.monotonic()
        side.talk.rest()
        assert 2.5 * INTERVAL < time.monotonic() - began < 3 * INTERVAL + MARGIN
        clients.wait_for("server.disconnected", reason="silent")


@pytest.mark.programs
def test_the_interval_that_counts_is_the_server_s() -> None:
    with attached(Terms(hb=60_000), env={**CALM, "REPORT_INTERVAL": "50ms"}) as (side, _, clients):
        assert side.talk.is_silent(0.5)
        side.beat()
        side.hear_answer()
        assert not clients.find("server.disconnected")


SIGNS = {"v1's": b"", "of the future": b"//news?of=tomorrow", "of an unknown kind": b"//deadbeef#77"}


@pytest.mark.programs
def test_any_line_of_a_server_is_a_sign_of_life() -> None:
    with attached_each(SIGNS, Terms(hb=300), env=SLOW) as (clients, ends):
        for _ in range(10):
            for label, (side, _) in ends.items():
                assert side.talk.is_silent(0.05)
                side.talk.say(SIGNS[label])
        assert not clients.find("server.disconnected")


LINES_OF_A_SERVER = {
    "rubbish": b"\xff\xfe\x00\x01//#1",
    "no id": b"//#1",
    "an id that is no id": b"//../../etc/passwd#1",
    "an unknown id": b"//00000000#1",
    "an answer": b"//beat?ok=1",
    "a beat of nothing": b"//beat?idle=",
    "a beat of too much": b"//beat?idle=99999999999999999999999",
    "another offer": b"//9?v=2&hb=10#0",
    "an error": b"//error?reason=busy",
    "as long as may be": b"//news?x=".ljust(LONGEST_SIGNAL - 1, b"y"),
    "an address that is none": b"//deadbeef?from=nowhere&to=%s#1",
}


def test_lines_of_a_server_that_mean_nothing_harm_nobody() -> None:
    """They are ignored, or end this server's connection; the session that follows is served, or the client is back."""
    with Target() as target, attached_each(LINES_OF_A_SERVER, Terms(), target=target.address) as (clients, ends):
        for label, (side, data) in ends.items():
            side.talk.say(LINES_OF_A_SERVER[label])
            identity, talk = side.admit(data.accept_socket())
            if is_left(side, identity):
                clients.wait_in(label, "server.disconnected")
                continue
            with target.accept() as service:
                service.sendall(b"x")
                assert talk.receive_exactly(1) == b"x"


def is_left(side: ServerSide, identity: bytes) -> bool:
    """Launch a session and have a heartbeat answered; whether the client has ended the connection instead."""
    try:
        side.launch(identity, 1)
        side.beat()
        side.hear_answer()
    except ConnectionError:
        return True
    return False


@pytest.mark.programs
def test_there_is_no_launch_of_a_single_datagram_in_v2() -> None:
    """It would send a TCP visitor's bytes to the target's UDP port."""
    with Target() as target, attached(Terms(), target=target.address) as (side, data, clients):
        identity, talk = side.admit(data.accept_socket())
        side.launch(identity, 2)
        talk.send(b"not a datagram")
        clients.wait_for("signal.unknown", level="warn")
        target.udp.settimeout(0.2)
        with pytest.raises(TimeoutError):
            target.udp.recv(100)
        side.beat()
        side.hear_answer()


def test_a_launch_of_a_session_is_served_with_and_without_addresses() -> None:
    with Target() as target, attached(Terms(), target=target.address) as (side, data, _):
        for addresses in ("", "?from=192.0.2.7:4711&to=198.51.100.1:443", "?from=[2001:db8::7]:1&to=[::1]:2"):
            identity, talk = side.admit(data.accept_socket())
            side.talk.say(f"//{identity.decode()}{addresses}#1")
            with target.accept() as service:
                service.sendall(b"x")
                assert talk.receive_exactly(1) == b"x"


@pytest.mark.programs
def test_why_a_server_left_is_in_our_client_s_log() -> None:
    with attached(Terms()) as (side, _, clients):
        side.talk.say("//bye?reason=replaced")
        side.talk.end()
        clients.wait_for("server.disconnected", reason="replaced")


@pytest.mark.programs
def test_our_client_reads_on_behind_a_farewell_and_its_sessions_run_on() -> None:
    with Target() as target, attached(Terms(), target=target.address) as (side, data, clients):
        identity, talk = side.admit(data.accept_socket())
        side.launch(identity, 1)
        with target.accept() as service:
            side.talk.say("//bye?reason=shutdown")
            side.talk.end()
            clients.wait_for("server.disconnected")
            service.sendall(b"x")
            assert talk.receive_exactly(1) == b"x"


POOL = 16
"""Data connections that our client dials at first."""


@pytest.mark.programs
def test_our_client_makes_up_for_connections_that_only_it_believes_in() -> None:
    """A middlebox has dropped them without a word: the server counts fewer, and the client closes nothing."""
    with attached(Terms(hb=60_000), env={**CALM, "MIN_POOL_CAPACITY": str(POOL)}) as (side, data, clients):
        kept = [side.admit(data.accept_socket())[1] for _ in range(POOL)]
        beats = 0
        while not data.has_more():
            side.beat(POOL - 10)
            side.hear_answer()
            beats += 1
            assert beats < 20, "it never dials"
        assert beats >= 3, "it dials before it has been told three times"
        more = [side.admit(data.accept_socket())[1]]
        for _ in range(10):
            side.beat(POOL - 10)
            side.hear_answer()
            while data.has_more():
                more.append(side.admit(data.accept_socket())[1])
        assert len(more) <= POOL / 8, "it dials more than an eighth of its pool at once"
        assert all(talk.is_silent(0) for talk in kept)
        assert not clients.find("server.disconnected")


def test_our_client_dials_nothing_for_a_count_that_is_right() -> None:
    with attached(Terms(hb=60_000), env={**CALM, "MIN_POOL_CAPACITY": str(POOL)}) as (side, data, _):
        for _ in range(POOL):
            side.admit(data.accept_socket())
        for _ in range(10):
            side.beat(POOL)
            side.hear_answer()
        assert not data.has_more()


@pytest.mark.programs
def test_our_client_says_whether_a_target_answers() -> None:
    """A launch has shown it that there is none."""
    with attached(Terms()) as (side, data, clients):
        side.beat()
        side.hear_answer()
        identity, talk = side.admit(data.accept_socket())
        side.launch(identity, 1)
        talk.rest()
        clients.wait_for("target.unreachable")
        side.beat()
        assert not side.hear_answer()
    with Target() as target, attached(Terms(), target=target.address) as (side, data, _):
        identity, talk = side.admit(data.accept_socket())
        side.launch(identity, 1)
        with target.accept():
            side.beat()
            assert side.hear_answer()


@pytest.mark.parametrize("how", ["replaced", pytest.param("busy", marks=pytest.mark.programs)])
def test_our_client_waits_for_the_cooldown_when_another_one_has_its_place(how: str) -> None:
    """Two clients of one key would else throw each other out again and again."""
    with Listener() as tunnel, OurClients({"": (tunnel.address, "")}, env={"SERVICE_COOLDOWN": "2s"}):
        with tunnel.accept() as side:
            if how == "busy":
                side.hear_hello()
                side.talk.say("//error?reason=busy")
            else:
                side.negotiate()
                side.talk.say("//bye?reason=replaced")
            side.talk.end()
            side.talk.rest()
        began = time.monotonic()
        with tunnel.accept():
            assert time.monotonic() - began > 1


@pytest.mark.programs
def test_the_shortest_heartbeat_is_taken() -> None:
    with attached(Terms(hb=10)) as (_, _, clients):
        clients.wait_for("server.connected", wire=2)


@pytest.mark.programs
def test_our_own_server_and_a_v2_client_never_give_each_other_up() -> None:
    with (
        Target() as target,
        OurServer(env={**CALM, "REPORT_INTERVAL": "300ms"}) as server,
        V2Client(server.tunnel_address, target.address) as client,
    ):
        client.wait_until_full()
        with Tunnel(server, client, target).session() as (visitor, service):
            until(lambda: len(server.find("tunnel.report")) > 5)
            assert_connected(visitor, service)
        assert not server.find("client.disconnected")

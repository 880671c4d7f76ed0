"""What the metrics say is what has happened: sessions, bytes, times, failures, drops, on both ends."""

from __future__ import annotations

import contextlib
import datetime
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from cryptography import x509

from nodepass import __version__
from nodepass.daemon.key_file import generate
from tests.support.certificates import Authority
from tests.support.scrape import (
    WATCHED,
    Response,
    get,
    metrics_of,
    scrape,
    value,
    wait_for_more,
    wait_for_value,
)
from tests.support.sockets import (
    PATIENCE,
    Address,
    connect,
    datagram_socket,
    format_address,
    is_over,
    is_refused,
    is_silent,
    receive_exactly,
    reset,
    until,
)
from tests.support.target import Target
from tests.support.tunnel import OurClient, OurServer, Tunnel, assert_connected
from tests.support.v1_client import V1Client

ENDED = "nodepass_sessions_total"


@dataclass
class Watched:
    """A tunnel, and where either end serves its metrics."""

    tunnel: Tunnel
    server: Address
    client: Address

    @property
    def ends(self) -> tuple[Address, Address]:
        return self.server, self.client


@pytest.fixture(scope="module")
def shared(authority: Authority) -> Iterator[Watched]:
    """A tunnel under TLS; tests look at what they have added."""
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(Target())
        server = stack.enter_context(OurServer(2, authority.local, env=WATCHED))
        env = {**WATCHED, "SSL_CERT_FILE": str(authority.crt)}
        client = stack.enter_context(OurClient(server.tunnel_address, target.address, env=env))
        client.wait_until_connected()
        yield Watched(Tunnel(server, client, target), metrics_of(server), metrics_of(client))


def ended(place: Address, outcome: str, protocol: str = "tcp") -> float:
    return value(place, ENDED, protocol=protocol, outcome=outcome)


def free_address() -> Address:
    """An address that refuses connections."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address: Address = probe.getsockname()
    return address


def test_a_session_is_open_and_then_completed_on_both_ends(shared: Watched) -> None:
    before = [ended(place, "completed") for place in shared.ends]
    with shared.tunnel.session() as (visitor, service):
        assert_connected(visitor, service)
        for place in shared.ends:
            wait_for_value(place, 1, "nodepass_sessions_open", protocol="tcp")
    for place, count in zip(shared.ends, before, strict=True):
        wait_for_value(place, count + 1, ENDED, protocol="tcp", outcome="completed")
        wait_for_value(place, 0, "nodepass_sessions_open", protocol="tcp")


def test_a_reset_session_is_counted_as_one(shared: Watched) -> None:
    before = [ended(place, "reset") for place in shared.ends]
    with shared.tunnel.session() as (visitor, service):
        assert_connected(visitor, service)
        reset(visitor)
        assert is_over(service)
    for place, count in zip(shared.ends, before, strict=True):
        wait_for_value(place, count + 1, ENDED, protocol="tcp", outcome="reset")


def test_bytes_are_counted_by_direction_while_the_session_runs(shared: Watched) -> None:
    def moved(place: Address, direction: str) -> float:
        return value(place, "nodepass_bytes_total", protocol="tcp", direction=direction)

    before = [(moved(place, "up"), moved(place, "down")) for place in shared.ends]
    with shared.tunnel.session() as (visitor, service):
        visitor.sendall(b"u" * 1000)
        receive_exactly(service, 1000)
        service.sendall(b"d" * 300)
        receive_exactly(visitor, 300)
        for place, (up, down) in zip(shared.ends, before, strict=True):
            wait_for_value(place, up + 1000, "nodepass_bytes_total", protocol="tcp", direction="up")
            wait_for_value(place, down + 300, "nodepass_bytes_total", protocol="tcp", direction="down")


def test_datagrams_are_flows_with_bytes_of_their_own(shared: Watched) -> None:
    def moved(place: Address, direction: str) -> float:
        return value(place, "nodepass_bytes_total", protocol="udp", direction=direction)

    before = [(moved(place, "up"), moved(place, "down")) for place in shared.ends]
    shared.tunnel.exchange(b"question", b"the answer")
    for place, (up, down) in zip(shared.ends, before, strict=True):
        wait_for_value(place, up + 8, "nodepass_bytes_total", protocol="udp", direction="up")
        wait_for_value(place, down + 10, "nodepass_bytes_total", protocol="udp", direction="down")
        wait_for_more(place, 0, "nodepass_sessions_open", protocol="udp")


def test_times_are_histograms_that_count_each_session_once(shared: Watched) -> None:
    def counts() -> list[float]:
        return [
            value(shared.server, "nodepass_pool_wait_seconds_count"),
            value(shared.server, "nodepass_first_byte_seconds_count"),
            value(shared.client, "nodepass_first_byte_seconds_count"),
            value(shared.client, "nodepass_dial_seconds_count", to="target"),
        ]

    before = counts()
    for _ in range(3):
        with shared.tunnel.session() as (visitor, service):
            for _ in range(2):  # the second byte is not timed
                assert_connected(visitor, service)
    with shared.tunnel.session():  # no byte comes back: no time of a first one
        pass
    until(lambda: counts() == [before[0] + 4, before[1] + 3, before[2] + 3, before[3] + 4], what="counts of times")
    wait_for_more(shared.client, 15, "nodepass_dial_seconds_count", to="data")
    for place in shared.ends:
        buckets = [s for s in scrape(place) if s.name == "nodepass_first_byte_seconds_bucket"]
        assert [each.value for each in buckets] == sorted(each.value for each in buckets)
        assert buckets[-1].labels["le"] == "+Inf"
        assert buckets[-1].value == value(place, "nodepass_first_byte_seconds_count")
        assert 0 < value(place, "nodepass_first_byte_seconds_sum") < 60 * buckets[-1].value


def test_the_first_byte_is_timed_from_the_visitors_arrival(shared: Watched) -> None:
    before = [value(place, "nodepass_first_byte_seconds_sum") for place in shared.ends]
    with shared.tunnel.session() as (visitor, service):
        visitor.sendall(b"?")
        assert receive_exactly(service, 1) == b"?"
        assert is_silent(visitor, 0.5)
        service.sendall(b"!")
        assert receive_exactly(visitor, 1) == b"!"
    for place, seconds in zip(shared.ends, before, strict=True):
        wait_for_more(place, seconds + 0.49, "nodepass_first_byte_seconds_sum")


def test_peer_round_trip_pool_and_limits_are_told(shared: Watched) -> None:
    port = shared.tunnel.our_server.tunnel_address[1]
    assert value(shared.server, "nodepass_peer_info", peer="127.0.0.1", wire="2", tunnel=f"server:{port}") == 1
    assert value(shared.client, "nodepass_peer_info", peer=f"127.0.0.1:{port}", wire="2", tunnel=f"client:{port}") == 1
    until(lambda: any(s.name == "nodepass_round_trip_seconds" for s in scrape(shared.server)), what="round trip")
    assert 0 < value(shared.server, "nodepass_round_trip_seconds") < 60
    for place in shared.ends:
        wait_for_more(place, 15, "nodepass_pool_idle_connections")
        assert value(place, "nodepass_pool_capacity_connections") >= 16
        assert value(place, "nodepass_session_slots") == 1024
        assert value(place, "nodepass_build_info", version=__version__) == 1
        assert value(place, "nodepass_ready") == 1
        assert value(place, "nodepass_log_lines_lost_total") == 0


def test_the_expiry_is_that_of_the_certificate(shared: Watched, authority: Authority) -> None:
    certificate = x509.load_pem_x509_certificate(authority.local.crt.read_bytes())
    shown = value(shared.server, "nodepass_certificate_expiry_timestamp_seconds")
    assert datetime.datetime.fromtimestamp(shown, datetime.timezone.utc) == certificate.not_valid_after_utc


def test_readiness_says_why_not() -> None:
    def readiness(place: Address) -> Response:
        return get(place, "/readyz")

    with Target() as target, OurServer(env={**WATCHED, "SHUTDOWN_TIMEOUT": "60s"}) as server:
        place, port = metrics_of(server), server.tunnel_address[1]
        assert (readiness(place).status, readiness(place).body) == (503, f"server:{port}: no client is connected\n")
        assert value(place, "nodepass_ready") == 0
        assert get(place, "/healthz").status == 200
        with OurClient(server.tunnel_address, target.address, env=WATCHED) as client:
            client.wait_until_connected()
            until(lambda: readiness(place).status == 200, what="ready")
            assert readiness(place).body == f"server:{port}: ready\n"
            assert readiness(metrics_of(client)).body == f"client:{port}: ready\n"
            with Tunnel(server, client, target).session() as (visitor, service):
                assert_connected(visitor, service)
                server.send(signal.SIGTERM)
                until(lambda: readiness(place).status == 503, what="not ready")
                assert readiness(place).body == f"server:{port}: stopping\n"
                assert get(place, "/healthz").status == 200
            assert server.wait() == 0
            until(lambda: readiness(metrics_of(client)).status == 503, what="client not ready")
            assert readiness(metrics_of(client)).body == f"client:{port}: not connected to the server\n"
            wait_for_more(metrics_of(client), 0, "nodepass_handshake_failures_total", reason="unreachable")
            assert not [s for s in scrape(metrics_of(client)) if s.name == "nodepass_peer_info"]


def test_a_target_that_refuses_and_a_visitor_that_nobody_serves_are_outcomes() -> None:
    with OurServer(env={**WATCHED, "POOL_GET_TIMEOUT": "50ms"}) as server:
        place = metrics_of(server)
        assert is_refused(lambda: connect(server.visitor_address))
        wait_for_value(place, 1, ENDED, protocol="tcp", outcome="unserved")
        wait_for_more(place, 0.049, "nodepass_pool_wait_seconds_sum")
        wait_for_value(place, 1, "nodepass_pool_found_empty_total")
        with datagram_socket() as sender:
            sender.sendto(b"into the dark", server.visitor_address)
            wait_for_value(place, 1, "nodepass_udp_drops_total", reason="unserved")
        with OurClient(server.tunnel_address, free_address(), env=WATCHED) as client:
            client.wait_until_connected()
            server.wait_for("pool.added")
            assert is_refused(lambda: connect(server.visitor_address))
            wait_for_value(metrics_of(client), 1, ENDED, protocol="tcp", outcome="unreachable")
            wait_for_value(place, 1, ENDED, protocol="tcp", outcome="reset")
            with datagram_socket() as sender:
                for _ in range(2):  # that nobody listens there is heard after the first
                    sender.sendto(b"into the dark", server.visitor_address)
                wait_for_more(metrics_of(client), 0, "nodepass_udp_drops_total", reason="target_refused")


@pytest.mark.programs
def test_with_a_v1_client_datagrams_are_sessions_with_outcomes() -> None:
    env = {**WATCHED, "UDP_DATA_BUF_SIZE": "1000"}
    with Target() as target, OurServer(env=env) as server, V1Client(server.tunnel_address, target.address) as client:
        client.wait_until_full()
        place = metrics_of(server)
        Tunnel(server, client, target).exchange(b"question", b"the answer")
        wait_for_value(place, 1, ENDED, protocol="udp", outcome="completed")
        with datagram_socket() as sender:
            sender.sendto(b"", server.visitor_address)
            wait_for_value(place, 1, "nodepass_udp_drops_total", reason="empty")
            sender.sendto(bytes(1001), server.visitor_address)
            wait_for_value(place, 1, "nodepass_udp_drops_total", reason="too_large")
        assert value(place, "nodepass_peer_info", wire="1") == 1


@pytest.mark.programs
def test_a_flow_that_makes_room_is_evicted_and_one_whose_client_is_gone_is_lost() -> None:
    with Target() as target, OurServer(env={**WATCHED, "SEMAPHORE_LIMIT": "1"}) as server:
        place = metrics_of(server)
        with OurClient(server.tunnel_address, target.address, env=WATCHED) as client:
            client.wait_until_connected()
            tunnel = Tunnel(server, client, target)
            for _ in range(2):  # from two addresses
                tunnel.exchange(b"question", b"the answer")
            wait_for_value(place, 1, ENDED, protocol="udp", outcome="evicted")
            wait_for_value(place, 1, "nodepass_sessions_open", protocol="udp")
        wait_for_value(place, 1, ENDED, protocol="udp", outcome="lost")
        wait_for_value(place, 0, "nodepass_sessions_open", protocol="udp")


@pytest.mark.programs
def test_a_reconnect_is_counted() -> None:
    with Target() as target, OurServer(env=WATCHED) as server:
        place = metrics_of(server)
        for reconnects in range(2):
            with V1Client(server.tunnel_address, target.address) as client:
                client.wait_until_full()
                wait_for_value(place, reconnects, "nodepass_reconnects_total")
            until(lambda: get(place, "/readyz").status == 503, what="the client is gone")


@pytest.mark.programs
def test_who_is_turned_away_is_counted_by_reason(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(OurServer(1, env={**WATCHED, "TUNNEL_KEY": generate()}))
    other = {**WATCHED, "TUNNEL_KEY": generate()}
    client = stack.enter_context(OurClient(server.tunnel_address, ("127.0.0.1", 9), env=other))
    for run in (server, client):
        place = metrics_of(run)
        wait_for_more(place, 0, "nodepass_handshake_failures_total", connection="control", reason="key_mismatch")
    assert is_refused(lambda: connect(server.data_address))
    wait_for_value(metrics_of(server), 1, "nodepass_handshake_failures_total", connection="data", reason="no_client")


def test_a_data_connection_from_elsewhere_is_one_of_a_stranger(shared: Watched) -> None:
    address = shared.tunnel.our_server.data_address
    assert is_refused(lambda: socket.create_connection(address, PATIENCE, ("127.0.0.2", 0)))
    wait_for_value(shared.server, 1, "nodepass_handshake_failures_total", connection="data", reason="wrong_address")


@pytest.mark.programs
def test_a_refused_certificate_is_counted(authority: Authority) -> None:
    with OurServer(2, authority.issue("elsewhere.example"), env=WATCHED) as server:
        env = {**WATCHED, "SSL_CERT_FILE": str(authority.crt)}
        with OurClient(server.tunnel_address, ("127.0.0.1", 9), env=env) as client:
            failures = "nodepass_handshake_failures_total"
            wait_for_more(metrics_of(client), 0, failures, connection="control", reason="certificate")


def test_several_tunnels_are_told_apart() -> None:
    with OurServer(env=WATCHED, flags=("server://127.0.0.1:0/127.0.0.1:0?tls=0",)) as server:
        samples = scrape(metrics_of(server))
        names = {each.labels["tunnel"] for each in samples if each.name == "nodepass_tunnel_info"}
        assert len(names) == 2
        infos = [each.labels for each in samples if each.name == "nodepass_tunnel_info"]
        expected = {
            "role": "server",
            "name": "",
            "key": "no",
            "tls": "0",
            "tls_version": "",
            "group": "",
            "wire": "",
            "protocols": "tcp,udp",
        }
        assert [each | expected for each in infos] == infos
        lines = get(metrics_of(server), "/readyz").body.splitlines()
        assert {line.rpartition(": ")[0] for line in lines} == names
        assert format_address(server.tunnel_address).rpartition(":")[2] in " ".join(names)

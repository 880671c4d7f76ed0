"""A client behind a proxy, with each of the proxies that Debian has, and where they let only TLS pass."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.certificates import Authority
from tests.support.connect_proxy import ConnectProxy
from tests.support.process import Environment, Nodepass, run
from tests.support.proxies import PASSWORD, PROXIES, USER, inside_tls, microsocks, tinyproxy
from tests.support.sockets import free_port, receive_all, until
from tests.support.target import Target
from tests.support.tunnel import (
    BRISK,
    CALM,
    STEADY,
    OurClient,
    OurServer,
    Tunnel,
    assert_arrives,
    assert_connected,
    assert_half_closes_pass,
)

QUICK = {**CALM, "SERVICE_COOLDOWN": "200ms"}


@pytest.fixture(scope="module")
def server() -> Iterator[OurServer]:
    with OurServer(1, query="data_port=tunnel", env=CALM) as server:
        yield server


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    with Target() as target:
        yield target


@pytest.fixture
def login(tmp_path: Path) -> Path:
    """A file with a wrong password."""
    path = tmp_path / "login"
    path.write_text(f"{USER}:wrong\n")
    path.chmod(0o600)
    return path


def environment(proxy: str, login: Path | None = None) -> Environment:
    return {**QUICK, "TUNNEL_PROXY": proxy, **({"TUNNEL_PROXY_AUTH_FILE": str(login)} if login else {})}


def assert_carries(server: OurServer, client: OurClient, target: Target) -> None:
    tunnel = Tunnel(server, client, target)
    with tunnel.session() as ends:
        assert_half_closes_pass(*ends)
    assert tunnel.exchange(b"question", b"answer") == (b"question", b"answer")


def test_a_proxy_looks_up_the_server_and_its_password_is_shown_nowhere(server: OurServer, target: Target) -> None:
    with ConnectProxy(USER, PASSWORD) as proxy:
        env = {**QUICK, "TUNNEL_PROXY": f"http://{USER}:{PASSWORD}@127.0.0.1:{proxy.address[1]}"}
        with OurClient(("localhost", server.tunnel_address[1]), target.address, env=env) as client:
            client.wait_until_connected()
            assert_carries(server, client, target)
            assert set(proxy.asked) == {f"localhost:{server.tunnel_address[1]}"}
            client.send(signal.SIGUSR1)
            report = client.wait_for("process.bugs")
            assert report["bugs"] == 0
            assert not [line for line in client.lines if PASSWORD in line]


CASES = [
    pytest.param(name, has_login, marks=pytest.mark.programs(*needs), id=f"{name}{'-login' * has_login}")
    for name, (_, _, needs) in PROXIES.items()
    for has_login in (False, True)
]


@pytest.mark.parametrize(("name", "has_login"), CASES)
def test_a_tunnel_works_through_a_proxy_once_the_password_is_right(
    server: OurServer, target: Target, login: Path, name: str, has_login: bool
) -> None:
    scheme, start, _ = PROXIES[name]
    port = free_port()
    with start(port, has_login):
        url = f"{scheme}://127.0.0.1:{port}"
        with OurClient(
            server.tunnel_address, target.address, env=environment(url, login if has_login else None)
        ) as client:
            if has_login:
                refused = client.wait_for("server.unreachable", reason="proxy")
                assert f"the proxy {url} " in refused["error"]
                login.write_text(f"{USER}:{PASSWORD}\n")
            client.wait_until_connected(server=f"127.0.0.1:{server.tunnel_address[1]} through {url}")
            assert_carries(server, client, target)
            assert not [line for line in client.lines if PASSWORD in line]


@pytest.mark.parametrize(("name", "has_login"), [each for each in CASES if "login" in str(each.id)])
def test_a_proxy_that_demands_a_password_is_named_by_a_check(server: OurServer, name: str, has_login: bool) -> None:
    scheme, start, _ = PROXIES[name]
    port = free_port()
    with Target() as target, start(port, has_login):
        address = f"127.0.0.1:{server.tunnel_address[1]}"
        url = f"client://{address}/127.0.0.1:{target.address[1]}?tls=0"
        proxy = f"{scheme}://127.0.0.1:{port}"
        refused = run("--check", url, env={"TUNNEL_PROXY": proxy})
        assert refused.code == 1
        assert (
            f"server {address}: cannot be reached: the proxy {proxy} requires a user and a password" in refused.output
        )
        passed = run("--check", url, env={"TUNNEL_PROXY": f"{scheme}://{USER}:{PASSWORD}@127.0.0.1:{port}"})
        assert f"server {address}: reached through {proxy}" in passed.output
        assert PASSWORD not in passed.output
        assert passed.code == 0, passed.output


@pytest.mark.programs("squid", "squid's ssl-bump", "openssl")
@pytest.mark.parametrize("tls", [0, 1])
def test_a_tunnel_works_inside_tls_to_a_proxy(target: Target, authority: Authority, login: Path, tls: int) -> None:
    port = free_port()
    login.write_text(f"{USER}:{PASSWORD}\n")
    env = {**environment(f"https://127.0.0.1:{port}", login), "SSL_CERT_FILE": str(authority.crt)}
    with (
        OurServer(tls) as server,
        inside_tls(port, authority.local),
        OurClient(server.tunnel_address, target.address, env=env) as client,
    ):
        client.wait_until_connected()
        tunnel = Tunnel(server, client, target)
        for number in range(2):
            with tunnel.session() as ends:
                source, sink = ends[::-1] if number else ends
                assert_arrives(os.urandom(1 << 20), source, sink)
        assert tunnel.exchange(b"question", b"answer") == (b"question", b"answer")
        assert bool(client.find("server.clear_through_proxy")) == (not tls)
        with tunnel.session() as (visitor, service):
            assert_connected(visitor, service)
            client.kill()
            cut = (
                pytest.raises(ConnectionResetError) if tls else contextlib.nullcontext()
            )  # squid makes a whole one of it
            with cut:
                assert receive_all(visitor) == b""


@pytest.mark.programs("tinyproxy")
def test_a_proxy_that_does_not_allow_the_data_port_is_answered_by_one_port(target: Target) -> None:
    port, proxied = free_port(), free_port()
    with OurServer(1, tunnel=f"127.0.0.1:{proxied}") as server, tinyproxy(port, False, more=f"ConnectPort {proxied}\n"):
        env = environment(f"http://127.0.0.1:{port}")
        with OurClient(server.tunnel_address, target.address, env=env) as client:
            missing = client.wait_for("data.missing", reason="proxy")
            assert f"does not allow connections to 127.0.0.1:{server.data_address[1]}" in missing["error"]
            assert "DATA_PORT=tunnel" in missing.line


CUTS_AFTER = 6
"""Seconds without a byte after which the proxy ends a connection."""

LOWEST = 16
"""MIN_POOL_CAPACITY."""


@pytest.mark.programs("tinyproxy")
def test_a_proxy_that_ends_idle_connections_is_outlived_once_it_has(target: Target) -> None:
    port = free_port()
    with OurServer(1, env=STEADY) as server, tinyproxy(port, False, more=f"Timeout {CUTS_AFTER}\n"):
        env = {**STEADY, "TUNNEL_PROXY": f"http://127.0.0.1:{port}"}
        with OurClient(server.tunnel_address, target.address, env=env) as client:
            client.wait_for("pool.idle_cut")
            after, ends = server.mark(), time.monotonic() + 2.5 * CUTS_AFTER
            until(lambda: time.monotonic() > ends, 4 * CUTS_AFTER)
            left = [entry["idle"] for entry in server.find("pool.closed", after=after)]
            assert left, "none was replaced"
            assert min(left) >= LOWEST - 4
            Tunnel(server, client, target).assert_works()
            assert not client.find("server.disconnected"), "heartbeats keep the control connection busy"


@pytest.mark.programs("microsocks")
def test_a_server_that_stands_still_behind_a_proxy_is_given_up_after_three_heartbeats(target: Target) -> None:
    port = free_port()
    with OurServer(1, env=BRISK) as server, OurServer(1, env=BRISK) as other, microsocks(port, False):
        env = {**BRISK, "TUNNEL_PROXY": f"socks5h://127.0.0.1:{port}"}
        both = f"client://localhost:{server.tunnel_address[1]},127.0.0.1:{other.tunnel_address[1]}"
        with Nodepass(f"{both}/127.0.0.1:{target.address[1]}?log=debug&tls=1", env=env) as client:
            for each in (server, other):
                each.wait_for_client()
            server.send(signal.SIGSTOP)
            try:
                client.wait_for("server.disconnected", reason="silent")
                Tunnel(other, client, target).assert_works()
            finally:
                server.send(signal.SIGCONT)
            client.wait_for("server.connected", after=client.mark())

"""`nodepass --check` of a client: the handshake and the certificate, and that nobody is hurt by it."""

from __future__ import annotations

import contextlib

import pytest

from tests.support.certificates import Authority
from tests.support.checks import check_here, check_of, found, trouble
from tests.support.process import Environment, run
from tests.support.sockets import connect, format_address, free_port
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, OurServer, Tunnel, assert_connected
from tests.support.v1_server import V1Server
from tests.support.v2_network import SERVER, Network
from tests.support.v2_tunnel import KEYED, SECRET

needs_namespaces = pytest.mark.programs("network namespaces")


def url_of(server: OurServer | V1Server, target: Target) -> str:
    """The URL of a client of this server."""
    return f"client://{format_address(server.tunnel_address)}/{format_address(target.address)}"


ONE_PORT = {**KEYED, "DATA_PORT": "tunnel"}


@pytest.mark.programs
@pytest.mark.parametrize(("env", "tls"), [(CALM, 0), (CALM, 2), (KEYED, 1), (ONE_PORT, 1)])
def test_a_check_takes_no_visitor_from_the_client_that_is_started_after_it(
    stack: contextlib.ExitStack, authority: Authority, env: Environment, tls: int
) -> None:
    server = stack.enter_context(OurServer(tls, authority.local, env={**env, "POOL_GET_TIMEOUT": "60s"}))
    target = stack.enter_context(Target())
    visitor = stack.enter_context(connect(server.visitor_address))
    done = check_of(url_of(server, target), **env, SSL_CERT_FILE=str(authority.crt))
    target.accept().close()  # the check's own
    assert (done.code, trouble(done)) == (0, [])
    assert found(done, "ok", f"handshake complete: wire v2, tls {tls}")
    assert found(done, "ok", "both ends authenticated with the key") == ("TUNNEL_KEY" in env)
    assert found(done, "ok", "certificate verified for '127.0.0.1'") == (tls == 2)
    client_env = {**env, "SSL_CERT_FILE": str(authority.crt)}
    client = stack.enter_context(OurClient(server.tunnel_address, target.address, env=client_env))
    client.wait_until_connected()
    with target.accept() as service:
        assert_connected(visitor, service)
    assert not server.find("client.rejected") + server.find("client.replaced")


@pytest.mark.parametrize("env", [pytest.param(CALM, marks=pytest.mark.programs), KEYED], ids=["open", "keyed"])
def test_a_check_beside_the_running_client_leaves_it_alone(stack: contextlib.ExitStack, env: Environment) -> None:
    server = stack.enter_context(OurServer(1, env=env))
    target = stack.enter_context(Target())
    client = stack.enter_context(OurClient(server.tunnel_address, target.address, env=env))
    client.wait_until_connected()
    server.wait_for_client()
    with Tunnel(server, client, target).session() as (visitor, service):
        done = check_of(url_of(server, target), **env)
        target.accept().close()  # the check's own
        assert done.code == 0
        said = (
            "; the key matches; expected if" if env is KEYED else "responding; expected if that is this tunnel's client"
        )
        assert found(done, "warn", said)
        assert len(trouble(done)) == 1
        assert_connected(visitor, service)
    assert not server.find("client.replaced") + server.find("client.disconnected")
    Tunnel(server, client, target).assert_works()


@needs_namespaces
def test_a_check_from_another_machine_leaves_a_keyed_client_alone(stack: contextlib.ExitStack) -> None:
    network = stack.enter_context(Network())
    made = OurServer(1, tunnel=f"{SERVER}:0", target=f"{SERVER}:0", env=KEYED)
    server = network.server.inside(made.__enter__)
    stack.callback(server.kill)
    target = stack.enter_context(network.client.inside(Target))
    client = network.client.inside(lambda: OurClient(server.tunnel_address, target.address, env=KEYED).__enter__())
    stack.callback(client.kill)
    client.wait_until_connected()
    server.wait_for_client()
    done = network.server.inside(lambda: run("--check", url_of(server, target), env=KEYED))
    assert done.code == 0
    assert found(done, "warn", "; the key matches; expected if that is this tunnel's client")
    visitor = stack.enter_context(network.server.inside(lambda: connect(server.visitor_address)))
    with target.accept() as service:
        assert_connected(visitor, service)
    assert not server.find("client.replaced") + server.find("client.disconnected")


@pytest.mark.programs
def test_keys_that_do_not_agree_fail(stack: contextlib.ExitStack) -> None:
    keyed, keyless = (stack.enter_context(OurServer(1, env=env)) for env in (KEYED, CALM))
    target = stack.enter_context(Target())
    for server, env, said in (
        (keyed, CALM, "requires a key and this client has none"),
        (keyless, KEYED, "the server has no key for this tunnel"),
        (keyed, {**KEYED, "TUNNEL_KEY": "another long enough secret"}, "different keys"),
    ):
        done = check_of(url_of(server, target), **env)
        assert done.code == 1
        assert found(done, "fail", f"handshake failed: .*{said}"), said
        assert SECRET not in done.output


@pytest.mark.programs
def test_a_certificate_that_is_not_trusted_or_not_for_that_name_fails(
    stack: contextlib.ExitStack, authority: Authority
) -> None:
    target = stack.enter_context(Target())
    trusted = stack.enter_context(OurServer(2, authority.local))
    done = check_of(url_of(trusted, target))
    assert done.code == 1
    assert found(done, "fail", "certificate chain rejected")
    other = stack.enter_context(OurServer(2, authority.issue("example.com")))
    done = check_of(url_of(other, target), SSL_CERT_FILE=str(authority.crt))
    assert done.code == 1
    assert found(done, "fail", "name mismatch for '127.0.0.1': the certificate is for example.com")


def test_a_server_that_is_not_there_fails_and_a_target_that_is_not_there_is_a_warning() -> None:
    done = check_here(f"client://127.0.0.1:{free_port()}/127.0.0.1:{free_port()}")
    assert done.code == 1
    assert found(done, "warn", "target 127.0.0.1:.*: Connection refused")
    assert found(done, "fail", "server 127.0.0.1:.*: cannot be reached: .*Connection refused")


def test_a_peer_that_says_nothing_fails_within_the_handshake_timeout(stack: contextlib.ExitStack) -> None:
    silent, target = stack.enter_context(Target()), stack.enter_context(Target())
    url = f"client://{format_address(silent.address)}/{format_address(target.address)}"
    done = check_of(url, HANDSHAKE_TIMEOUT="300ms")
    assert done.code == 1
    assert found(done, "fail", "handshake failed: no handshake within 0.3s")


def test_servers_that_speak_wire_v1_pass_with_a_warning(stack: contextlib.ExitStack, authority: Authority) -> None:
    target = stack.enter_context(Target())
    servers = [stack.enter_context(V1Server(tls, authority.local)) for tls in (0, 1, 2)]
    done = check_of(*(url_of(server, target) for server in servers), SSL_CERT_FILE=str(authority.crt))
    assert done.code == 0
    for server in servers:
        name = f"client:{server.tunnel_address[1]}: .*"
        assert found(done, "ok", f"{name}handshake complete: wire v1, tls {server.tls}")
        assert found(done, "warn", f"{name}notices only at its next heartbeat")
        assert found(done, "ok", f"{name}certificate verified") == (server.tls == 2)


def test_a_client_of_a_server_in_the_same_command_is_not_tried(stack: contextlib.ExitStack) -> None:
    target = stack.enter_context(Target())
    tunnel = free_port()
    done = check_here(
        f"server://127.0.0.1:{tunnel}/127.0.0.1:0?tls=1", f"client://:{tunnel}/{format_address(target.address)}"
    )
    assert (done.code, trouble(done)) == (0, [])
    assert found(done, "ok", "another URL of this command")

"""Strangers at the tunnel port of a server with a key: they get nothing, and nobody waits for them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.e2e.test_v2_key import GUARDED, NONCE, assert_served
from tests.support.target import Target
from tests.support.tunnel import OurServer, Tunnel
from tests.support.v2_client import V2Client
from tests.support.v2_control import Refused, dial
from tests.support.v2_tunnel import KEYED, SECRET


@pytest.fixture
def server() -> Iterator[OurServer]:
    with OurServer(env=GUARDED) as running:
        yield running


OUT_OF_ORDER = {
    "auth first": f"//auth?mac={'0' * 64}\n//hello?v=2&nonce={NONCE}\n",
    "hello twice": f"//hello?v=2&nonce={NONCE}\n//hello?v=2&nonce={NONCE}\n",
    "empty lines": f"//hello?v=2&nonce={NONCE}\n\n\n\n",
    "auth without mac": f"//hello?v=2&nonce={NONCE}\n//auth\n",
    "a challenge": f"//hello?v=2&nonce={NONCE}\n//challenge?nonce={NONCE}\n",
    "too long": f"//hello?v=2&nonce={NONCE}\n" + "x" * 10000 + "\n",
    "a data connection": "//data\n",
}


def test_lines_out_of_order_never_get_a_tunnel_signal(server: OurServer, stack: contextlib.ExitStack) -> None:
    talks = {name: stack.enter_context(dial(server.tunnel_address)) for name in OUT_OF_ORDER}
    for name, talk in talks.items():
        talk.sock.sendall(OUT_OF_ORDER[name].encode())
    for name, talk in talks.items():
        with contextlib.suppress(ConnectionError):
            while line := talk.hear_line():
                assert line.startswith((b"//challenge?nonce=", b"//error?reason=")), (name, line)
    assert not server.find("client.connected") + server.find_crashes()
    assert_served(server)


def test_a_stranger_does_not_disturb_the_client_that_is_connected(server: OurServer) -> None:
    with Target() as target, V2Client(server.tunnel_address, target.address, secret=SECRET) as client:
        client.wait_until_full()
        tunnel = Tunnel(server, client, target)
        with tunnel.session() as _, dial(server.tunnel_address) as silent:
            wrong = V2Client(server.tunnel_address, secret="wrong", automatic=False)
            with wrong, pytest.raises(Refused, match="key-mismatch"):
                wrong.connect()
            assert silent.refusal() == "key-required"
            tunnel.assert_works()
        assert client.connects == 1


def test_silent_strangers_by_the_hundred_do_not_keep_the_client_out(stack: contextlib.ExitStack) -> None:
    """They may hold what they hold for HANDSHAKE_TIMEOUT: nobody who proves the key waits for those who do not."""
    server = stack.enter_context(OurServer(env={**KEYED, "HANDSHAKE_TIMEOUT": "60s"}))
    for _ in range(200):
        stack.enter_context(dial(server.tunnel_address))
    assert_served(server)

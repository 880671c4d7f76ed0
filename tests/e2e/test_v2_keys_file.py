"""A file with a key for each tunnel, from the other end of the wire: rotation, and keys that are taken away."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.tunnel import CALM
from tests.support.wire2 import lines
from tests.support.wire2.client_side import ClientSide, GoodbyeError
from tests.support.wire2.ours import OurServers
from tests.support.wire2.proofs import SECRET
from tests.support.wire2.talk import Rejected

OLD, NEW, OTHER = SECRET, "another secret that is long enough", "a third one that is as long as those"
IDENTITY = lines.make_client()


class Server:
    """Two tunnels on one port whose keys are in a file."""

    def __init__(self, servers: OurServers, file: Path) -> None:
        self.servers = servers
        self._file = file

    def client(self, secret: str, name: str = "web") -> ClientSide:
        return ClientSide(self.servers["web"].tunnel, secret=secret, name=name, identity=IDENTITY, demand=1)

    def write(self, *rows: str) -> None:
        """Change the file and have it read again."""
        mark = self.servers.mark()
        self._file.write_text("".join(f"{row}\n" for row in rows))
        self.servers.send(signal.SIGHUP)
        self.servers.wait_for("keys.reloaded", after=mark)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    file = tmp_path / "keys"
    file.write_text(f"# a comment\nweb {OLD}\nweb\t {NEW} \n- {OTHER}\n")
    file.chmod(0o600)
    queries = {"web": "tls=1&name=web", "": "tls=1"}
    with OurServers(queries, env={**CALM, "TUNNEL_KEYS_FILE": str(file)}, shares_port=True) as servers:
        yield Server(servers, file)
        assert not servers.find_crashes()


def told(client: ClientSide) -> str:
    """Connect and open a data connection; the token of the error, empty where the key was the right one."""
    with client:
        try:
            client.connect()
        except Rejected as rejected:
            return str(rejected)
        client.open_data()
        return ""


def test_two_lines_of_one_name_are_both_accepted_and_another_tunnel_s_is_not(server: Server) -> None:
    assert not told(server.client(OLD))
    assert not told(server.client(NEW))
    assert told(server.client(OTHER)) == "key-mismatch"
    assert not told(server.client(OTHER, ""))
    assert told(server.client(OLD, "")) == "key-mismatch"
    assert told(server.client(OLD, "nobody")) == "key-mismatch"


def test_a_client_whose_key_is_gone_is_ended_at_once_and_no_other(server: Server) -> None:
    with server.client(OLD) as gone, server.client(OTHER, "") as other:
        gone.connect()
        other.connect()
        _, idle = gone.open_data()
        server.write(f"web {NEW}", f"- {OTHER}")
        with pytest.raises(GoodbyeError):
            gone.hear_launch()
        assert idle.rest() == b""
        assert other.talk.is_silent(0.1)
        other.open_data()
    assert told(server.client(OLD)) == "key-mismatch"
    assert not told(server.client(NEW))


@pytest.mark.programs
def test_a_proof_that_comes_after_its_key_is_gone_is_refused(server: Server) -> None:
    """The challenge was asked while the key was still good."""
    with server.client(OLD) as late:
        late.begin()
        late.hear_challenge()
        server.write(f"web {NEW}", f"- {OTHER}")
        late.authenticate()
        assert late.talk.rejection() == "key-mismatch"


@pytest.mark.programs
def test_a_client_with_a_key_that_stays_notices_nothing(server: Server) -> None:
    with server.client(NEW) as client:
        client.connect()
        server.write(f"web {NEW}", f"- {OTHER}")
        assert client.talk.is_silent(0.1)
        client.open_data()

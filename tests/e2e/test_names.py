"""Many tunnels on one tunnel port: each has a name, a client, a key and a target of its own."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nodepass.daemon.key_file import generate
from tests.support.command import call
from tests.support.process import Nodepass
from tests.support.sockets import Address, connect, free_port, is_silent, parse_address
from tests.support.target import Target
from tests.support.tunnel import CALM, assert_connected

HOST = "127.0.0.1"
NAMES = ("web", "ssh")


@dataclass
class Shared:
    """A server with two tunnels on one port, and where its visitors connect."""

    server: Nodepass
    port: int
    keys: dict[str, str]
    file: Path
    visitors: dict[str, Address]

    def client(self, name: str, target: Target, key: str = "") -> Nodepass:
        """A client of one of the tunnels, not yet started."""
        url = f"client://{HOST}:{self.port}/{HOST}:{target.address[1]}?name={name}&log=debug"
        return Nodepass(url, env={**CALM, "TUNNEL_KEY": key or self.keys[name]})

    def write_keys(self, *names: str) -> None:
        """Leave only the keys of these tunnels in the file, and have it read again."""
        self.file.write_text("".join(f"{name} {self.keys[name]}\n" for name in names))
        self.server.send(signal.SIGHUP)


@contextlib.contextmanager
def shared_port(folder: Path, data_port: str = "0") -> Iterator[Shared]:
    keys = {name: generate() for name in NAMES}
    file = folder / "keys"
    file.touch(mode=0o600)
    file.write_text("".join(f"{name} {key}\n" for name, key in keys.items()))
    port = free_port()
    urls = [f"server://{HOST}:{port}/{HOST}:0?name={name}&log=debug" for name in NAMES]
    with Nodepass(*urls, env={**CALM, "TUNNEL_KEYS_FILE": str(file), "DATA_PORT": data_port}) as server:
        entries = {name: server.wait_for("server.listening", tunnel=f"server:{port}/{name}") for name in NAMES}
        visitors = {name: parse_address(entry["target_address"]) for name, entry in entries.items()}
        yield Shared(server, port, keys, file, visitors)


def assert_reaches(visitors: Address, target: Target) -> None:
    with connect(visitors) as visitor, target.accept() as service:
        assert_connected(visitor, service)


def test_each_tunnel_of_a_port_reaches_the_target_of_its_own_client(tmp_path: Path) -> None:
    """Here with data connections at the same port; below they have one of their own."""
    with contextlib.ExitStack() as stack:
        shared = stack.enter_context(shared_port(tmp_path, "tunnel"))
        targets = {name: stack.enter_context(Target()) for name in NAMES}
        clients = {name: stack.enter_context(shared.client(name, targets[name])) for name in NAMES}
        for client in clients.values():
            client.wait_for("server.connected", wire=2, tls=1)
        for name in NAMES:
            assert_reaches(shared.visitors[name], targets[name])
        clients["web"].kill()
        assert_reaches(shared.visitors["ssh"], targets["ssh"])


@pytest.mark.programs
def test_the_key_of_another_tunnel_does_not_open_this_one(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        shared = stack.enter_context(shared_port(tmp_path))
        target = stack.enter_context(Target())
        client = stack.enter_context(shared.client("web", target, key=shared.keys["ssh"]))
        client.wait_for("server.rejected", reason="key_mismatch")
        stranger = stack.enter_context(shared.client("nowhere", target, key=shared.keys["ssh"]))
        stranger.wait_for("server.rejected", reason="key_mismatch")
        shared.server.wait_for("client.rejected", error="there is no tunnel 'nowhere' at this port")


@pytest.mark.programs
def test_a_key_that_is_gone_ends_its_client_and_no_other(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        shared = stack.enter_context(shared_port(tmp_path))
        targets = {name: stack.enter_context(Target()) for name in NAMES}
        clients = {name: stack.enter_context(shared.client(name, targets[name])) for name in NAMES}
        for name, client in clients.items():
            client.wait_for("server.connected")
            assert_reaches(shared.visitors[name], targets[name])
        with connect(shared.visitors["ssh"]) as visitor, targets["ssh"].accept() as service:
            shared.write_keys("ssh")
            clients["web"].wait_for("server.disconnected", reason="reload")
            clients["web"].wait_for("server.rejected", error=re.compile("different keys"))
            url = f"client://{HOST}:{shared.port}/{HOST}:{targets['web'].address[1]}?name=web&tls=1"
            stack.enter_context(Nodepass(url, env=CALM)).wait_for("server.rejected", reason="key_required")
            assert_connected(visitor, service)
        assert not clients["ssh"].find("server.disconnected")
        assert_reaches(shared.visitors["ssh"], targets["ssh"])


def test_without_keys_an_unknown_name_is_refused_by_name() -> None:
    with contextlib.ExitStack() as stack:
        port = free_port()
        urls = [f"server://{HOST}:{port}/{HOST}:0?name={name}&tls=0" for name in NAMES]
        server = stack.enter_context(Nodepass(*urls, env=CALM))
        server.wait_for("server.listening", tunnel=f"server:{port}/ssh")
        target = stack.enter_context(Target())
        client = stack.enter_context(Nodepass(f"client://{HOST}:{port}/{HOST}:{target.address[1]}?name=db", env=CALM))
        client.wait_for("server.rejected", reason="unknown_name")
        with connect((HOST, port)) as silent:  # wire v1 has no name, and no tunnel here is without one
            assert is_silent(silent, 0.5)


def test_tunnels_of_one_port_that_disagree_are_bad_input() -> None:
    done = call(f"server://{HOST}:10101/{HOST}:0?name=a&tls=1", f"server://{HOST}:10101/{HOST}:0?name=b&tls=0")
    assert done.code == 2
    assert len(done.lines) == 1

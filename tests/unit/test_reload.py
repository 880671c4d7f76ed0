"""What the process does at SIGHUP: it reads the keys file again, and has every tunnel reload."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gevent
import pytest

from nodepass.config.settings import Settings
from nodepass.config.urls import parse_url
from nodepass.daemon import daemon
from nodepass.daemon.access_output import AccessOutputs
from nodepass.daemon.daemon import Daemon
from nodepass.daemon.key_file import Keys, generate
from nodepass.daemon.systemd import ServiceManager
from nodepass.log import Log
from nodepass.stats import Stats
from tests.unit.controls import until
from tests.unit.records import recorded

NAMES = ("web", "ssh")


class Stub:
    """A tunnel that counts how often it is told to reload."""

    def __init__(self, name: str) -> None:
        self.log, self.stats = Log(name), Stats()
        self.reloads = 0

    def reload(self) -> None:
        self.reloads += 1


class Process:
    """A process of two tunnels, a keys file, and what it logs about keys."""

    def __init__(self, file: Path, tunnels: list[Stub], log: list[Any]) -> None:
        self.file = file
        self.secrets = {name: generate() for name in NAMES}
        self.write(**self.secrets)
        self._log = log
        self.keys = Keys.find(None, str(file), {})
        self.tunnels = tunnels
        urls = [parse_url(f"server://:1/:2?name={name}") for name in NAMES]
        self.daemon = Daemon(urls, Settings(), self.keys, ServiceManager(), Stats(), AccessOutputs(Stats(), {}))

    def write(self, **secrets: str) -> None:
        self.file.write_text("".join(f"{name} {secret}\n" for name, secret in secrets.items()))
        self.file.chmod(0o600)

    def reload(self) -> list[tuple[str, str]]:
        """The events about keys of one reload, and the tunnels that they are about."""
        self._log.clear()
        self.daemon._reload()
        return self.events()

    def events(self) -> list[tuple[str, str]]:
        """What has been logged about keys."""
        return [(each.event, each.tunnel) for each in self._log if each.event.startswith("keys.")]


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Process]:
    tunnels = [Stub(name) for name in NAMES]
    monkeypatch.setattr(daemon, "make_tunnels", lambda *_: [partial(tunnels.__getitem__, i) for i in range(len(NAMES))])
    with recorded() as log:
        yield Process(tmp_path / "keys", tunnels, log)


def test_a_file_that_is_as_before_changes_nothing(process: Process) -> None:
    before = {name: process.keys.keys_for(name) for name in NAMES}
    assert process.reload() == []
    assert {name: process.keys.keys_for(name) for name in NAMES} == before
    assert [each.reloads for each in process.tunnels] == [1, 1]


def test_a_tunnel_whose_line_is_gone_needs_a_key_that_no_peer_has(process: Process) -> None:
    web, ssh = (process.keys.keys_for(name) for name in NAMES)
    process.write(ssh=process.secrets["ssh"])
    assert process.reload() == [("keys.reloaded", "nodepass"), ("keys.missing", "web")]
    assert process.keys.keys_for("ssh") == ssh
    (gone,) = process.keys.keys_for("web")
    assert gone not in (*web, *ssh)
    assert [each.reloads for each in process.tunnels] == [1, 1]


def test_two_lines_of_one_name_are_both_accepted(process: Process) -> None:
    (old,) = process.keys.keys_for("web")
    process.write(**process.secrets)
    with process.file.open("a") as file:
        file.write(f"web {generate()}\n")
    assert process.reload() == [("keys.reloaded", "nodepass")]
    kept, new = process.keys.keys_for("web")
    assert kept == old != new


def test_a_file_that_cannot_be_used_leaves_the_keys_as_they_are(process: Process) -> None:
    before = process.keys.keys_for("web")
    process.write(web="short")
    assert process.reload() == [("keys.reload_failed", "nodepass")]
    assert process.keys.keys_for("web") == before
    assert [each.reloads for each in process.tunnels] == [1, 1]
    assert not process.daemon.bugs


def test_a_file_that_could_not_be_used_is_read_once_it_has_changed_in_any_way(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here its mode, which let others change it; the process is told once only."""
    monkeypatch.setattr(daemon, "RETRY", 0.001)
    process.write(web=process.secrets["web"])
    process.file.chmod(0o666)
    assert process.reload() == [("keys.reload_failed", "nodepass")]
    gevent.sleep(0.01)
    assert [each.reloads for each in process.tunnels] == [1, 1], "as long as nothing has changed, nothing is read"
    process.file.chmod(0o600)
    until(lambda: [each.reloads for each in process.tunnels] == [2, 2])
    assert ("keys.reloaded", "nodepass") in process.events()
    assert not process.daemon.bugs

"""The files of contrib/systemd agree with the program."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nodepass.config.kinds import parse_duration
from nodepass.config.settings import rows
from nodepass.daemon.key_file import CREDENTIAL, CREDENTIALS
from nodepass.daemon.limits import OWN, PER_SESSION
from nodepass.net.sockets import KEEPALIVE, PROBES

UNITS = Path(__file__).resolve().parents[2] / "contrib" / "systemd"
EXAMPLE = (UNITS / "example.env").read_text()
SERVICE = (UNITS / "nodepass@.service").read_text()
SOCKET = (UNITS / "nodepass@.socket").read_text()


def value(unit: str, name: str) -> str:
    """The one value of a setting of a unit."""
    (found,) = re.findall(rf"^{name}=(.*)$", unit, re.MULTILINE)
    return str(found)


def test_the_example_has_every_setting_commented_with_its_default() -> None:
    for name, row in rows().items():
        assert f"\n#{name.upper()}={row.default}\n" in EXAMPLE, name


def test_the_example_has_no_setting_that_does_not_exist() -> None:
    known = {name.upper() for name in rows()} | {"NODEPASS_URL", "TUNNEL_KEY_FILE", "TUNNEL_KEYS_FILE"}
    assert set(re.findall(r"^#?([A-Z_]+)=", EXAMPLE, re.MULTILINE)) == known


def test_the_unit_waits_longer_than_the_program_does() -> None:
    assert float(value(SERVICE, "TimeoutStopSec").rstrip("s")) > parse_duration(rows()["shutdown_timeout"].default)
    start = value(SERVICE, "Environment").removeprefix("START_TIMEOUT=")
    assert float(value(SERVICE, "TimeoutStartSec").rstrip("s")) > parse_duration(start)


def test_the_unit_allows_as_many_descriptors_as_the_defaults_need() -> None:
    sessions, pool = (int(rows()[name].default) for name in ("semaphore_limit", "max_pool_capacity"))
    assert int(value(SERVICE, "LimitNOFILE")) > PER_SESSION * sessions + pool + OWN


@pytest.mark.parametrize("name", [CREDENTIAL, CREDENTIALS])
def test_the_unit_names_the_credentials_that_the_program_looks_for(name: str) -> None:
    assert f"\nLoadCredential={name}:nodepass.%i.{name}\n" in SERVICE


def test_the_socket_unit_sets_the_options_that_the_program_sets() -> None:
    seconds = [int(value(SOCKET, f"KeepAlive{name}").rstrip("s")) for name in ("TimeSec", "IntervalSec", "Probes")]
    assert tuple(seconds) == (KEEPALIVE, KEEPALIVE, PROBES)
    assert value(SOCKET, "NoDelay") == value(SOCKET, "KeepAlive") == value(SOCKET, "PassPacketInfo") == "yes"

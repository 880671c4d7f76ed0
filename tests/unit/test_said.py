"""What is said when it goes wrong: for each situation that one process sees alone, its line has cause and remedy.

`--check` finds them, and a start says the same. What takes two ends is in tests/e2e/test_said.py.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from nodepass.config.urls import Address
from nodepass.errors import ListenError, Notice
from nodepass.net import listen
from tests.support.checks import check_here
from tests.support.command import Accepted, call
from tests.support.process import Finished
from tests.support.sockets import format_address

SERVER = "server://127.0.0.1:0/127.0.0.1:0?tls=1&udp=off"
CLIENT = "client://127.0.0.1:9/127.0.0.1:9?tls=0"


def a_file_without_cas(folder: Path) -> Finished:
    file = folder / "ca.pem"
    file.touch()
    return check_here(CLIENT, SSL_CERT_FILE=str(file))


def a_port_in_use(_: Path) -> Finished:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        return check_here(f"server://{format_address(holder.getsockname())}/127.0.0.1:0?tls=1")


class Said(NamedTuple):
    situation: str
    make: Callable[[Path], Finished]
    cause: str
    remedy: str


TABLE = (
    Said(
        "an IPv6 address without brackets",
        lambda _: check_here("server://::1:10101/127.0.0.1:0"),
        "the tunnel address '::1:10101' is not usable",
        "an IPv6 address must be in brackets, as in [::1]:10101",
    ),
    Said(
        "an & that is not quoted",
        lambda _: check_here("server://127.0.0.1:0/127.0.0.1:0?tls=2"),
        "tls=2 needs crt=FILE (PEM); it is missing",
        "a shell ends the URL at an '&' that is not quoted",
    ),
    Said(
        "an address of another machine",
        lambda _: check_here("server://192.0.2.1:10101/127.0.0.1:0?tls=1"),
        "192.0.2.1 is not an address of this machine",
        ":10101 listens on all",
    ),
    Said(
        "a port in use",
        a_port_in_use,
        "tunnel address 127.0.0.1:",
        "in use by another address of this command",  # this process is the test
    ),
    Said(
        "a file of CAs that cannot be read",
        lambda _: check_here(CLIENT, SSL_CERT_FILE="/none"),
        "SSL_CERT_FILE=/none cannot be read: No such file or directory",
        "no server's certificate is trusted",
    ),
    Said(
        "a file of CAs that is empty",
        a_file_without_cas,
        "/ca.pem has no certificate in it",
        "allowed: PEM",
    ),
    Said(
        "a variable that Kubernetes has set",
        lambda _: check_here(SERVER, DATA_PORT="tcp://10.0.0.7:80"),
        "Kubernetes has set it for a service named 'data'",
        "enableServiceLinks: false",
    ),
    Said(
        "a metrics socket in a directory that systemd will make",
        lambda _: check_here(SERVER, METRICS_LISTEN="unix:/run/nodepass-of-no-test/web/metrics.sock"),
        "/run/nodepass-of-no-test/web does not exist",
        "expected if the unit's RuntimeDirectory= makes it",
    ),
)


@pytest.mark.parametrize("said", TABLE, ids=lambda said: said.situation)
def test_one_line_has_the_cause_and_the_remedy(said: Said, tmp_path: Path) -> None:
    lines = said.make(tmp_path).output.splitlines()
    assert [line for line in lines if said.cause in line and said.remedy in line and not line.startswith("ok")], lines


def test_a_metrics_socket_that_systemd_makes_room_for_is_no_failure() -> None:
    assert check_here(SERVER, METRICS_LISTEN="unix:/run/nodepass-of-no-test/web/metrics.sock").code == 0


def test_a_privileged_port_names_the_ways_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(listen, "_bind", refuse)
    with pytest.raises(
        ListenError, match=r":80: Permission denied; ports below 1024 need CAP_NET_BIND_SERVICE, a socket unit"
    ):
        listen.listen_tcp(Address("127.0.0.1", 80), "tunnel address")
    with pytest.raises(ListenError, match=r"Permission denied$"):
        listen.listen_tcp(Address("127.0.0.1", 8080), "tunnel address")


def test_a_client_without_cas_says_so_at_its_start_too(monkeypatch: pytest.MonkeyPatch) -> None:
    notices: list[Notice] = []
    monkeypatch.setattr("nodepass.cli._start_log", lambda _urls, _settings, warnings: notices.extend(warnings))
    for url in (SERVER, CLIENT):
        with pytest.raises(Accepted):
            call(url, env={"SSL_CERT_FILE": "/none"})
    assert [notice.reason for notice in notices] == ["no_cas"]

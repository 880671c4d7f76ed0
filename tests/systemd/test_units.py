"""The units of contrib/systemd under a real systemd, hardened as they are shipped."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.box import UNITS, Box, Unit, why_not
from tests.support.certificates import Authority, Certificate
from tests.support.sockets import PATIENCE, Address, connect, datagram_socket, receive_all, until
from tests.support.target import Target
from tests.support.tunnel import OurClient, assert_connected
from tests.support.v1_client import V1Client
from tests.support.v2_network import inside

REASON = why_not()
needs_box = pytest.mark.skipif(bool(REASON), reason=REASON)
needs_analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="not installed: systemd-analyze")

TUNNEL, VISITORS = ("127.0.0.1", 10101), ("127.0.0.1", 443)
SERVER = "server://:10101/:443?tls=0"
BRISK = {"REPORT_INTERVAL": "200ms", "SERVICE_COOLDOWN": "500ms", "DATA_PORT": "tunnel"}


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    with Box() as booted:
        yield booted


def unit(stack: contextlib.ExitStack, box: Box, name: str, urls: str = SERVER, **settings: str) -> Unit:
    return stack.enter_context(Unit(box, name, urls, {**BRISK, **settings}))


def activated(stack: contextlib.ExitStack, box: Box, name: str, urls: str = SERVER, **settings: str) -> Unit:
    """A unit whose ports its socket unit has opened: those of SERVER."""
    made = unit(stack, box, name, urls, **settings)
    box.systemctl("start", made.socket)
    return made


def service(stack: contextlib.ExitStack, box: Box) -> Target:
    return stack.enter_context(box.inside(Target))


def client(stack: contextlib.ExitStack, box: Box, target: Target, env: dict[str, str] | None = None) -> OurClient:
    """Our client in the box, connected to the unit's server."""
    made = OurClient(TUNNEL, target.address, env={**BRISK, **(env or {})})
    box.inside(lambda: stack.enter_context(made))
    made.wait_until_connected()
    return made


def visit(stack: contextlib.ExitStack, box: Box) -> socket.socket:
    return stack.enter_context(box.inside(lambda: connect(VISITORS)))


def assert_works(stack: contextlib.ExitStack, box: Box, target: Target) -> None:
    assert_connected(visit(stack, box), stack.enter_context(target.accept()))


@needs_analyze
def test_the_exposure_of_the_service_is_at_most_1_5() -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=15", str(UNITS / "nodepass@.service")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_box
def test_a_server_is_started_when_it_listens_and_its_status_is_kept_up(stack: contextlib.ExitStack, box: Box) -> None:
    server = activated(stack, box, "status")
    server.start()
    assert server.show("ActiveState") == "active"
    assert server.show("StatusText") == "client none, pool 0 idle of 16, 0 sessions, 0 flows"
    client(stack, box, service(stack, box))
    server.wait_for_status(r"client 127\.0\.0\.1:\d+ \(wire v2, round trip [\d.]+ ms\), pool 16 idle of 16, 0 sessions")
    assert not server.errors()


@needs_box
def test_a_client_is_started_when_it_is_connected_and_fails_in_time_with_the_reason(
    stack: contextlib.ExitStack, box: Box
) -> None:
    ours = unit(stack, box, "client", "client://127.0.0.1:10101/127.0.0.1:9", START_TIMEOUT="1s")
    assert "failed" in box.systemctl("start", ours.name, check=False)
    assert any(re.search("no handshake within START_TIMEOUT.*Connection refused", line) for line in ours.errors())
    activated(stack, box, "server").start()
    until(lambda: ours.show("ActiveState") == "active")  # Restart=on-failure has started it again
    ours.wait_for_status("server 127.0.0.1:10101")


@needs_box
def test_the_first_visitor_starts_a_server_on_port_443_without_privileges(
    stack: contextlib.ExitStack, box: Box
) -> None:
    server = activated(stack, box, "lazy")
    assert server.show("ActiveState") == "inactive"
    visitor, target = visit(stack, box), service(stack, box)
    client(stack, box, target)
    assert_connected(visitor, stack.enter_context(target.accept()))
    owner, capabilities = box.run("sh", "-c", f"stat -c %u /proc/{server.pid}; grep CapPrm /proc/{server.pid}/status").split("\n")[:2]
    assert int(owner) >= 61184  # the first of the dynamic ones
    assert capabilities.split() == ["CapPrm:", "0" * 16]


@needs_box
def test_a_socket_that_fits_no_url_fails_the_unit_with_one_line_and_for_good(
    stack: contextlib.ExitStack, box: Box
) -> None:
    server = activated(stack, box, "misfit", "server://:10101/:8443?tls=0")
    assert "failed" in box.systemctl("start", server.name, check=False)
    assert server.show("ActiveState") == "failed"  # and not waiting to be started again
    assert any(
        re.search(r"systemd passed \[::\]:443 \(tcp, .*\), \[::\]:443 \(udp, .*\), which fits no URL", line)
        for line in server.errors()
    )


class Load:
    """Visitors who come one after another, each with a question that the service answers."""

    def __init__(self, box: Box, target: Target, at_once: int) -> None:
        self.served, self.lost = 0, list[str]()
        self._target = target
        self._ending = threading.Event()
        works = [self._visit] * at_once + [self._ask, self._serve, self._answer]
        self._threads = [threading.Thread(target=box.inside_forever(work)) for work in works]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(PATIENCE)

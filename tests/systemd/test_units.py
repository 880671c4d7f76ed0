"""The units of contrib/systemd under a real systemd, hardened as they are shipped."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator

import pytest

from nodepass.daemon.key_file import generate
from tests.support.box import UNITS, BootError, Box, Unit
from tests.support.certificates import Authority, Certificate
from tests.support.handover import HANDOVERS
from tests.support.scope import Closes
from tests.support.sockets import PATIENCE, connect, datagram_socket, is_over, is_silent, receive_all, until
from tests.support.target import Target
from tests.support.tunnel import OurClient, OurServer, assert_connected
from tests.support.v2_network import enter

needs_box = pytest.mark.programs("a box")

TUNNEL, VISITORS = ("127.0.0.1", 10101), ("127.0.0.1", 443)
SERVER = "server://:10101/:443?tls=0"
KEYED = "server://:10101/:443"
SETTINGS = {"REPORT_INTERVAL": "1s", "SERVICE_COOLDOWN": "500ms", "DATA_PORT": "tunnel"}


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    with contextlib.ExitStack() as stack:
        try:
            booted = stack.enter_context(Box())
        except BootError as error:
            pytest.skip(f"systemd does not boot here: {error}")
        yield booted


def unit(stack: contextlib.ExitStack, box: Box, name: str, urls: str = SERVER, **settings: str) -> Unit:
    return stack.enter_context(Unit(box, name, urls, {**SETTINGS, **settings}))


def activated(stack: contextlib.ExitStack, box: Box, name: str, urls: str = SERVER, **settings: str) -> Unit:
    """A unit whose ports its socket unit has opened: those of SERVER."""
    made = unit(stack, box, name, urls, **settings)
    box.systemctl("start", made.socket)
    return made


def service(stack: contextlib.ExitStack, box: Box) -> Target:
    return stack.enter_context(box.inside(Target))


def client(stack: contextlib.ExitStack, box: Box, target: Target, env: dict[str, str] | None = None) -> OurClient:
    """Our client in the box, connected to the unit's server."""
    made = OurClient(TUNNEL, target.address, env={**SETTINGS, **(env or {})})
    box.inside(lambda: stack.enter_context(made))
    made.wait_until_connected()
    return made


def visit(stack: contextlib.ExitStack, box: Box) -> socket.socket:
    return stack.enter_context(box.inside(lambda: connect(VISITORS)))


def assert_works(stack: contextlib.ExitStack, box: Box, target: Target) -> None:
    assert_connected(visit(stack, box), stack.enter_context(target.accept()))


@pytest.mark.programs("systemd-analyze")
def test_the_exposure_of_the_service_is_at_most_1_5() -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=15", str(UNITS / "nodepass@.service")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_box
def test_a_server_is_started_when_it_listens_and_its_status_is_kept_up(stack: contextlib.ExitStack, box: Box) -> None:
    server = activated(stack, box, "status")
    server.start()
    assert server.show("ActiveState") == "active"
    assert server.show("StatusText") == "client none, pool 0 idle of 16, 0 sessions, 0 flows, security: none"
    client(stack, box, service(stack, box))
    server.wait_for_status(r"client 127\.0\.0\.1:\d+ \(wire v2, round trip [\d.]+ ms\), pool 16 idle of 16, 0 sessions")
    server.kill(signal.SIGUSR1)
    path = server.wait_for("process.bugs")["path"]
    assert path == "/run/nodepass/status/greenlets"
    assert "Greenlet" in box.run("cat", path)
    assert box.run("stat", "--format=%a", path).strip() == "600"
    assert not server.errors()


@needs_box
def test_a_client_is_started_when_it_is_connected_and_fails_in_time_with_the_reason(
    stack: contextlib.ExitStack, box: Box
) -> None:
    ours = unit(stack, box, "client", "client://127.0.0.1:10101/127.0.0.1:9", START_TIMEOUT="500ms")
    ours.drop_in("[Service]\nRestartSec=100ms\n")
    assert "failed" in box.systemctl("start", ours.name, check=False)
    assert any(re.search("START_TIMEOUT.*Connection refused", line) for line in ours.errors())
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
    state = box.run("cat", f"/proc/{server.pid}/status")
    assert re.search(r"^Uid:\s+6[1-5]\d{3}\s", state, re.MULTILINE)  # of the range of dynamic users
    assert re.search(r"^CapPrm:\s+0+$", state, re.MULTILINE)


@needs_box
def test_each_instance_is_a_user_of_its_own(stack: contextlib.ExitStack, box: Box) -> None:
    users = set()
    for name in ("one", "the_longest-name_of_22"):
        url = "server://127.0.0.1:0/127.0.0.1:0?tls=0&traffic_limit=1TB/month"
        server = unit(stack, box, name, url, DATA_PORT="0")
        server.start()
        users.add(server.show("UID"))
        state = f"/var/lib/nodepass/{name}"
        assert box.run("stat", "--format=%a", f"{state}/", f"{state}/traffic-server-0.lock").split() == ["700", "600"]
    assert len(users) == 2


@needs_box
def test_a_socket_that_fits_no_url_fails_the_unit_with_one_line_and_for_good(
    stack: contextlib.ExitStack, box: Box
) -> None:
    server = activated(stack, box, "misfit", "server://:10101/:8443?tls=0")
    assert "failed" in box.systemctl("start", server.name, check=False)
    assert server.show("ActiveState") == "failed"  # and not waiting to be started again
    assert any(re.search(r"\[::\]:443 \(tcp, .*\), \[::\]:443 \(udp, .*\)", line) for line in server.errors())


class Load(Closes):
    """Visitors who come one after another, several at once, by TCP; and one who goes on sending datagrams."""

    def __init__(self, box: Box, target: Target) -> None:
        self.served, self.answered = 0, 0
        self.lost: list[str] = []
        self._box, self._target = box, target
        self._leaving, self._closing = threading.Event(), threading.Event()
        self._visitors = [self._start(each, self._leaving) for each in [self._come] * 6 + [self._ask]]
        self._services = [self._start(each, self._closing) for each in (self._serve, self._answer)]

    def close(self) -> None:
        for ending, threads in ((self._leaving, self._visitors), (self._closing, self._services)):
            ending.set()
            for thread in threads:
                thread.join(2 * PATIENCE)

    def go_on(self) -> None:
        """Return when a few more have been served."""
        tcp, udp = self.served + 30, self.answered + 3
        until(lambda: self.lost or (self.served >= tcp and self.answered >= udp))
        assert not self.lost

    def _start(self, work: Callable[[], None], ending: threading.Event) -> threading.Thread:
        def enter_and_repeat() -> None:
            enter(self._box.network)
            while not ending.is_set():
                work()

        thread = threading.Thread(target=enter_and_repeat)
        thread.start()
        return thread

    def _come(self) -> None:
        try:
            with connect(VISITORS) as visitor:
                visitor.sendall(b"ping")
                answer = receive_all(visitor)
            if answer != b"pong":
                self.lost.append(f"answered with {answer!r}")
            self.served += 1
        except OSError as error:
            self.lost.append(f"visitor: {error}")

    def _ask(self) -> None:
        with datagram_socket(timeout=0.1) as visitor:
            visitor.connect(VISITORS)
            try:
                while not self._leaving.is_set():
                    visitor.send(b"ping")
                    with contextlib.suppress(TimeoutError):
                        visitor.recv(100)
                        self.answered += 1
            except OSError as error:  # the port was closed
                self.lost.append(f"datagram: {error}")

    def _serve(self) -> None:
        with contextlib.suppress(TimeoutError), self._target.accept(0.1) as service:
            service.recv(4)
            service.sendall(b"pong")

    def _answer(self) -> None:
        self._target.udp.settimeout(0.1)
        with contextlib.suppress(TimeoutError):
            self._target.udp.sendto(*self._target.udp.recvfrom(100))


@needs_box
def test_a_restart_under_load_refuses_and_loses_no_visitor(stack: contextlib.ExitStack, box: Box) -> None:
    server = activated(stack, box, "restart")
    target = service(stack, box)
    client(stack, box, target)
    with Load(box, target) as load:
        load.go_on()
        for _ in range(2):
            before = server.pid
            box.systemctl("restart", server.name)
            assert server.pid != before
            load.go_on()
    assert not load.lost
    assert not server.errors()


@needs_box
def test_systemd_follows_a_handover_and_stops_both_processes(stack: contextlib.ExitStack, box: Box) -> None:
    server = activated(stack, box, "handover", SHUTDOWN_TIMEOUT="100ms")
    server.drop_in("[Service]\nRestartSec=100ms\n")
    target = service(stack, box)
    client(stack, box, target)
    with visit(stack, box) as visitor, target.accept() as accepted:
        assert_connected(visitor, accepted)
        first = server.pid
        second = hand_over(server)
        assert_works(stack, box, target)
        assert_connected(visitor, accepted)
        server.kill(signal.SIGKILL)  # of the new process, and systemd notices although the old one runs
        until(lambda: server.show("NRestarts") == "1")
        until(lambda: server.show("ActiveState") == "active" and server.pid not in (0, first, second))
        assert is_over(visitor)
    with visit(stack, box) as visitor, target.accept() as accepted:
        assert_connected(visitor, accepted)
        hand_over(server)
        box.systemctl("stop", server.socket, server.name)
        assert is_over(visitor)
    assert server.show("Result") == "success"


@needs_box
def test_handovers_under_load_lose_no_visitor(stack: contextlib.ExitStack, box: Box) -> None:
    server = activated(stack, box, "succession")
    target = service(stack, box)
    client(stack, box, target)
    with Load(box, target) as load:
        for _ in range(HANDOVERS):
            hand_over(server)
            load.go_on()
    assert not load.lost
    assert not server.errors()


def hand_over(unit: Unit) -> int:
    """Have a new process take over; its id."""
    before = unit.pid
    unit.kill(signal.SIGUSR2)
    until(lambda: unit.pid not in (0, before))
    return unit.pid


@needs_box
def test_a_client_under_systemd_hands_over(stack: contextlib.ExitStack, box: Box) -> None:
    target = service(stack, box)
    server = OurServer(tunnel="127.0.0.1:10101", target="127.0.0.1:443")
    box.inside(lambda: stack.enter_context(server))
    own = unit(stack, box, "leaving", f"client://127.0.0.1:10101/127.0.0.1:{target.address[1]}?tls=0")
    own.start()
    with visit(stack, box) as visitor, target.accept() as accepted:
        assert_connected(visitor, accepted)
        hand_over(own)
        assert_connected(visitor, accepted)
        assert_works(stack, box, target)
    assert not own.errors()
    assert server.is_running


@needs_box
def test_a_stop_drains_for_as_long_as_shutdown_timeout_says(stack: contextlib.ExitStack, box: Box) -> None:
    server = activated(stack, box, "drain", SHUTDOWN_TIMEOUT="60s")
    server.drop_in("[Service]\nTimeoutStopSec=500ms\n")
    target = service(stack, box)
    client(stack, box, target)
    with visit(stack, box) as visitor, target.accept() as accepted:
        assert_connected(visitor, accepted)
        box.systemctl("stop", "--no-block", server.socket, server.name)  # else its client would start it again
        server.wait_for_status("stopping: .*1 sessions")
        assert is_silent(visitor, 1)  # twice what the unit says
        assert_connected(visitor, accepted)
    until(lambda: server.show("ActiveState") == "inactive")
    assert server.show("Result") == "success"


@needs_box
def test_a_blocked_process_is_killed_and_started_again_and_its_visitors_wait(
    stack: contextlib.ExitStack, box: Box
) -> None:
    server = activated(stack, box, "watchdog")
    server.drop_in("[Service]\nWatchdogSec=2s\nRestartSec=100ms\n")
    target = service(stack, box)
    client(stack, box, target)
    assert_works(stack, box, target)
    server.kill(signal.SIGSTOP)
    assert_works(stack, box, target)
    assert server.show("NRestarts") != "0"
    server.wait_for_text("Watchdog timeout")


def store(box: Box, name: str, text: str) -> None:
    """Put a secret where only root can read it."""
    box.write(f"/etc/credstore/nodepass.{name}", text, 0o600)


@needs_box
def test_a_key_is_a_credential(stack: contextlib.ExitStack, box: Box) -> None:
    key = generate()
    store(box, "keyed.tunnel-key", key)
    activated(stack, box, "keyed", KEYED)
    target = service(stack, box)
    stranger = OurClient(TUNNEL, target.address, env=SETTINGS)
    box.inside(lambda: stack.enter_context(stranger))
    stranger.wait_for("server.rejected", reason="key_required")
    client(stack, box, target, {"TUNNEL_KEY": key})
    assert_works(stack, box, target)


@needs_box
def test_a_reload_brings_new_keys_that_only_root_can_read(stack: contextlib.ExitStack, box: Box) -> None:
    old, new = generate(), generate()
    store(box, "rotated.tunnel-keys", f"- {old}\n")
    server = activated(stack, box, "rotated", KEYED, TUNNEL_KEYS_FILE="/run/nodepass/rotated/tunnel-keys")
    target = service(stack, box)
    first = client(stack, box, target, {"TUNNEL_KEY": old})
    server.wait_for_status(r", security: key, tls 1 \(TLS 1\.3.*\)")
    store(box, "rotated.tunnel-keys", f"- {new}\n")
    box.systemctl("reload", server.name)
    first.wait_for("server.rejected", reason="key_mismatch")
    client(stack, box, target, {"TUNNEL_KEY": new})
    assert_works(stack, box, target)
    assert not server.errors()


def renew(box: Box, certificate: Certificate) -> None:
    for kind, file in (("crt", certificate.crt), ("key", certificate.key)):
        store(box, f"verified.{kind}", file.read_text())


@needs_box
def test_a_reload_brings_a_renewed_certificate_that_only_root_can_read(
    stack: contextlib.ExitStack, box: Box, authority: Authority
) -> None:
    files = "crt=/run/nodepass/verified/tls.crt&key=/run/nodepass/verified/tls.key"
    renew(box, authority.local)
    server = activated(stack, box, "verified", f"server://:10101/:443?tls=2&{files}")
    target = service(stack, box)
    box.write("/etc/nodepass/ca.crt", authority.crt.read_text())
    host, port = target.address
    trusting = {"SSL_CERT_FILE": "/etc/nodepass/ca.crt"}
    peer = unit(stack, box, "trusting", f"client://127.0.0.1:10101/{host}:{port}", **trusting)
    for each in (server, peer):
        each.start()
    assert_works(stack, box, target)
    for trap in ("ln -s /srv/stolen", "mkfifo"):  # of a compromised service, for a reload as root
        for name in ("tls.key", "tls.crt"):
            box.run("sh", "-c", f"{trap} /run/nodepass/verified/{name}.new")
        certificate = authority.issue()
        renew(box, certificate)
        box.systemctl("reload", server.name)
        server.wait_for("certificate.reloaded", sha256=certificate.fingerprint)
        assert_works(stack, box, target)
    assert "stolen" not in box.run("ls", "/srv")
    owner = box.run("stat", "-c", "%a %u", "/run/nodepass/verified/tls.key", f"/proc/{server.pid}").split()
    assert owner[0] == "600"
    assert owner[1] == owner[3]
    assert not server.errors()
    assert not peer.errors()

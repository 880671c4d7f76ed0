"""What a container needs: an image whose inputs are there, process 1, a read-only root, health, one published port."""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import shlex
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from nodepass.config.settings import rows
from tests.support.process import REPOSITORY, Nodepass, scrubbed
from tests.support.sockets import connect, free_port
from tests.support.target import Target
from tests.support.tunnel import OurClient, OurServer, assert_connected, listening
from tests.support.v2_network import SERVER, Network
from tests.support.v2_tunnel import SECRET
from tests.support.wheels import build_wheel

DOCKERFILE = (REPOSITORY / "Dockerfile").read_text().replace("\\\n", " ")
COMPOSE = REPOSITORY / "contrib" / "docker" / "compose.yaml"
needs_namespaces = pytest.mark.programs("network namespaces")


def instructions(name: str) -> list[str]:
    """What stands behind an instruction of the Dockerfile, wherever it is given."""
    return re.findall(rf"^{name} (.+)$", DOCKERFILE, re.MULTILINE)


def copied() -> list[str]:
    """What the image's build copies from the checkout."""
    words = [shlex.split(line) for line in instructions("COPY")]
    return [source for line in words if not line[0].startswith("--from") for source in line[:-1]]


def is_ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path of the top level from the build: the last pattern that matches decides."""
    verdict = False
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#") and fnmatch(path, pattern.lstrip("!")):
            verdict = not pattern.startswith("!")
    return verdict


def test_everything_that_the_image_copies_is_there_and_not_ignored() -> None:
    assert "nodepass" in copied()
    for source in copied():
        assert (REPOSITORY / source).exists(), source
        assert not is_ignored(source), source
    assert is_ignored("tests")


@pytest.mark.programs
def test_what_the_image_copies_is_enough_to_install_from(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, tmp_path / "context", copied())
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    assert {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "nodepass").rglob("*.py")} <= names
    assert any(name.endswith("entry_points.txt") for name in names)


def test_the_image_runs_the_program_as_process_1_and_as_nobody() -> None:
    assert instructions("ENTRYPOINT") == ['["nodepass"]']
    assert instructions("USER") == ["65532:65532"]
    assert instructions("STOPSIGNAL") == ["SIGTERM"]
    (health,) = instructions("HEALTHCHECK")
    assert health.endswith('CMD ["python", "-m", "nodepass.metrics.healthcheck"]')
    assert any("METRICS_LISTEN=unix:/dev/shm/nodepass.sock" in line for line in instructions("ENV"))


class Contained(Nodepass):
    """The program as process 1 of its own PID namespace, on a root file system that it cannot write to."""

    prefix = (
        *("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--mount", "sh", "-c"),
        'mount -o remount,bind,ro / && ! touch /nodepass-was-here 2>/dev/null && exec "$0" "$@"',
    )

    @property
    def inner(self) -> int:
        """Process 1, as this machine counts."""
        return int(Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text())


@pytest.mark.programs("mount namespaces")
def test_as_process_1_on_a_read_only_root_it_serves_by_environment_and_drains_at_sigterm(
    stack: contextlib.ExitStack,
) -> None:
    env = {"NODEPASS_URL": "server://127.0.0.1:0/127.0.0.1:0?tls=1", "DATA_PORT": "tunnel", "SHUTDOWN_TIMEOUT": "20s"}
    server = stack.enter_context(Contained(env=env))
    tunnel, data, visitors = listening(server)
    assert data == tunnel
    status = Path(f"/proc/{server.inner}/status").read_text()
    assert re.search(r"^NSpid:\s+\d+\s+1$", status, re.MULTILINE)
    target = stack.enter_context(Target())
    client = stack.enter_context(OurClient(tunnel, target.address))
    client.wait_until_connected()
    with connect(visitors) as visitor, target.accept() as service:
        assert_connected(visitor, service)
        os.kill(server.inner, signal.SIGTERM)
        server.wait_for("process.stopping", sessions=1)
        assert_connected(visitor, service)
    assert server.wait() == 0
    assert not server.find("process.cut")


def health(listen: str) -> subprocess.CompletedProcess[str]:
    """Run the health check as the image does."""
    return subprocess.run(
        [sys.executable, "-m", "nodepass.metrics.healthcheck"],
        env=scrubbed({"METRICS_LISTEN": listen}),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


class Answer(http.server.BaseHTTPRequestHandler):
    """Well at /healthz while the server says so."""

    def do_GET(self) -> None:
        self.send_response(self.server.answer if self.path == "/healthz" else 404)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Nothing."""


@contextlib.contextmanager
def answering(kind: type[socketserver.TCPServer], address: object) -> Iterator[socketserver.TCPServer]:
    """A process that answers health checks."""
    with kind(address, Answer) as server:  # type: ignore[arg-type]
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class UnixServer(socketserver.UnixStreamServer):
    def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
        return super().get_request()[0], ("", 0)


@pytest.mark.parametrize(("answer", "code"), [(200, 0), (503, 1)])
def test_the_health_check_asks_by_tcp_and_by_unix_socket(tmp_path: Path, answer: int, code: int) -> None:
    with answering(socketserver.TCPServer, ("127.0.0.1", 0)) as server:
        server.answer = answer  # type: ignore[attr-defined]
        done = health(f":{server.server_address[1]}")
        assert (done.returncode, str(answer) in done.stdout) == (code, True)
    with answering(UnixServer, str(tmp_path / "metrics")) as server:
        server.answer = answer  # type: ignore[attr-defined]
        assert health(f"unix:{tmp_path}/metrics").returncode == code


@pytest.mark.parametrize("listen", ["off", "127.0.0.1:1", "nonsense", "unix:/nowhere"])
def test_without_anybody_to_ask_the_health_check_fails_in_one_line(listen: str) -> None:
    done = health(listen)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "METRICS_LISTEN" in done.stderr


@pytest.mark.programs
def test_a_running_server_and_a_running_client_are_healthy(stack: contextlib.ExitStack) -> None:
    ports = free_port(2), free_port()
    server = stack.enter_context(OurServer(env={"METRICS_LISTEN": f"127.0.0.1:{ports[0]}"}))
    env = {"METRICS_LISTEN": f"127.0.0.1:{ports[1]}"}
    client = stack.enter_context(OurClient(server.tunnel_address, ("127.0.0.1", 9), env=env))
    client.wait_until_connected()
    assert [health(f":{port}").returncode for port in ports] == [0, 0]


def composed() -> dict[str, dict[str, object]]:
    """The services of the example."""
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert isinstance(services, dict)
    return services


def test_the_example_publishes_one_port_for_the_tunnel_and_writes_nothing() -> None:
    services = composed()
    assert set(services) == {"server", "client", "target"}
    assert services["server"]["ports"] == ["10101:10101", "8080:8080", "8080:8080/udp"]
    for name in ("server", "client"):
        assert services[name]["read_only"] is True
        assert services[name]["cap_drop"] == ["ALL"]
        environment = services[name]["environment"]
        assert isinstance(environment, dict)
        known = {each.upper() for each in rows()} | {"NODEPASS_URL", "TUNNEL_KEY_FILE", "TUNNEL_KEYS_FILE"}
        assert set(environment) <= known
    assert "ports" not in services["client"]
    assert "ports" not in services["target"]


@pytest.mark.programs("docker compose")
def test_the_example_is_what_docker_compose_takes() -> None:
    command = ["docker", "compose", "--file", str(COMPOSE), "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@needs_namespaces
def test_the_example_works_between_two_networks_with_one_port_for_the_tunnel(
    stack: contextlib.ExitStack, tmp_path: Path
) -> None:
    network = stack.enter_context(Network())
    key = tmp_path / "key"
    key.write_text(SECRET)
    key.chmod(0o600)
    target = network.client.inside(Target)
    stack.enter_context(target)
    env = {
        name: {**each["environment"], "TUNNEL_KEY_FILE": str(key)}
        for name, each in composed().items()
        if "environment" in each
    }
    where = f"{target.address[0]}:{target.address[1]}"
    env["client"]["NODEPASS_URL"] = env["client"]["NODEPASS_URL"].replace("server", SERVER).replace("target:80", where)
    server, client = Nodepass(env=env["server"]), Nodepass(env=env["client"])
    network.server.inside(lambda: stack.enter_context(server))
    assert listening(server) == (("::", 10101), ("::", 10101), ("::", 8080))
    network.client.inside(lambda: stack.enter_context(client))
    client.wait_for("server.connected")
    visitor = stack.enter_context(network.client.inside(lambda: connect((SERVER, 8080))))
    with target.accept() as service:
        assert_connected(visitor, service)

"""Real programs through the tunnel: curl from nginx, iperf3 with itself, and several nginx that fail."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.process import Nodepass, scrubbed
from tests.support.programs import running, running_nginx, tunnel_to
from tests.support.sockets import PATIENCE, Address, format_address, free_port, until
from tests.support.tunnel import CALM, OurServer
from tests.support.web import Nginx

NGINX = """
worker_processes 1;
{user}
http {{
    access_log off;
    client_max_body_size 0;
    client_body_temp_path {root}/body;
    proxy_temp_path {root}/proxy;
    fastcgi_temp_path {root}/fastcgi;
    uwsgi_temp_path {root}/uwsgi;
    scgi_temp_path {root}/scgi;
    server {{
        listen 127.0.0.1:{port};
        root {root}/html;
        location /upload {{ dav_methods PUT; root {root}; }}
    }}
}}
"""


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Address]:
    port = free_port()
    user = "user root;" if os.geteuid() == 0 else ""
    (tmp_path / "html").mkdir()
    (tmp_path / "upload").mkdir()
    with running_nginx(tmp_path, port, NGINX.format(root=tmp_path, port=port, user=user)) as address:
        yield address


def curl(*arguments: str) -> bytes:
    command = ["curl", "--silent", "--show-error", "--fail", "--max-time", "30", *arguments]
    return subprocess.run(command, env=scrubbed(), capture_output=True, check=True).stdout


@pytest.mark.programs("nginx", "curl")
@pytest.mark.parametrize("tls", [0, 1])
def test_curl_downloads_from_nginx_through_the_tunnel(nginx: Address, tmp_path: Path, tls: int) -> None:
    small, large = b"<h1>hello</h1>", random.Random(tls).randbytes(20 << 20)
    (tmp_path / "html" / "index.html").write_bytes(small)
    (tmp_path / "html" / "large").write_bytes(large)
    with tunnel_to(nginx, tls) as visitors:
        assert curl(f"http://{visitors}/") == small
        assert hashlib.sha256(curl(f"http://{visitors}/large")).digest() == hashlib.sha256(large).digest()
        kept_alive = curl(*[f"http://{visitors}/"] * 5)
        assert kept_alive == small * 5
        together = curl("--parallel", *[f"http://{visitors}/"] * 40)
        assert together == small * 40


@pytest.mark.programs("nginx", "curl")
def test_curl_uploads_to_nginx_through_the_tunnel(nginx: Address, tmp_path: Path) -> None:
    sent = tmp_path / "sent"
    sent.write_bytes(random.Random(0).randbytes(20 << 20))
    with tunnel_to(nginx, 1) as visitors:
        curl("--upload-file", str(sent), f"http://{visitors}/upload/received")
    assert (tmp_path / "upload" / "received").read_bytes() == sent.read_bytes()


@pytest.mark.programs("iperf3")
@pytest.mark.parametrize("direction", [(), ("--reverse",), ("--parallel", "4")], ids=str)
def test_iperf3_runs_through_the_tunnel(direction: tuple[str, ...]) -> None:
    port = free_port()
    server = running(port, "iperf3", "--server", "--bind", "127.0.0.1", "--port", str(port))
    with server as address, tunnel_to(address, 1) as visitors:
        host, _, number = visitors.partition(":")
        command = ["iperf3", "--client", host, "--port", number, "--bytes", "20M", "--json", *direction]
        done = subprocess.run(command, env=scrubbed(), capture_output=True, check=False, timeout=60)
    report = json.loads(done.stdout)
    assert "error" not in report, report["error"]
    assert report["end"]["sum_received"]["bytes"] > 0
    assert done.returncode == 0


def ask(visitors: Address) -> str:
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection(*visitors, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request("GET", "/", headers={"Connection": "close"})
        return connection.getresponse().read().decode()


@pytest.mark.programs("nginx")
def test_no_request_is_lost_while_targets_are_killed_stopped_and_started_one_after_the_other(
    stack: contextlib.ExitStack, tmp_path: Path
) -> None:
    """Three nginx, one of them on a Unix socket. A stopped one accepts connections: only the check by HTTP finds it."""
    listens = [f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}", f"unix:{tmp_path}/nginx.sock"]
    backends = [Nginx(tmp_path / name, listen) for name, listen in zip("abc", listens, strict=True)]
    for each in backends:
        stack.enter_context(each)
    server = stack.enter_context(OurServer())
    url = f"client://{format_address(server.tunnel_address)}/{','.join(listens)}"
    query = "log=info&health_check=http:/&health_interval=100ms"
    client = stack.enter_context(Nodepass(f"{url}?{query}", env=CALM))
    server.wait_for_client()
    workers = stack.enter_context(ThreadPoolExecutor(8))

    def burst() -> set[str]:
        """The names of those that have answered 80 requests, 8 at a time; a lost one raises."""
        return set(workers.map(ask, [server.visitor_address] * 80))

    until(lambda: burst() == {"a", "b", "c"})
    for backend in backends:
        others = {each.name for each in backends} - {backend.name}
        for number, reverse in ((signal.SIGKILL, None), (signal.SIGSTOP, signal.SIGCONT)):
            mark = client.mark()
            if reverse is None:
                backend.kill()
            else:
                backend.send(number)
                client.wait_for("target.down", target=backend.listen, after=mark, reason="timeout")
            assert burst() == others
            client.wait_for("target.down", target=backend.listen, after=mark)
            if reverse is None:
                backend.start()
            else:
                backend.send(reverse)
            client.wait_for("target.up", target=backend.listen, after=mark)
            assert burst() == {"a", "b", "c"}
    assert not client.find("target.unreachable")

"""Real programs through the tunnel: curl from nginx, and iperf3 with itself."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.process import scrubbed
from tests.support.sockets import Address, format_address, free_port, until
from tests.support.tunnel import OurClient, OurServer

NGINX = """
daemon off;
pid {root}/nginx.pid;
error_log stderr;
worker_processes 1;
{user}
events {{ }}
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


def needs(*names: str) -> pytest.MarkDecorator:
    """Skip a test on a machine without these programs."""
    absent = [name for name in names if program(name) is None]
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}")


def program(name: str) -> str | None:
    """The path of a program; daemons are often not on the PATH of a user."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin:/sbin")


@contextlib.contextmanager
def running(port: int, *command: str) -> Iterator[Address]:
    """A server program in the foreground, until it listens; ended by its own handle."""
    address = ("127.0.0.1", port)
    with subprocess.Popen(command, env=scrubbed(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            until(lambda: listens(port) or process.poll() is not None)
            assert process.poll() is None, f"{command} did not start"
            yield address
        finally:
            process.terminate()
            process.wait(10)


def listens(port: int) -> bool:
    """Whether somebody listens there, without connecting to it."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in proc_lines(name)]
    return any(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)


def proc_lines(name: str) -> list[str]:
    path = Path("/proc/net") / name
    return path.read_text().splitlines()[1:] if path.exists() else []


@contextlib.contextmanager
def tunnel_to(target: Address, tls: int) -> Iterator[str]:
    """A tunnel of ours to a running program; the visitors' address as text."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(OurServer(tls, log="info"))
        client = stack.enter_context(OurClient(server.tunnel_address, target, log="info"))
        client.wait_until_connected()
        yield format_address(server.visitor_address)


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Address]:
    port = free_port()
    user = "user root;" if os.geteuid() == 0 else ""
    config = tmp_path / "nginx.conf"
    (tmp_path / "html").mkdir()
    (tmp_path / "upload").mkdir()
    config.write_text(NGINX.format(root=tmp_path, port=port, user=user))
    nginx = program("nginx")
    assert nginx is not None
    with running(port, nginx, "-p", str(tmp_path), "-e", "stderr", "-c", str(config)) as address:
        yield address


def curl(*arguments: str) -> bytes:
    command = ["curl", "--silent", "--show-error", "--fail", "--max-time", "30", *arguments]
    return subprocess.run(command, env=scrubbed(), capture_output=True, check=True).stdout


@needs("nginx", "curl")
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


@needs("nginx", "curl")
def test_curl_uploads_to_nginx_through_the_tunnel(nginx: Address, tmp_path: Path) -> None:
    sent = tmp_path / "sent"
    sent.write_bytes(random.Random(0).randbytes(20 << 20))
    with tunnel_to(nginx, 1) as visitors:
        curl("--upload-file", str(sent), f"http://{visitors}/upload/received")
    assert (tmp_path / "upload" / "received").read_bytes() == sent.read_bytes()


@needs("iperf3")
@pytest.mark.parametrize("direction", [(), ("--reverse",), ("--parallel", "4")], ids=str)
def test_iperf3_runs_through_the_tunnel(direction: tuple[str, ...]) -> None:
    iperf3 = program("iperf3")
    assert iperf3 is not None
    port = free_port()
    server = running(port, iperf3, "--server", "--bind", "127.0.0.1", "--port", str(port))
    with server as address, tunnel_to(address, 1) as visitors:
        host, _, number = visitors.partition(":")
        command = [iperf3, "--client", host, "--port", number, "--bytes", "20M", "--json", *direction]
        done = subprocess.run(command, env=scrubbed(), capture_output=True, check=False, timeout=60)
    report = json.loads(done.stdout)
    assert "error" not in report, report["error"]
    assert report["end"]["sum_received"]["bytes"] > 0
    assert done.returncode == 0

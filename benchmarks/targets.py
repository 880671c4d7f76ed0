"""The services at the far end of every system: nginx, iperf3 and the echo, each on a fresh port.

A probe tells whether one of them answers through a given port, be it its own or that of a tunnel.
"""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import LOOPBACK, MeasurementError, Processes, free_port, wait_until

ROOT = Path(__file__).resolve().parents[1]
PROBE_TIMEOUT = 3.0  # seconds for one probe
PAGE_BYTES = 1024  # of the page that nginx serves

NGINX_CONFIG = """\
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr crit;
worker_rlimit_nofile 16384;
events {{ worker_connections 16000; }}
http {{
    access_log off; keepalive_requests 1000000000;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    server {{ listen 127.0.0.1:{port} backlog=8192; location / {{ return 200 "{page}"; }} }}
}}
"""


@dataclass(frozen=True)
class Target:
    """A kind of service: the program it needs, how to start it on a port, how to tell that it answers."""

    program: str
    start: Callable[[Processes, int], None]
    answers: Callable[[int], bool]

    def open(self, processes: Processes) -> int:
        """Start the service and wait for it; returns its port."""
        port = free_port()
        self.start(processes, port)
        self.wait(port, processes)
        return port

    def wait(self, port: int, *owners: Processes) -> None:
        """Wait until the service answers through `port`, as long as the processes of `owners` live."""
        wait_until(lambda: self.answers(port), f"the way through port {port}", *owners)


def find_program(name: str) -> str | None:
    """Return the path of a program, also of one in a folder that only root has on PATH."""
    return shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin")))


def require_program(name: str) -> str:
    """Return the path of a program; MeasurementError if it is not installed."""
    found = find_program(name)
    if found is None:
        raise MeasurementError(f"{name} is not installed")
    return found


def start_nginx(processes: Processes, port: int) -> None:
    """One nginx worker with a page of PAGE_BYTES, no log, no limit of requests on a connection."""
    config = processes.folder / "nginx.conf"
    config.write_text(NGINX_CONFIG.format(folder=processes.folder, port=port, page="x" * PAGE_BYTES))
    processes.start("nginx", [require_program("nginx"), "-p", processes.folder, "-e", "stderr", "-c", config])


def nginx_answers(port: int) -> bool:
    """Tell whether the page comes through `port`."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=PROBE_TIMEOUT)
    try:
        connection.request("GET", "/", headers={"Connection": "close"})
        return len(connection.getresponse().read()) == PAGE_BYTES
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def start_iperf(processes: Processes, port: int) -> None:
    """An iperf3 server."""
    processes.start("iperf3", [require_program("iperf3"), "-s", "-B", LOOPBACK, "-p", str(port)])


def iperf_answers(port: int) -> bool:
    """Tell whether a transfer of one block works through `port`."""
    command = [require_program("iperf3"), "-c", LOOPBACK, "-p", str(port), "-n", "1K", "-l", "1K"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=PROBE_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def start_echo(processes: Processes, port: int) -> None:
    """The echo of benchmarks/echo.py as a process of its own."""
    command = [sys.executable, "-m", "benchmarks.echo", str(port)]
    processes.start("echo", command, {"PYTHONPATH": str(ROOT)})


def echo_answers(port: int) -> bool:
    """Tell whether a byte comes back through `port`, by TCP."""
    try:
        with socket.create_connection((LOOPBACK, port), timeout=PROBE_TIMEOUT) as visitor:
            visitor.sendall(b"?")
            return visitor.recv(1) == b"?"
    except OSError:
        return False


NGINX = Target("nginx", start_nginx, nginx_answers)
IPERF = Target("iperf3", start_iperf, iperf_answers)
ECHO = Target(sys.executable, start_echo, echo_answers)

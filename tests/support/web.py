"""nginx that answers each request with its name; started, killed, stopped and started again by a test. Its visitors."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

from tests.support.process import scrubbed
from tests.support.programs import installed
from tests.support.scope import Closes
from tests.support.sockets import Address
from tests.support.v2_network import Namespace

CONFIG = """
daemon off;
pid {root}/nginx.pid;
error_log stderr;
events {{ }}
worker_processes 1;
{user}
http {{
    access_log off;
    client_body_temp_path {root}/body;
    proxy_temp_path {root}/proxy;
    fastcgi_temp_path {root}/fastcgi;
    uwsgi_temp_path {root}/uwsgi;
    scgi_temp_path {root}/scgi;
    server {{ listen {listen}; location / {{ return 200 "{name}"; }} }}
}}
"""

REQUEST = b"GET / HTTP/1.0\r\n\r\n"
GIVEN_UP = 15.0
"""Seconds after which a request has failed."""


class Nginx(Closes):
    """An nginx that answers with the name of its folder, and listens at `listen`, in a namespace if one is given."""

    def __init__(self, root: Path, listen: str, namespace: Namespace | None = None) -> None:
        root.mkdir()
        self.name = root.name
        self.listen = listen
        self._namespace = namespace
        user = "user root;" if os.geteuid() == 0 else ""
        config = root / "nginx.conf"
        config.write_text(CONFIG.format(root=root, listen=listen, name=self.name, user=user))
        self._command = [installed("nginx"), "-p", str(root), "-e", "stderr", "-c", str(config)]
        self._running: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Nginx:
        self.start()
        return self

    def close(self) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, also again after it has been killed."""
        if self.listen.startswith("unix:"):
            Path(self.listen.removeprefix("unix:")).unlink(missing_ok=True)  # of one that was killed
        self._running = self._namespace.inside(self._begin) if self._namespace else self._begin()

    def _begin(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, env=scrubbed(), stdin=subprocess.DEVNULL, start_new_session=True)

    def send(self, number: signal.Signals) -> None:
        """To its worker, too."""
        assert self._running
        os.killpg(self._running.pid, number)

    def kill(self) -> None:
        """End it at once; a second time does nothing."""
        if self._running:
            self.send(signal.SIGKILL)
            self._running.wait()
            self._running = None

    def stop(self) -> None:
        """Have it answer what it has accepted, and end."""
        assert self._running
        self._running.send_signal(signal.SIGQUIT)
        assert self._running.wait(10) == 0
        self._running = None


def ask(address: Address, given_up: float = GIVEN_UP) -> str:
    """The body that a server of HTTP answers; "" where it does not answer in full. Raises OSError."""
    with socket.create_connection(address, given_up) as sock:
        sock.sendall(REQUEST)
        answer = b""
        while received := sock.recv(4096):
            answer += received
    head, _, body = answer.partition(b"\r\n\r\n")
    return body.decode() if b" 200 " in head else ""

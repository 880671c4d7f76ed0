"""`make demo`: a small service, a nodepass server and a nodepass client, all on this machine.

The service is a web page (TCP) and an echo (UDP) on one port. The ends of the tunnel are real processes of bin/nodepass
on ports that the kernel chooses; their readiness is read from their logs, as JSON. The demo uses the tunnel as a
visitor would, prints the result, and runs until Ctrl-C. It ends only processes that it started.
"""

from __future__ import annotations

import argparse
import contextlib
import http.server
import json
import os
import shlex
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

NODEPASS = Path(__file__).resolve().parents[2] / "bin" / "nodepass"
LOOPBACK = "127.0.0.1"
KEY_FILE = "tunnel.key"
NAME = "demo"  # of the tunnel, the same at both ends

# Seconds: for a process to become ready, for an answer through the tunnel, for a process to end. The first is long
# because a first start also compiles the byte code.
READY_TIMEOUT = 20.0
ANSWER_TIMEOUT = 10.0
STOP_TIMEOUT = 10.0

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

PAGE = b"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>nodepass demo</title>
<body style="font: 1.1rem/1.6 system-ui; max-width: 34rem; margin: 4rem auto">
<h1>Hello through the tunnel</h1>
<p>This page is served on a port that only the nodepass <em>client</em> uses. Your browser connected to the
nodepass <em>server</em>, which forwarded the request over one of the encrypted connections that the client keeps open
to it.</p>
<p>Ctrl-C stops the demo.</p>
</body></html>
"""


class DemoError(Exception):
    """The demo failed; the text has the reason."""


class PageHandler(http.server.BaseHTTPRequestHandler):
    """Answers every GET with the page, and logs nothing."""

    def do_GET(self) -> None:
        """Send the page."""
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (the name is the base class's)
        """Keep the terminal for the demo's own output."""


class EchoHandler(socketserver.BaseRequestHandler):
    """Sends every datagram back to its sender."""

    def handle(self) -> None:
        """Answer one datagram."""
        payload, endpoint = self.request
        endpoint.sendto(payload, self.client_address)


class Tunnel:
    """One running bin/nodepass, the lines of its log so far, and the events in them."""

    def __init__(self, role: str, url: str, key: Path) -> None:
        self.role = role
        self.lines: list[str] = []
        self._events: list[dict[str, Any]] = []
        self._grown = threading.Condition()
        self._ended = False
        # A session of its own, so that Ctrl-C at the terminal reaches it once, through the demo.
        self.process = subprocess.Popen(
            [NODEPASS, url],
            env={**os.environ, "LOG_FORMAT": "json", "TUNNEL_KEY_FILE": str(key)},
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read_log, name=f"{role}-log", daemon=True)
        self._reader.start()

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._grown:
                self._read_line(line.rstrip("\n"))
                self._grown.notify_all()
        with self._grown:
            self._ended = True
            self._grown.notify_all()

    def _read_line(self, line: str) -> None:
        try:
            event = json.loads(line)
            self.lines.append(f"{event['time']} {event['level'].upper()} {event['message']}")
        except ValueError:  # text that is not an event: why the process did not start
            self.lines.append(line)
        else:
            self._events.append(event)

    def wait_for(self, event: str, field: str = "") -> dict[str, Any]:
        """The first such event in the log, where this field is set. Raises DemoError if none comes in READY_TIMEOUT."""
        with self._grown:
            self._grown.wait_for(lambda: self._search(event, field) or self._ended, READY_TIMEOUT)
            found = self._search(event, field)
        if found is None:
            outcome = "ended" if self._ended else f"was not ready after {READY_TIMEOUT:.0f} s"
            raise DemoError(f"the {self.role} {outcome}; its log has no {event}")
        return found

    def _search(self, event: str, field: str) -> dict[str, Any] | None:
        found = (each for each in self._events if each["event"] == event and (not field or each.get(field)))
        return next(found, None)

    def stop(self) -> None:
        """Terminate the process, and kill it after STOP_TIMEOUT."""
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(STOP_TIMEOUT)
        if self.process.stderr is not None and not self._reader.is_alive():
            self.process.stderr.close()


def say(text: str = "") -> None:
    """Print one line unbuffered, also into a pipe."""
    print(text, flush=True)


def bind_service() -> tuple[http.server.ThreadingHTTPServer, socketserver.UDPServer]:
    """The page and the echo, bound to the same free port."""
    for _ in range(20):
        page = http.server.ThreadingHTTPServer((LOOPBACK, 0), PageHandler)
        try:
            return page, socketserver.UDPServer((LOOPBACK, page.server_port), EchoHandler)
        except OSError:  # that number is taken on the UDP side: try another
            page.server_close()
    raise DemoError("no port is free for both TCP and UDP")


@contextlib.contextmanager
def serving() -> Iterator[int]:
    """Run the service in threads; yields its port."""
    page, echo = bind_service()
    for server in (page, echo):
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    try:
        yield page.server_port
    finally:
        for server in (page, echo):
            server.shutdown()
            server.server_close()


@contextlib.contextmanager
def running(role: str, url: str, key: Path) -> Iterator[Tunnel]:
    """Run bin/nodepass with one URL; shows its log if anything fails."""
    say(f"  $ TUNNEL_KEY_FILE={KEY_FILE} bin/nodepass {shlex.quote(url)}")
    tunnel = Tunnel(role, url, key)
    try:
        yield tunnel
    except BaseException as error:
        tunnel.stop()
        if not isinstance(error, KeyboardInterrupt):
            say(f"\nThe log of the {role} (exit status {tunnel.process.returncode}):")
            say("\n".join(f"  {line}" for line in tunnel.lines) or "  (empty)")
        raise
    tunnel.stop()


@contextlib.contextmanager
def key_file() -> Iterator[Path]:
    """Make a key, in a file that only this user can read; it is deleted at the end."""
    say(f"A key, the same file on both machines:\n  $ (umask 077; bin/nodepass --generate-key >{KEY_FILE})\n")
    made = subprocess.run([NODEPASS, "--generate-key"], stdout=subprocess.PIPE, check=False)
    if made.returncode:
        raise DemoError(f"no key could be made: exit status {made.returncode}")
    with tempfile.TemporaryDirectory(prefix="nodepass-demo.") as directory:
        path = Path(directory) / KEY_FILE
        path.touch(mode=0o600)
        path.write_bytes(made.stdout)
        yield path


def show_next() -> None:
    """Print what a user types on two machines of their own."""
    say(f"""
On two machines of your own, type on the one with the public address, and copy {KEY_FILE} to the other one:

  $ (umask 077; bin/nodepass --generate-key >{KEY_FILE})
  $ TUNNEL_KEY_FILE={KEY_FILE} DATA_PORT=tunnel bin/nodepass "server://:10101/:8080?name=web"

On the one with the service, here a web server on port 80:

  $ TUNNEL_KEY_FILE={KEY_FILE} bin/nodepass "client://SERVER:10101/127.0.0.1:80?name=web"

Visitors connect to SERVER:8080. With systemd, nodepass-manager makes services of both: docs/manager.md""")


def fetch_page(port: int) -> str:
    """Get the page as a browser would; the result as a line of text."""
    started = time.perf_counter()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy for loopback
    with opener.open(f"http://{LOOPBACK}:{port}/", timeout=ANSWER_TIMEOUT) as response:
        body = response.read()
    if body != PAGE:
        raise DemoError(f"the page differs: {len(body)} bytes instead of {len(PAGE)}")
    milliseconds = 1000 * (time.perf_counter() - started)
    return f"the page, {len(body)} bytes, status {response.status}, in {milliseconds:.1f} ms"


def echo_datagram(port: int) -> str:
    """Send one datagram and wait for its echo; the result as a line of text."""
    payload = b"knock, knock"
    started = time.perf_counter()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as visitor:
        visitor.settimeout(ANSWER_TIMEOUT)
        visitor.connect((LOOPBACK, port))
        visitor.send(payload)
        answer = visitor.recv(2048)
    if answer != payload:
        raise DemoError(f"the echo differs: {answer!r}")
    milliseconds = 1000 * (time.perf_counter() - started)
    return f"the echo of {payload.decode()!r} in {milliseconds:.1f} ms"


def show_picture(visitor_port: int, tunnel_port: int, service_port: int) -> None:
    """Print how the parts are connected."""
    say(f"""
The connections:

  visitor -- TCP, UDP --> server :{visitor_port}
                             ^
                             |  TLS, on connections opened by the client (to :{tunnel_port} first)
                             |
                          client -- TCP, UDP --> service :{service_port}""")


def run_demo(once: bool) -> None:
    """Run the demo. Raises DemoError or OSError."""
    with contextlib.ExitStack() as stack:
        service_port = stack.enter_context(serving())
        say(f"The service, a web page and a UDP echo, listens on {LOOPBACK}:{service_port}.\n")
        key = stack.enter_context(key_file())
        say("On the machine with the public address:")
        server = stack.enter_context(running("server", f"server://{LOOPBACK}:0/{LOOPBACK}:0?name={NAME}", key))
        listening = server.wait_for("server.listening")
        tunnel_port, visitor_port = (
            int(listening[name].rpartition(":")[2]) for name in ("tunnel_address", "target_address")
        )
        say("On the machine behind the firewall:")
        client_url = f"client://{LOOPBACK}:{tunnel_port}/{LOOPBACK}:{service_port}?name={NAME}"
        stack.enter_context(running("client", client_url, key))
        server.wait_for("client.connected")
        protected = server.wait_for("tunnel.security", "tls_version")
        show_picture(visitor_port, tunnel_port, service_port)
        say(f"\nWhat protects the tunnel: {protected['security']}")
        say(f"\nA visitor connects to the server, {LOOPBACK}:{visitor_port}:\n")
        say(f"  TCP: {fetch_page(visitor_port)}")
        say(f"  UDP: {echo_datagram(visitor_port)}")
        show_next()
        if once:
            say("\nIt works.")
            return
        say(f"\nIt works. Open http://{LOOPBACK}:{visitor_port}/ in a browser; Ctrl-C stops the demo.")
        signal.pause()


def interrupt(_signal: int, _frame: FrameType | None) -> None:
    """End the demo by unwinding it; a second signal is ignored."""
    for number in ENDING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    """Run the command line; its exit status."""
    parser = argparse.ArgumentParser(description="A nodepass tunnel, all on this machine.")
    parser.add_argument("--once", action="store_true", help="check the tunnel once and exit with 0 or 1")
    once = parser.parse_args().once
    for number in ENDING_SIGNALS:
        signal.signal(number, interrupt)
    try:
        run_demo(once)
    except KeyboardInterrupt:
        say("\nStopped: the tunnel and the service are closed.")
        return 130 if once else 0
    except (DemoError, OSError) as error:
        say(f"\nThe demo failed: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

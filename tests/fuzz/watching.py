"""What comes from beside the tunnel: questions to the metrics endpoint, answers to `nodepass top`, systemd's words."""

from __future__ import annotations

import http.client
import io
import os
import socket
from typing import Any, cast
from unittest import mock

from nodepass.daemon import systemd
from nodepass.daemon.systemd import FIRST_SOCKET, ServiceManager
from nodepass.errors import ConfigError
from nodepass.metrics.http import LARGEST_REQUEST, BadRequest, read_request
from nodepass.net.activation import PassedSocket
from nodepass.tools.top_scrape import NoAnswer, Source, take
from nodepass.tools.top_table import HISTORY, Watch, plain, sparkline
from tests.fuzz.scripted import ScriptedSocket, assert_plain
from tests.fuzz.scripts import LONG, Script, pieces


def check_request(data: bytes) -> None:
    """A request is a GET or a HEAD of a path, or is refused in one line; no more is read than may be."""
    script = Script(data)
    sizes = script.sizes()
    said = script.rest().replace(LONG, b"x" * 1000)
    arriving = pieces(said, sizes)
    sock = ScriptedSocket(lambda: next(arriving, b""))
    try:
        method, path, host = read_request(cast(socket.socket, sock))
    except BadRequest as refusal:
        assert_plain(refusal)
        assert b"\r\n\r\n" in sock.heard or len(sock.heard) > LARGEST_REQUEST
    except ConnectionError:
        assert b"\r\n\r\n" not in said
    else:
        assert method in ("GET", "HEAD")
        assert said.startswith(f"{method} /".encode())
        assert path.startswith("/")
        assert "?" not in path
        assert host == host.lower()
    assert len(sock.heard) <= LARGEST_REQUEST + max(sizes)


class Answering:
    """A connection on which this is the answer, whatever is asked."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer

    def sendall(self, _question: bytes) -> None:
        """Nobody hears it."""

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(cast(Any, io.BytesIO(self._answer)))

    def close(self) -> None:
        """There is nothing to close."""


OURS = b'nodepass_build_info{version="1"} 1\n'


def check_scrape(data: bytes) -> None:
    """Whatever an endpoint answers is shown in printable lines, or is told of in one."""
    script = Script(data)
    if script.number() % 4:
        body = OURS + script.rest()
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    else:
        answer = script.rest()
    connection = http.client.HTTPConnection("test")
    connection.sock = Answering(answer)
    watch = Watch()
    with mock.patch.object(Source, "_connection", return_value=connection):
        try:
            watch.add(take(Source("test", 1)))
        except NoAnswer as error:
            assert_plain(error)
            return
    assert watch.last
    watch.add(watch.last)  # as if nothing had changed
    lines = [watch.headline(), *plain(watch.rows()).splitlines()]
    lines += [sparkline(watch.history(name), HISTORY) for name in watch.last.tunnels]
    assert all(line.isprintable() for line in lines)


VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
PASSED = 4
"""Sockets that are really there."""


def check_manager(data: bytes) -> None:
    """What systemd says in the environment is taken out of it and understood, or is refused in one line."""
    script = Script(data)
    environ = {"HOME": "/"}
    while script:
        name = VARIABLES[script.number() % len(VARIABLES)]
        text = script.take(script.number() % 32).decode("utf-8", "surrogateescape")
        environ[name] = text.replace("PID", str(os.getpid()))

    def pass_socket(name: str, descriptor: int) -> PassedSocket:
        if descriptor >= FIRST_SOCKET + PASSED:
            raise ConfigError(f"descriptor {descriptor} is not usable")
        return PassedSocket(name, cast(socket.socket, object()))

    given = dict(environ)
    try:
        with mock.patch.object(systemd, "_passed", pass_socket):
            manager = ServiceManager.take(environ)
    except ConfigError as error:
        assert_plain(error)
        return
    assert environ == {"HOME": "/"}
    assert not manager.sockets or len(manager.sockets) == int(given["LISTEN_FDS"]) <= PASSED
    assert 0 <= manager.watchdog < 1e14

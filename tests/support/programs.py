"""Other packages' programs as a service behind a tunnel: started in the foreground, ended by their own handle."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from tests.support.needs import STREAM_MODULE, program
from tests.support.process import scrubbed
from tests.support.sockets import Address, format_address, until
from tests.support.tunnel import CALM, OurClient, OurServer


def installed(name: str) -> str:
    """The path of a program that the test's `programs` mark names."""
    path = program(name)
    assert path, f"not installed: {name}"
    return path


@contextlib.contextmanager
def running(port: int, name: str, *arguments: str, protocol: str = "tcp") -> Iterator[Address]:
    """A server program in the foreground, once it listens on this port of TCP or UDP."""
    command = [installed(name), *arguments]
    with subprocess.Popen(command, env=scrubbed(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            until(lambda: _listens(port, protocol) or process.poll() is not None)
            assert process.poll() is None, f"{command} did not start"
            yield ("127.0.0.1", port)
        finally:
            process.terminate()
            process.wait(10)


def running_nginx(root: Path, port: int, blocks: str, *, has_streams: bool = False) -> AbstractContextManager[Address]:
    """nginx with these blocks of its configuration, once it listens on this port; its files are below `root`."""
    config = root / "nginx.conf"
    module = f"load_module {STREAM_MODULE};\n" * has_streams
    config.write_text(f"{module}daemon off;\npid {root}/nginx.pid;\nerror_log stderr;\nevents {{ }}\n{blocks}")
    return running(port, "nginx", "-p", str(root), "-e", "stderr", "-c", str(config))


HAPROXY = """
defaults
    mode tcp
    timeout connect 5s
    timeout client 1h
    timeout server 1h
"""


def running_haproxy(root: Path, port: int, sections: str) -> AbstractContextManager[Address]:
    """haproxy with these sections of its configuration, in TCP mode by default, once it listens on this port."""
    config = root / "haproxy.cfg"
    config.write_text(HAPROXY + sections)
    return running(port, "haproxy", "-db", "-f", str(config))


def _listens(port: int, protocol: str) -> bool:
    """Whether the port is listened on, without connecting to it."""
    rows = [line.split() for name in (protocol, f"{protocol}6") for line in _table(name)]
    state = {"tcp": "0A", "udp": "07"}[protocol]
    return any(row[1].endswith(f":{port:04X}") and row[3] == state for row in rows)


def _table(name: str) -> list[str]:
    """The sockets in the network namespace of this thread."""
    path = Path("/proc/thread-self/net") / name
    return path.read_text().splitlines()[1:] if path.exists() else []


@contextlib.contextmanager
def tunnel_to(target: Address, tls: int, host: str = "127.0.0.1", **settings: str) -> Iterator[str]:
    """A tunnel of ours to a running program, with these settings of the client; the visitors' address as text.

    host: where visitors come.
    """
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(OurServer(tls, target=format_address((host, 0)), log="info"))
        client = stack.enter_context(OurClient(server.tunnel_address, target, log="info", env={**CALM, **settings}))
        client.wait_until_connected()
        yield format_address(server.visitor_address)

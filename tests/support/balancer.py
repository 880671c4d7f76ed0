"""haproxy in front of several servers, as contrib/haproxy configures it; a test asks it by its admin socket."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.support.process import REPOSITORY, scrubbed
from tests.support.programs import installed
from tests.support.scope import Closes
from tests.support.sockets import Address, format_address, until

CONFIG = REPOSITORY / "contrib" / "haproxy" / "haproxy.cfg"

DIRECT = """
listen direct
    bind {front}
    balance leastconn
    option httpchk GET /
    timeout check 500ms
    default-server check inter 1s fastinter 250ms fall 3 rise 2 tcp-ut 10s
"""
"""The same balancer for services without a tunnel."""


class Balancer(Closes):
    """haproxy with the file of contrib/haproxy, in the network namespace of the thread that makes it.

    It also stands in front of services without a tunnel, on an address of its own.
    """

    def __init__(
        self,
        root: Path,
        fronts: tuple[Address, Address],
        servers: Mapping[str, Address],
        metrics_port: int,
        services: Mapping[str, Address],
    ) -> None:
        """`fronts`: where visitors of the servers, and those of the services, come."""
        root.mkdir()
        self._admin = root / "admin.sock"
        text = shipped(fronts[0], servers, metrics_port, self._admin) + DIRECT.format(front=format_address(fronts[1]))
        text += "".join(f"    server {name} {format_address(at)}\n" for name, at in services.items())
        (root / "haproxy.cfg").write_text(text)
        command = [installed("haproxy"), "-db", "-f", str(root / "haproxy.cfg")]
        self._process = subprocess.Popen(command, env=scrubbed(), stdin=subprocess.DEVNULL)

    def __enter__(self) -> Balancer:
        until(self._admin.exists)
        return self

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def tell(self, command: str) -> str:
        """Give it a command by its admin socket; its answer."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self._admin))
            sock.sendall(f"{command}\n".encode())
            return b"".join(iter(lambda: sock.recv(65536), b"")).decode()

    def states(self, section: str = "visitors") -> dict[str, str]:
        """The state of each server of a section, as haproxy's statistics have it: UP, DOWN, NOLB, DRAIN."""
        return {row["svname"]: row["status"] for row in self._rows() if row["pxname"] == section}

    def count_sessions(self, server: str) -> int:
        """How many visitors a server of ours has now."""
        [row] = [each for each in self._rows() if (each["pxname"], each["svname"]) == ("visitors", server)]
        return int(row["scur"])

    def _rows(self) -> list[dict[str, str]]:
        """One for each server."""
        head, *lines = self.tell("show stat").removeprefix("# ").strip().splitlines()
        rows = [dict(zip(head.split(","), line.split(","), strict=False)) for line in lines]
        return [row for row in rows if row["svname"] not in ("FRONTEND", "BACKEND")]


def shipped(front: Address, servers: Mapping[str, Address], metrics_port: int, admin: Path) -> str:
    """The file of contrib/haproxy with these addresses in place of its own."""
    text = CONFIG.read_text()
    for pattern, new in (
        (r"stats socket \S+", f"stats socket {admin}"),
        (r"bind :443", f"bind {format_address(front)}"),
        (r"check port \d+", f"check port {metrics_port}"),
    ):
        text, found = re.subn(pattern, new, text)
        assert found == 1, f"{pattern} is not in {CONFIG} once"
    rows = re.findall(r"^    server (\S+) \S+\n", text, re.MULTILINE)
    assert rows == list(servers), rows
    for name, address in servers.items():
        text = re.sub(rf"server {name} \S+", f"server {name} {format_address(address)}", text)
    return text

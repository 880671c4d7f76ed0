"""Two network namespaces with a cable between them that a test can pull.

What runs `inside` a namespace keeps its network for life: processes and threads that it starts, sockets that
it opens, wherever they are used later. Needs root and the `ip` program.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tests.support.scope import Closes

T = TypeVar("T")

SERVER, CLIENT, MOVED = "192.0.2.1", "192.0.2.2", "192.0.2.3"
CABLE = "cable"
CLONE_NEWNET = 0x40000000


def why_not() -> str:
    """Why there can be no namespaces here; empty where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "not installed: ip"
    try:
        Namespace("probe").delete()
    except RuntimeError as error:
        return f"no network namespaces here: {error}"
    return ""


def ip(*arguments: str) -> None:
    """Run `ip`; RuntimeError with what it said if it fails."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


class Namespace:
    """One network namespace with its loopback interface up."""

    def __init__(self, role: str) -> None:
        self.name = f"nodepass-{os.getpid()}-{role}"
        ip("netns", "add", self.name)
        self.ip("link", "set", "lo", "up")

    def ip(self, *arguments: str) -> None:
        """Run `ip` in here."""
        ip("-n", self.name, *arguments)

    def delete(self) -> None:
        """Take it away, with its end of the cable."""
        ip("netns", "delete", self.name)

    def inside(self, work: Callable[[], T]) -> T:
        """Do something in a thread that lives in here, and return or raise what it does."""
        return inside(Path("/run/netns", self.name), work)


def inside(namespace: Path, work: Callable[[], T]) -> T:
    """Do something in a thread that lives in a network namespace, and return or raise what it does."""
    results: list[T] = []
    errors: list[BaseException] = []

    def enter_and_work() -> None:
        try:
            enter(namespace)
            results.append(work())
        except BaseException as error:  # noqa: BLE001  # it is raised again below
            errors.append(error)

    thread = threading.Thread(target=enter_and_work)
    thread.start()
    thread.join()
    for error in errors:
        raise error
    return results[0]


def enter(namespace: Path) -> None:
    """Move this thread, and what it starts, into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with namespace.open() as opened:
        if libc.setns(opened.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns to {namespace}")


class Network(Closes):
    """A server's and a client's namespace, SERVER and CLIENT being their addresses; a context manager."""

    def __enter__(self) -> Network:
        self.server = Namespace("server")
        self.client = Namespace("client")
        self._plug_in()
        return self

    def close(self) -> None:
        self.client.delete()
        self.server.delete()

    def _plug_in(self) -> None:
        ends = ((self.server, SERVER), (self.client, CLIENT))
        ip("link", "add", CABLE, "netns", self.server.name, "type", "veth", "peer", CABLE, "netns", self.client.name)
        for namespace, address in ends:
            namespace.ip("address", "add", f"{address}/24", "dev", CABLE)
            namespace.ip("link", "set", CABLE, "up")

    def pull(self) -> None:
        """Take the link down: nothing arrives any more, and nobody is told."""
        self.server.ip("link", "set", CABLE, "down")

    def mend(self) -> None:
        """Bring the link up again."""
        self.server.ip("link", "set", CABLE, "up")

    def replace_client(self) -> None:
        """Put a machine that knows of no connection in the client's place, at the same address."""
        self.server.ip("link", "delete", CABLE)
        self.client.delete()
        self.client = Namespace("client")
        self._plug_in()

    def move_client(self) -> None:
        """Give the client's machine another address: packets to the old one are lost without a word."""
        self.client.ip("address", "delete", f"{CLIENT}/24", "dev", CABLE)
        self.client.ip("address", "add", f"{MOVED}/24", "dev", CABLE)

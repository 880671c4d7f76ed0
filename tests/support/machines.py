"""Several machines on one: network namespaces, each with a cable to the one where the visitors are.

Needs root and the `ip` program, as `v2_network`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

from tests.support.scope import Closes
from tests.support.v2_network import Namespace, ip

Made = TypeVar("Made", bound=AbstractContextManager[object])


class Machine:
    """A machine, its address, and that of the visitors' machine at the other end of its cable."""

    def __init__(self, stack: contextlib.ExitStack, hub: Namespace, number: int) -> None:
        self.namespace = Namespace(f"machine{number}")
        stack.callback(self.namespace.delete)
        self.address, self.hub_address = f"10.77.{number}.2", f"10.77.{number}.1"
        self._cable = f"cable{number}"
        ends = ((hub, self.hub_address), (self.namespace, self.address))
        names = ("netns", hub.name, "type", "veth", "peer", self._cable, "netns", self.namespace.name)
        ip("link", "add", self._cable, *names)
        for namespace, address in ends:
            namespace.ip("address", "add", f"{address}/24", "dev", self._cable)
            namespace.ip("link", "set", self._cable, "up")
        self._route()

    def _route(self) -> None:
        self.namespace.ip("route", "add", "default", "via", self.hub_address)

    def pull(self) -> None:
        """Take its link down, at its own end: all others hear nothing more, and are not told."""
        self.namespace.ip("link", "set", self._cable, "down")

    def mend(self) -> None:
        """Bring the link up again."""
        self.namespace.ip("link", "set", self._cable, "up")
        self._route()


class Machines(Closes):
    """The visitors' machine, `hub`, and so many others, which reach each other through it."""

    def __init__(self, number: int) -> None:
        self._stack = contextlib.ExitStack()
        try:
            self.hub = Namespace("hub")
            self._stack.callback(self.hub.delete)
            self.hub.inside(lambda: Path("/proc/sys/net/ipv4/ip_forward").write_text("1"))
            self.others = [Machine(self._stack, self.hub, each) for each in range(number)]
        except BaseException:
            self._stack.close()
            raise

    def close(self) -> None:
        self._stack.close()

    def start(self, stack: contextlib.ExitStack, namespace: Namespace, make: Callable[[], Made]) -> Made:
        """Start something on a machine, and end it with `stack`."""

        def start() -> Made:
            made = make()
            stack.enter_context(made)
            return made

        return namespace.inside(start)

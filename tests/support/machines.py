"""Several machines on one: network namespaces, each with a cable to the one where the visitors are.

Those of `Machines` have a network each, those of `Lan` share one, so that an address can move between them. Needs root
and the `ip` program, as `v2_network`.
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

SWITCH = "switch"
FLOATING = "10.78.0.200"
"""An address of a `Lan` that no machine has by itself."""


class Machine:
    """A machine, its address, and that of the visitors' machine at the other end of its cable."""

    def __init__(self, stack: contextlib.ExitStack, hub: Namespace, number: int) -> None:
        self.namespace = Namespace(f"machine{number}")
        stack.callback(self.namespace.delete)
        self.address, self.hub_address = self._choose_addresses(number)
        self.cable = f"cable{number}"
        names = ("netns", hub.name, "type", "veth", "peer", self.cable, "netns", self.namespace.name)
        ip("link", "add", self.cable, *names)
        self._plug_in(hub)
        self.namespace.ip("address", "add", f"{self.address}/24", "dev", self.cable)
        for namespace in (hub, self.namespace):
            namespace.ip("link", "set", self.cable, "up")
        self._route()

    def _choose_addresses(self, number: int) -> tuple[str, str]:
        return f"10.77.{number}.2", f"10.77.{number}.1"

    def _plug_in(self, hub: Namespace) -> None:
        hub.ip("address", "add", f"{self.hub_address}/24", "dev", self.cable)

    def _route(self) -> None:
        self.namespace.ip("route", "add", "default", "via", self.hub_address)

    def pull(self) -> None:
        """Take its link down, at its own end: all others hear nothing more, and are not told."""
        self.namespace.ip("link", "set", self.cable, "down")

    def mend(self) -> None:
        """Bring the link up again."""
        self.namespace.ip("link", "set", self.cable, "up")
        self._route()


class Neighbour(Machine):
    """A machine on the switch of a `Lan`."""

    def _choose_addresses(self, number: int) -> tuple[str, str]:
        return f"10.78.0.{number + 2}", "10.78.0.1"

    def _plug_in(self, hub: Namespace) -> None:
        hub.ip("link", "set", self.cable, "master", SWITCH)


class Machines(Closes):
    """The visitors' machine, `hub`, and so many others, which reach each other through it."""

    kind = Machine

    def __init__(self, number: int) -> None:
        self._stack = contextlib.ExitStack()
        try:
            self.hub = Namespace("hub")
            self._stack.callback(self.hub.delete)
            self._prepare()
            self.others = [self.kind(self._stack, self.hub, each) for each in range(number)]
        except BaseException:
            self._stack.close()
            raise

    def _prepare(self) -> None:
        self.hub.inside(lambda: Path("/proc/sys/net/ipv4/ip_forward").write_text("1"))

    def close(self) -> None:
        self._stack.close()

    def start(self, stack: contextlib.ExitStack, namespace: Namespace, make: Callable[[], Made]) -> Made:
        """Start something on a machine, and end it with `stack`."""

        def start() -> Made:
            made = make()
            stack.enter_context(made)
            return made

        return namespace.inside(start)


class Lan(Machines):
    """The visitors' machine, `hub`, and so many others on its switch."""

    kind = Neighbour

    def _prepare(self) -> None:
        self.hub.ip("link", "add", SWITCH, "type", "bridge")
        self.hub.ip("address", "add", "10.78.0.1/24", "dev", SWITCH)
        self.hub.ip("link", "set", SWITCH, "up")

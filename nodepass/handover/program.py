"""Starting the program again, as this process was started, with one end of a channel.

The new process gets the arguments and the environment that this one was given at its start, so its settings are the
same. It is no child of this one (`detach`): a service manager notices the end of its own children only.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

from nodepass import installed

VARIABLE = "NODEPASS_HANDOVER"  # the descriptor of the channel, in the environment of a process that takes over
_DESCRIPTOR = 3
# What systemd passes once, to the process of an id: its sockets come through the channel, and the watchdog is for
# the process that notifies.
_PASSED_ONCE = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID")


def start_again(descriptor: int) -> int:
    """Start the program with `descriptor`; the id of a process that ends as soon as the new one is detached from it.

    Raises OSError.
    """
    command = installed.command()
    environment = {**_given_environment(), VARIABLE: str(_DESCRIPTOR)}
    for name in _PASSED_ONCE:
        environment.pop(name, None)
    return os.posix_spawn(
        command[0], command, environment, file_actions=[(os.POSIX_SPAWN_DUP2, descriptor, _DESCRIPTOR)]
    )


def detach() -> None:
    """Where this process takes over from another one: become the child of init, or of systemd.

    Only before there is a second thread or an event loop.
    """
    if VARIABLE in os.environ and os.fork():
        os._exit(0)


def take_descriptor(environ: MutableMapping[str, str]) -> int | None:
    """The channel's descriptor, which is removed from the environment; None where this is a start of its own."""
    text = environ.pop(VARIABLE, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 7 else None


def _given_environment() -> dict[str, str]:
    """The environment as it was at the start: since then variables have been taken out."""
    entries = Path("/proc/self/environ").read_bytes().split(b"\0")
    pairs = (entry.partition(b"=") for entry in entries if b"=" in entry)
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}

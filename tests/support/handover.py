"""Handovers: the program under test starts itself again, and the new process writes into the same log."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from tests.support.log import Entry
from tests.support.process import Nodepass
from tests.support.sockets import until

HANDOVERS = int(os.environ.get("HANDOVERS", "4"))
"""How many a test makes under load; `make handovers` makes 50."""


def hand_over(stack: contextlib.ExitStack, run: Nodepass, process: int | None = None) -> int:
    """Have a new process take over from a run, or from the one that has taken over from it; the new one's id.

    The new process ends with the stack.
    """
    mark = run.mark()
    os.kill(process or run.pid, signal.SIGUSR2)
    taken: Entry = run.wait_for("process.handed_over", after=mark)
    new = int(taken["process"])
    stack.callback(end, new)
    run.wait_for("process.took_over", after=mark)
    return new


def end(process: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to a process that is no child of the tests, and wait until it has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)
    until(lambda: not is_running(process))


def is_running(process: int) -> bool:
    """Whether a process has not ended; one that nobody has reaped has."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"

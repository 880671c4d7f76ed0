"""wrk as a second witness of how many requests have failed. It says neither when nor for how long."""

from __future__ import annotations

import re
import signal
import subprocess

from tests.support.process import scrubbed
from tests.support.programs import installed
from tests.support.scope import Closes
from tests.support.sockets import Address, format_address


class Wrk(Closes):
    """wrk with a connection for each request, two at a time, in the network namespace of the thread that makes it."""

    def __init__(self, address: Address) -> None:
        options = ("--threads", "1", "--connections", "2", "--duration", "10m", "--timeout", "15s")
        url = f"http://{format_address(address)}/"
        command = [installed("wrk"), *options, "--header", "Connection: close", url]
        self._process = subprocess.Popen(command, env=scrubbed(), stdout=subprocess.PIPE, text=True)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def end(self) -> tuple[int, int]:
        """Have it end; how many requests were answered, and how many failed."""
        self._process.send_signal(signal.SIGINT)
        said, _ = self._process.communicate(timeout=20)
        answered = re.search(r"(\d+) requests in", said)
        assert answered, said
        errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", said)
        refused = re.search(r"Non-2xx or 3xx responses: (\d+)", said)
        failed = sum(map(int, errors.groups())) if errors else 0
        return int(answered[1]), failed + (int(refused[1]) if refused else 0)

"""Handovers of both ends, one after another, while real programs use the tunnels: none of them sees an error.

HANDOVERS says how many; `make handovers` tries 50.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.handover import HANDOVERS, hand_over
from tests.support.process import Nodepass, scrubbed
from tests.support.programs import installed, running, running_nginx
from tests.support.sockets import PATIENCE, Address, connect, datagram_socket, free_port, until
from tests.support.tunnel import CALM
from tests.support.v2_echo import DatagramEcho

LONGEST = 60 + 30 * HANDOVERS  # seconds for which a client would run that is not told to end

PAGES = "http {{ access_log off; server {{ listen 127.0.0.1:{port}; location / {{ return 200 page; }} }} }}"


class Both:
    """A server and a client with a tunnel for each target, and how often each has handed over."""

    def __init__(self, stack: contextlib.ExitStack, targets: dict[str, Address]) -> None:
        tunnel = free_port()
        self.visitors = {name: ("127.0.0.1", free_port()) for name in targets}
        servers = (
            f"server://127.0.0.1:{tunnel}/127.0.0.1:{self.visitors[name][1]}?tls=1&name={name}" for name in targets
        )
        clients = (f"client://127.0.0.1:{tunnel}/127.0.0.1:{port}?name={name}" for name, (_, port) in targets.items())
        self.runs = [stack.enter_context(Nodepass(*urls, env=CALM)) for urls in (servers, clients)]
        self._stack = stack
        self._processes: list[int | None] = [None, None]
        until(lambda: len(self.runs[1].find("server.connected")) == len(targets))

    def hand_over(self, which: int) -> None:
        """Have one of them hand over."""
        self._processes[which] = hand_over(self._stack, self.runs[which], self._processes[which])


class Flow:
    """One visitor of UDP, who asks again as soon as it has the answer."""

    def __init__(self, address: Address) -> None:
        self.answered, self.lost = 0, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(address,))
        self._thread.start()

    def _run(self, address: Address) -> None:
        with datagram_socket() as visitor:
            visitor.connect(address)
            while not self._over.is_set():
                visitor.send(question := str(self.answered + self.lost).encode())
                try:
                    self.answered += visitor.recv(100) == question
                except TimeoutError:
                    self.lost += 1

    def stop(self) -> None:
        self._over.set()
        self._thread.join()


@contextlib.contextmanager
def until_told(*command: str) -> Iterator[list[str]]:
    """A client that runs until the end of the context, when it is interrupted; what it has written then."""
    report: list[str] = []
    process = subprocess.Popen(command, env=scrubbed(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield report
    finally:
        process.send_signal(signal.SIGINT)
        report.append(process.communicate(timeout=PATIENCE)[0])


@pytest.mark.programs("wrk", "iperf3", "nginx")
def test_no_program_notices(stack: contextlib.ExitStack, tmp_path: Path) -> None:
    iperf, web = free_port(), free_port()
    stack.enter_context(running(iperf, "iperf3", "--server", "--bind", "127.0.0.1", "--port", str(iperf)))
    stack.enter_context(running_nginx(tmp_path, web, PAGES.format(port=web)))
    echo = stack.enter_context(DatagramEcho())
    both = Both(stack, {"web": ("127.0.0.1", web), "iperf": ("127.0.0.1", iperf), "echo": echo.address})
    url = "http://{}:{}/".format(*both.visitors["web"])
    wrk = (installed("wrk"), "--threads", "1", "--connections", "4", "--duration", f"{LONGEST}s", "--timeout", "20s")
    host, port = both.visitors["iperf"]
    flow = Flow(both.visitors["echo"])
    with (
        until_told(*wrk, url) as keeping,
        until_told(*wrk, "--header", "Connection: close", url) as closing,
        until_told(installed("iperf3"), "-J", "-b", "20M", "-t", str(LONGEST), "-c", host, "-p", str(port)) as stream,
    ):
        for number in range(HANDOVERS):
            both.hand_over(number % 2)
            connect(both.visitors["web"]).close()
            answered = flow.answered
            until(lambda answered=answered: flow.answered > answered + 10)  # type: ignore[misc]
    flow.stop()
    for [said] in (keeping, closing):
        assert "Requests/sec" in said
        assert not re.search(r"Socket errors|Non-2xx", said), said
    streamed = json.loads(stream[0])
    assert streamed.get("error", "").startswith("interrupt"), streamed.get("error")
    assert all(each["sum"]["bytes"] for each in streamed["intervals"])
    assert flow.lost == 0
    print(
        f"{HANDOVERS} handovers, {flow.answered} datagrams,", *re.findall(r"\d+ requests in", keeping[0] + closing[0])
    )

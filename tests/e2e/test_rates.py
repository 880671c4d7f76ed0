"""RATE_UP and RATE_DOWN as programs measure them, and the end of a tunnel whose rate is tiny."""

from __future__ import annotations

import contextlib
import json
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.process import scrubbed
from tests.support.programs import installed, running
from tests.support.sockets import Address, free_port, receive_all, receive_exactly, until
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, OurServer, Tunnel, assert_connected
from tests.support.v2_network import SERVER, Network

UP, DOWN = 10e6, 20e6
RATES = "rate_up=10M&rate_down=20M"
WITHIN = 0.05
RUNS = 3
PAYLOAD = 1448 / 1514
"""The share of payload in a full Ethernet frame: tc counts frames."""


@pytest.fixture
def target() -> Iterator[Target]:
    with Target() as target:
        yield target


@contextlib.contextmanager
def iperf3_tunnel(tls: int, limited: str) -> Iterator[Address]:
    """A tunnel to an iperf3 server, with rates at one end; the visitors' address."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        service = running(port, "iperf3", "--server", "--bind", "127.0.0.1", "--port", str(port))
        address = stack.enter_context(service)
        server = stack.enter_context(OurServer(tls, query=RATES if limited == "server" else "", log="info"))
        query = f"tls=0&{RATES}" if limited == "client" else "tls=0"
        client = OurClient(server.tunnel_address, address, query=query, log="info")
        stack.enter_context(client).wait_until_connected()
        yield server.visitor_address


def iperf3(address: Address, *options: str) -> dict[str, dict[str, float]]:
    """What one run of three seconds, of which the last two count, has at its end.

    What the run before had sent still passes at the rate; until then the server takes no other one: it says that it is
    busy, or closes on what it has not read, which is a reset.
    """
    host, port = address
    command = ["iperf3", "--client", host, "--port", str(port), "--time", "2", "--omit", "1", "--json", *options]
    reports: list[dict[str, Any]] = []

    def is_done() -> bool:
        done = subprocess.run(command, env=scrubbed(), capture_output=True, check=False, timeout=60)
        reports.append(json.loads(done.stdout))
        return "error" not in reports[-1] or bool(reports[-1]["start"]["connected"])

    until(is_done)
    assert "error" not in reports[-1], reports[-1]["error"]
    end: dict[str, dict[str, float]] = reports[-1]["end"]
    return end


def median(measure: Callable[[], float]) -> float:
    return statistics.median(measure() for _ in range(RUNS))


@pytest.mark.programs("iperf3")
@pytest.mark.parametrize(("tls", "limited"), [(0, "server"), (1, "server"), (1, "client")])
def test_iperf3_measures_the_rate(tls: int, limited: str) -> None:
    with iperf3_tunnel(tls, limited) as address:
        up = median(lambda: iperf3(address)["sum_received"]["bits_per_second"])
        down = median(lambda: iperf3(address, "--reverse")["sum_received"]["bits_per_second"])
    assert up == pytest.approx(UP, rel=WITHIN)
    assert down == pytest.approx(DOWN, rel=WITHIN)


@pytest.mark.programs("iperf3")
def test_iperf3_measures_the_rate_of_several_sessions_together() -> None:
    with iperf3_tunnel(0, "server") as address:
        up = median(lambda: iperf3(address, "--parallel", "4")["sum_received"]["bits_per_second"])
    assert up == pytest.approx(UP, rel=WITHIN)


@pytest.mark.programs("iperf3")
def test_iperf3_measures_the_rate_of_datagrams() -> None:
    """It sends twice as many as the rate lets through; its control connection is a session of the same tunnel."""

    options = ("--udp", "--bitrate", "20M", "--length", "1200")
    with iperf3_tunnel(0, "server") as address:
        up = median(lambda: iperf3(address, *options)["sum_received"]["bits_per_second"])
    assert up == pytest.approx(UP, rel=WITHIN)


@pytest.mark.programs("iperf3", "tc", "network namespaces")
def test_iperf3_measures_the_same_of_the_kernels_token_bucket() -> None:
    """So that what the tests above say about this program is not about iperf3 or this machine."""
    with Network() as network:
        bucket = "tbf rate 10mbit burst 16kb latency 50ms"
        command = f"{installed('tc')} -n {network.client.name} qdisc add dev cable root {bucket}"
        subprocess.run(command.split(), check=True)
        service = running_inside(network, "iperf3", "--server", "--forceflush", "--port", "5201")
        with service:
            up = median(
                lambda: network.client.inside(lambda: iperf3((SERVER, 5201))["sum_received"]["bits_per_second"])
            )
    assert up == pytest.approx(UP * PAYLOAD, rel=WITHIN)


@contextlib.contextmanager
def running_inside(network: Network, name: str, *arguments: str) -> Iterator[None]:
    """A program in the server's namespace, once a connection to it is taken."""
    command = [installed(name), *arguments]
    process = network.server.inside(
        lambda: subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=scrubbed(), text=True)
    )
    try:
        assert process.stdout
        assert any("listening" in line for line in process.stdout), f"{command} did not start"
        yield
    finally:
        process.terminate()
        process.communicate(timeout=10)


@pytest.mark.programs  # takes more than 3 s
def test_a_small_session_beside_a_bulk_one_is_answered_soon(target: Target) -> None:
    """In less than a quarter of a second; what the kernel keeps of the bulk would take some seconds."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(OurServer(query="rate_up=10M&rate_down=10M", log="info"))
        client = stack.enter_context(OurClient(server.tunnel_address, target.address, log="info"))
        client.wait_until_connected()
        tunnel = Tunnel(server, client, target)
        visitor, service = stack.enter_context(tunnel.session())
        asking, answering = stack.enter_context(tunnel.session())
        for source, sink in ((visitor, service), (service, visitor)):
            threading.Thread(target=send, args=(source,), daemon=True).start()
            threading.Thread(target=receive, args=(sink,), daemon=True).start()
        for _ in range(50):  # the burst is over then
            assert_connected(asking, answering)
        took = []
        for _ in range(50):
            began = time.monotonic()
            assert_connected(asking, answering)
            took.append(time.monotonic() - began)
        assert statistics.median(took) < 0.25


def send(source: socket.socket) -> None:
    """Send until the end."""
    with contextlib.suppress(OSError):
        while True:
            source.sendall(bytes(65536))


def receive(sink: socket.socket) -> None:
    """Receive until the end."""
    with contextlib.suppress(OSError):
        while sink.recv(65536):
            pass


def is_reset(sock: socket.socket) -> bool:
    """Whether a reset follows what has arrived."""
    try:
        receive_all(sock)
    except ConnectionResetError:
        return True
    return False


def test_a_tunnel_whose_rate_is_tiny_stops_in_time(target: Target) -> None:
    env = {**CALM, "SHUTDOWN_TIMEOUT": "300ms"}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(OurServer(query="rate_up=8k", env=env))
        client = stack.enter_context(OurClient(server.tunnel_address, target.address, query="rate_down=8k&tls=0"))
        client.wait_until_connected()
        visitor, service = stack.enter_context(Tunnel(server, client, target).session())
        for source, sink in ((visitor, service), (service, visitor)):
            source.sendall(bytes(20_000))  # 20 s of the rate
            receive_exactly(sink, 1024)
        assert server.stop() == 0
        assert server.find("process.cut", sessions=1)
        assert is_reset(visitor)

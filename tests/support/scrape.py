"""What a program that scrapes our metrics endpoint gets: the answer to a GET, and the samples in it."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.support.process import Environment, Nodepass
from tests.support.sockets import PATIENCE, Address, connect, parse_address, receive_all, until
from tests.support.tunnel import STEADY

WATCHED: Environment = {**STEADY, "METRICS_LISTEN": "127.0.0.1:0"}

Place = Address | Path


@dataclass(frozen=True)
class Response:
    """An HTTP answer."""

    status: int
    head: str
    body: str


@dataclass(frozen=True)
class Sample:
    """One line of a scrape."""

    name: str
    labels: dict[str, str]
    value: float


def metrics_of(run: Nodepass) -> Address:
    """Where a run serves its metrics, once it does."""
    address = re.match(r"http://([^/]+)/metrics", run.wait_for("metrics.listening")["address"])
    assert address
    return parse_address(address[1])


def reach(place: Place) -> socket.socket:
    """A connection to the endpoint."""
    if isinstance(place, Path):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(PATIENCE)
        sock.connect(str(place))
        return sock
    return connect(place)


def get(place: Place, path: str = "/metrics", method: str = "GET") -> Response:
    """Ask once."""
    with reach(place) as sock:
        sock.sendall(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        head, _, body = receive_all(sock).decode().partition("\r\n\r\n")
    match = re.match(r"HTTP/1\.1 (\d{3}) ", head)
    assert match, f"no HTTP answer: {head!r}"
    return Response(int(match[1]), head, body)


def parse(text: str) -> list[Sample]:
    """The samples of an exposition."""
    return [
        Sample(sample.name, dict(sample.labels), sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]


def scrape(place: Place) -> list[Sample]:
    """The samples of now; of a moment ago where somebody else has just asked."""
    response = get(place)
    assert response.status == 200, response
    return parse(response.body)


def value(place: Place, name: str, **labels: str) -> float:
    """The sum of the samples of this name that have at least these labels; AssertionError where there is none."""
    found = [each.value for each in scrape(place) if each.name == name and labels.items() <= each.labels.items()]
    assert found, f"no sample {name} {labels}"
    return sum(found)


def wait_for_value(place: Place, wanted: float, name: str, **labels: str) -> None:
    """Return once it is that."""
    until(lambda: value(place, name, **labels) == wanted, what=f"{name} {labels} is {wanted}")


def wait_for_more(place: Place, than: float, name: str, **labels: str) -> None:
    """Return once it is more than that."""
    until(lambda: value(place, name, **labels) > than, what=f"{name} {labels} is more than {than}")

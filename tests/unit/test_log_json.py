"""JSON lines: what becomes of fields that JSON has no type for."""

from __future__ import annotations

import io
import json
import logging
import socket
from collections.abc import Iterator

import pytest

from nodepass import log
from nodepass.config.urls import Address
from nodepass.errors import ProtocolError
from nodepass.net.sockets import Endpoint


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """The lines of a log that is written as JSON."""
    logger, stream = logging.getLogger("nodepass"), io.StringIO()
    before = logger.handlers, logger.propagate, logger.level
    log.set_up("debug", {}, stream, "json")
    yield stream
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])


FIELDS = {
    "a number": (5, 5),
    "a flag": (True, True),
    "nothing": (None, None),
    "an endpoint": (Endpoint(socket.AF_INET, ("127.0.0.1", 80)), "127.0.0.1:80"),
    "an address": (Address("::1", 80), "[::1]:80"),
    "an error": (ProtocolError("it says nothing"), "it says nothing"),
    "counters": ({"tcp_ended": {"completed": 1}}, {"tcp_ended": {"completed": 1}}),
    "a list": ([1, Address("", 80)], [1, ":80"]),
    "control characters": ("\x1b[31m\n", "\x1b[31m\n"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_is_written_as(written: io.StringIO, name: str) -> None:
    given, expected = FIELDS[name]
    log.Log("server:1").session("0a1b2c3d").info("visitor.connected", "visitor %(visitor)s", visitor=given)
    line = written.getvalue()
    assert line.count("\n") == 1
    assert line.removesuffix("\n").isprintable()
    shown = json.loads(line)
    assert shown["visitor"] == expected
    assert shown["message"] == f"visitor {given}"
    assert (shown["event"], shown["level"]) == ("visitor.connected", "info")
    assert (shown["tunnel"], shown["session"]) == ("server:1", "0a1b2c3d")


def test_a_sentence_without_fields_may_have_percent_signs(written: io.StringIO) -> None:
    log.Log("server:1").info("process.bugs", log.literal("100 % of fe80::1%eth0"))
    log.Log("server:1").info("process.bugs", log.literal("100 % of fe80::1%eth0"), bugs=1)
    assert [json.loads(line)["message"] for line in written.getvalue().splitlines()] == ["100 % of fe80::1%eth0"] * 2

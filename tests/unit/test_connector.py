"""What a client says of a server that it cannot use, however that server behaves."""

from __future__ import annotations

import errno
from typing import Any, cast

from gevent.event import Event

from nodepass.client.connector import Connector, Server
from nodepass.client.names import Name
from nodepass.config.settings import Settings
from nodepass.config.urls import Address
from nodepass.errors import ProtocolError, RefusedError, VerificationError
from nodepass.log import Log
from nodepass.stats import Stats
from nodepass.tasks import TaskGroup
from nodepass.tunnel.handshake import Terms
from nodepass.tunnel.part import Common
from nodepass.wire.negotiation import REASONS


def make_connector() -> tuple[Connector, Log, Stats]:
    log, stats = Log("test"), Stats()
    common = Common(Settings(), log, stats, TaskGroup(log, stats))
    server = Server("server.example:10101", Name(Address("server.example", 10101), log), Terms("server.example"))
    nothing = cast(Any, None)
    return Connector(common, server, nothing, nothing, Event(), lambda: None), log, stats


def test_a_server_with_a_new_reason_each_time_makes_one_line_a_minute() -> None:
    connector, log, stats = make_connector()
    for number in range(100):
        connector._report_failure(RefusedError(f"reason-{chr(97 + number % 26)}-{'x' * (number // 26)}"))
    assert sum(burst.lines for burst in log._bursts.values()) == 1
    assert sum(burst.suppressed for burst in log._bursts.values()) == 99
    assert stats.control_failures["other"] == 100


def test_each_known_reason_has_a_line_of_its_own() -> None:
    connector, log, _ = make_connector()
    for _ in range(2):
        for token, words in REASONS.items():
            connector._report_failure(RefusedError(token, words))
    assert sum(burst.lines for burst in log._bursts.values()) == len(REASONS)


def lines_of(*errors: OSError) -> int:
    connector, log, _ = make_connector()
    for error in errors:
        connector._report_failure(error)
    return sum(burst.lines for burst in log._bursts.values())


def test_a_server_that_says_something_else_each_time_makes_one_line_a_minute() -> None:
    assert lines_of(*(ProtocolError(f"malformed signal: {number}") for number in range(100))) == 1
    assert lines_of(*(VerificationError(f"the certificate is for {number}", "name") for number in range(100))) == 1


def test_each_check_and_each_error_of_the_kernel_has_a_line_of_its_own() -> None:
    assert lines_of(VerificationError("-", "name"), VerificationError("-", "expired")) == 2
    assert lines_of(*(OSError(number, "-") for number in (errno.ECONNREFUSED, errno.EHOSTUNREACH))) == 2

"""The access log: one line for each session at its end, the same COLUMNS on both ends, as text or as a JSON object.

A part that serves sessions begins a `Visit` for each, notes in it what becomes known, and ends it where `stats` counts
the session's outcome, or that a connection was refused: so the sums of the lines are those of the metrics. A refused
datagram begins no session, and has no line: its source can be forged, and there may be very many. Without ACCESS_LOG
there is no `AccessLog`, and a session has no visit. Where the lines go is not known here: the daemon's `access_output`
takes them, and it never waits.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from nodepass.net.relay import Traffic
from nodepass.tunnel.part import Common

# After the time; docs/visitors.md says what they mean. A new one follows the last, so that programs that count go on.
COLUMNS = (
    *("tunnel", "session", "protocol", "visitor", "local", "client", "target", "dial"),
    *("up", "down", "first_byte", "seconds", "outcome"),
)
# What a peer sent may be no address, and could forge a column: anything but such a word is unknown. Without quotes and
# backslashes JSON has it as it is: an encoder took half of the time of a line.
_WORD = re.compile(r"[!#-\[\]-~]{1,300}")
_WORDS = re.compile(rf"{_WORD.pattern}(?: {_WORD.pattern}){{7}}")  # one look at all of them, as nearly all lines pass


class AccessLog:
    """Makes the lines of one tunnel."""

    def __init__(self, common: Common, write: Callable[[str], object]) -> None:
        self._log = common.log  # has the tunnel's name, which is complete only once its port is open
        self._write = write
        self._form = _JSON if common.settings.log_format == "json" else _TEXT

    @classmethod
    def of(cls, common: Common) -> AccessLog | None:
        """That of a tunnel, if it has one."""
        return cls(common, common.access) if common.access else None

    def begin(self, protocol: str, began: float, visitor: str = "", local: str = "") -> Visit:
        """A session that began then, in time.monotonic(), from a visitor's address to one of the server's."""
        return Visit(self, protocol, began, visitor, local)

    def write(self, visit: Visit, outcome: str) -> None:
        """Write the line of a session that has ended."""
        form, now, seconds = self._form, time.time(), time.monotonic() - visit.began
        who = (self._log.tunnel, visit.session, visit.protocol, visit.visitor, visit.local)
        words = [each or "-" for each in (*who, visit.client, visit.target, visit.dial)]
        if not _WORDS.fullmatch(" ".join(words)):
            words = [each if _WORD.fullmatch(each) else "-" for each in words]
        first_byte = form.unknown if visit.first_byte is None else f"{visit.first_byte:.6f}"
        numbers = (visit.up, visit.down, first_byte, f"{seconds:.6f}")
        line = form.template % (form.date(int(now)), now % 1 * 1000, *words, *numbers, outcome)
        self._write(line.replace('"-"', "null"))  # no word has a quote, so text has none


@dataclass(eq=False, slots=True)
class Visit:
    """One session, as far as this end knows it; an empty text is unknown."""

    log: AccessLog
    protocol: str  # tcp or udp
    began: float  # time.monotonic()
    visitor: str
    local: str
    session: str = ""
    client: str = ""  # on a server: the client that the session is passed to
    target: str = ""  # on a client
    dial: str = ""  # on a client: ok, or the reason why there is no connection to the target
    up: int = 0  # payload bytes
    down: int = 0
    first_byte: float | None = None  # seconds to the first byte of the way back

    def count_up(self, size: int) -> None:
        """A datagram has been passed on to the target."""
        self.up += size

    def count_down(self, size: int) -> None:
        """A datagram has been passed back to the visitor."""
        if self.first_byte is None:
            self.first_byte = time.monotonic() - self.began
        self.down += size

    def end(self, outcome: str) -> None:
        """It has ended, or could not begin."""
        self.log.write(self, outcome)

    def end_relayed(self, traffic: Traffic) -> None:
        """It has ended after a relay of these bytes."""
        self.up, self.down, self.first_byte = traffic.up, traffic.down, traffic.first_byte
        self.log.write(self, traffic.outcome)


@lru_cache(1)  # many lines are of one second
def _local_date(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


@lru_cache(1)
def _utc_date(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def _json_template() -> str:
    numbers = ("up", "down", "first_byte", "seconds")
    columns = [f'"{name}": %s' if name in numbers else f'"{name}": "%s"' for name in COLUMNS]
    return f'{{"time": "%s.%03d+00:00", {", ".join(columns)}}}'


class _Form(NamedTuple):
    """What a line is made of."""

    template: str  # of the date, milliseconds and the COLUMNS
    date: Callable[[int], str]  # of a Unix time
    unknown: str  # a number


_TEXT = _Form("%s.%03d" + " %s" * len(COLUMNS), _local_date, "-")  # for people, awk and fail2ban; local time as the log
_JSON = _Form(_json_template(), _utc_date, "null")  # for programs; in UTC as in the log

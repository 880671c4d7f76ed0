"""The log: one event a line on stderr, as text for people or as JSON for programs (`LOG_FORMAT`).

An event has a stable name (`client.connected`), fields, and a sentence made of them; docs/logging.md lists all. As text
a line is `time LEVEL tunnel [session] sentence`, for journald `<priority>tunnel [session] sentence`, because journald
keeps the time itself; as JSON it is an object with `time`, `level`, `tunnel`, `session`, `event`, `message` and the
fields. Secrets never reach this module; what a peer sent reaches a line escaped.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TextIO

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "fatal": logging.CRITICAL,
}
FORMATS = ("text", "json")
RESERVED = ("time", "level", "tunnel", "session", "event", "message", "traceback")  # JSON's keys beside the fields
_NAMES = {level: name for name, level in LEVELS.items()}
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
_COLOURS = {logging.DEBUG: 2, logging.INFO: 32, logging.WARNING: 33, logging.ERROR: 31, logging.CRITICAL: 35}

_NO_FIELDS = {"": ""}  # logging leaves a sentence as it is where the mapping is empty, and `%%` must become `%`

_root = logging.getLogger("nodepass")


@dataclass(frozen=True)
class Limit:
    """At most `burst` lines in so many seconds of one event; those with another `key` are counted apart."""

    key: object = ""
    seconds: float = 1.0
    burst: int = 10


def literal(text: str) -> str:
    """A sentence that says just this, whatever its fields are."""
    return text.replace("%", "%%")


class Log:
    """The log of one tunnel, or of one of its sessions.

    Each method takes an event's name, its sentence with `%(field)s` in it, and the fields. A `limit` leaves lines out,
    which `report_suppressed` counts; a `crash` is logged with its traceback.
    """

    def __init__(self, tunnel: str, session: str = "") -> None:
        self.tunnel = tunnel
        self._session = session
        self._bursts: dict[tuple[str, object], tuple[float, int, float]] = {}  # -> begin (monotonic), lines, seconds
        self._suppressed: dict[tuple[str, object], tuple[int, int]] = {}  # -> level, lines

    def rename(self, tunnel: str) -> None:
        """Speak for a tunnel of another name from now on."""
        self.tunnel = tunnel

    def session(self, id: str) -> Log:
        """The log of one session of this tunnel."""
        return Log(self.tunnel, id)

    def debug(self, event: str, sentence: str, /, **fields: object) -> None:
        if _root.isEnabledFor(logging.DEBUG):  # a session calls this many times
            self._write(logging.DEBUG, event, sentence, fields)

    def info(self, event: str, sentence: str, /, limit: Limit | None = None, **fields: object) -> None:
        self.log(logging.INFO, event, sentence, limit, None, **fields)

    def warning(self, event: str, sentence: str, /, limit: Limit | None = None, **fields: object) -> None:
        self.log(logging.WARNING, event, sentence, limit, None, **fields)

    def error(
        self,
        event: str,
        sentence: str,
        /,
        limit: Limit | None = None,
        crash: BaseException | None = None,
        **fields: object,
    ) -> None:
        self.log(logging.ERROR, event, sentence, limit, crash, **fields)

    def log(
        self,
        number: int,
        event: str,
        sentence: str,
        /,
        limit: Limit | None = None,
        crash: BaseException | None = None,
        **fields: object,
    ) -> None:
        """Log at one of `logging`'s levels."""
        if _root.isEnabledFor(number) and (limit is None or self._may_write(number, event, limit)):
            self._write(number, event, sentence, fields, crash)

    def always(self, event: str, sentence: str, /, **fields: object) -> None:
        """A line that was asked for by name, whatever the level."""
        self._write(logging.INFO, event, sentence, fields)

    def report_suppressed(self) -> None:
        """Say how many lines limits left out, so that none is lost silently; called at every report."""
        for (event, key), (number, lines) in self._suppressed.items():
            about = f"{event}: {key}" if key else event
            self.log(
                number,
                "log.suppressed",
                "%(lines)d more lines like the last about: %(about)s",
                lines=lines,
                suppressed=event,
                about=about,
            )
        self._suppressed.clear()
        now = time.monotonic()
        self._bursts = {key: burst for key, burst in self._bursts.items() if now - burst[0] < burst[2]}

    def _may_write(self, number: int, event: str, limit: Limit) -> bool:
        now, key = time.monotonic(), (event, limit.key)
        began, count, _ = self._bursts.get(key, (now, 0, limit.seconds))
        if now - began >= limit.seconds:
            self.report_suppressed()
            began, count = now, 0
        self._bursts[key] = (began, count + 1, limit.seconds)
        if count < limit.burst:
            return True
        self._suppressed[key] = (number, self._suppressed.get(key, (number, 0))[1] + 1)
        return False

    def _write(
        self, number: int, event: str, sentence: str, fields: dict[str, object], crash: BaseException | None = None
    ) -> None:
        trace = None if crash is None else (type(crash), crash, crash.__traceback__)
        record = _root.makeRecord(
            _root.name,
            number,
            "",
            0,
            sentence,
            (fields or _NO_FIELDS,),
            trace,
            extra={"tunnel": self.tunnel, "session": self._session, "event": event, "fields": fields},
        )
        _root.handle(record)


class LineFormatter(logging.Formatter):
    """Lines for a person: time, level, tunnel, sentence; coloured on a terminal."""

    default_msec_format = "%s.%03d"

    def __init__(self, colours: bool = False) -> None:
        super().__init__()
        self._colours = colours

    def format(self, record: logging.LogRecord) -> str:
        level = f"{_NAMES[record.levelno].upper():<5}"
        if self._colours:
            level = f"\x1b[{_COLOURS[record.levelno]}m{level}\x1b[0m"
        return f"{self.formatTime(record)} {level} {self.text(record)}"

    def text(self, record: Any) -> str:
        """What follows the level: tunnel, session, sentence, traceback."""
        session = f" [{record.session}]" if record.session else ""
        text = f"{record.tunnel}{session} {_printable(record.getMessage())}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class JournalFormatter(LineFormatter):
    """Lines for journald: a priority before each, no time."""

    def format(self, record: logging.LogRecord) -> str:
        return _with_priority(record, self.text(record))


class JSONFormatter(logging.Formatter):
    """One object a line; values that JSON does not have, an address say, are their text."""

    def __init__(self, priorities: bool = False) -> None:
        super().__init__()
        import datetime
        import json

        self._priorities = priorities
        self._encode = json.JSONEncoder().encode
        self._from_timestamp = datetime.datetime.fromtimestamp
        self._utc = datetime.timezone.utc

    def format(self, record: Any) -> str:
        shown = {
            "time": self._from_timestamp(record.created, self._utc).isoformat(timespec="milliseconds"),
            "level": _NAMES[record.levelno],
            "tunnel": record.tunnel,
            **({"session": record.session} if record.session else {}),
            "event": record.event,
            "message": record.getMessage(),
            **{name: _plain(value) for name, value in record.fields.items()},
            **({"traceback": self.formatException(record.exc_info)} if record.exc_info else {}),
        }
        line = self._encode(shown)
        return _with_priority(record, line) if self._priorities else line


def _plain(value: Any) -> Any:
    """What JSON has for a field. A named tuple is no list here: an endpoint's text is what an operator looks for."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if type(value) in (list, tuple) else str(value)


def _with_priority(record: logging.LogRecord, text: str) -> str:
    priority = f"<{_PRIORITIES[record.levelno]}>"
    return "\n".join(priority + line for line in text.split("\n"))


def _printable(text: str) -> str:
    """A sentence without control characters: what a peer sent can forge no line and move no cursor."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def journald_reads(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether JOURNAL_STREAM names this very stream (`device:inode`), as sd_notify(3)'s neighbours define it."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def set_up(level: str, environ: Mapping[str, str], stream: TextIO | None = None, style: str = "text") -> None:
    """Send the log to `stream` (stderr), in one of FORMATS, as it suits who reads it."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    journal = journald_reads(stream, environ)
    if style == "json":
        handler.setFormatter(JSONFormatter(journal))
    elif journal:
        handler.setFormatter(JournalFormatter())
    else:
        handler.setFormatter(LineFormatter(stream.isatty() and "NO_COLOR" not in environ))
    _root.handlers = [handler]
    _root.propagate = False
    _root.setLevel(LEVELS[level])


def finish() -> None:
    """Write what waits; what a full disk does not take is given up, and does not change the exit status."""
    try:
        sys.stderr.flush()
    except OSError:
        sys.stderr = None  # the interpreter would try again, and exit with status 120

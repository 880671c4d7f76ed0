"""The log: one line an event on stderr, `time LEVEL tunnel [session] message`.

On journald it is `<priority>tunnel [session] message`, because journald keeps the time itself. Peers' bytes never reach
a line unescaped (`protocol.printable`), and secrets never reach this module.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, TextIO

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "fatal": logging.CRITICAL,
}
_NAMES = {level: name.upper() for name, level in LEVELS.items()}
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
_COLOURS = {logging.DEBUG: 2, logging.INFO: 32, logging.WARNING: 33, logging.ERROR: 31, logging.CRITICAL: 35}

_root = logging.getLogger("nodepass")

if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter  # takes no parameter before Python 3.11


class Log(_Adapter):
    """A logger that knows which tunnel, and perhaps which session, it speaks for."""

    def __init__(self, where: str) -> None:
        super().__init__(_root, {"where": where})
        self.where = where
        self._bursts: dict[str, tuple[float, int, float]] = {}  # key -> begin (time.monotonic()), lines, seconds
        self._left_out: dict[str, tuple[int, int]] = {}  # key -> level, lines

    def rename(self, where: str) -> None:
        """Speak under another name from now on."""
        self.where = where
        self.extra = {"where": where}

    def session(self, id: str) -> Log:
        """The log of one session of this tunnel."""
        return Log(f"{self.where} [{id}]")

    def debug(self, msg: object, *args: object, **kwargs: Any) -> None:
        if _root.isEnabledFor(logging.DEBUG):  # sessions call this many times each: one look instead of three calls
            super().debug(msg, *args, **kwargs)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        kwargs["extra"] = self.extra
        return msg, kwargs

    def limited(
        self,
        level: int,
        key: str,
        message: str,
        *args: object,
        seconds: float = 1.0,
        burst: int = 10,
        exc_info: BaseException | None = None,
    ) -> None:
        """Log at most `burst` lines in so many seconds under this key; `tell_rest` says how many were left out."""
        now = time.monotonic()
        began, count, _ = self._bursts.get(key, (now, 0, seconds))
        if now - began >= seconds:
            self.tell_rest()
            began, count = now, 0
        self._bursts[key] = (began, count + 1, seconds)
        if count < burst:
            self.log(level, message, *args, exc_info=exc_info)
        else:
            self._left_out[key] = (level, self._left_out.get(key, (level, 0))[1] + 1)

    def tell_rest(self) -> None:
        """Say how many lines were left out, so that none is lost silently; called at every report."""
        for key, (level, count) in self._left_out.items():
            self.log(level, "%d more lines like the last about: %s", count, key)
        self._left_out.clear()
        now = time.monotonic()
        self._bursts = {key: burst for key, burst in self._bursts.items() if now - burst[0] < burst[2]}

    def always(self, message: str, *args: object) -> None:
        """A line that was asked for by name, whatever the level."""
        record = _root.makeRecord(_root.name, logging.INFO, "", 0, message, args, None, extra=self.extra)
        _root.handle(record)


class LineFormatter(logging.Formatter):
    """Lines for a person: time, level, tunnel, message; coloured on a terminal."""

    default_msec_format = "%s.%03d"

    def __init__(self, colours: bool) -> None:
        super().__init__()
        self._colours = colours

    def format(self, record: logging.LogRecord) -> str:
        level = f"{_NAMES.get(record.levelno, record.levelname):<5}"
        if self._colours:
            level = f"\x1b[{_COLOURS.get(record.levelno, 0)}m{level}\x1b[0m"
        return f"{self.formatTime(record)} {level} {_text(self, record)}"


class JournalFormatter(logging.Formatter):
    """Lines for journald: a priority before each, no time."""

    def format(self, record: logging.LogRecord) -> str:
        priority = f"<{_PRIORITIES.get(record.levelno, 6)}>"
        return "\n".join(priority + line for line in _text(self, record).split("\n"))


def _text(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    text = f"{getattr(record, 'where', record.name)} {record.getMessage()}"
    return f"{text}\n{formatter.formatException(record.exc_info)}" if record.exc_info else text


def journald_reads(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether JOURNAL_STREAM names this very stream (`device:inode`), as sd_notify(3)'s neighbours define it."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def set_up(level: str, environ: Mapping[str, str], stream: TextIO | None = None) -> None:
    """Send the log to `stream` (stderr), in the form that suits who reads it."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    if journald_reads(stream, environ):
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

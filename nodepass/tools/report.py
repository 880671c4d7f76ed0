"""The findings of `nodepass --check`: one line each, and the exit status of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TextIO

from nodepass.wire.lines import printable

FAILED = 1  # exit status: an address or a peer failed, which may pass later
BAD_INPUT = 2  # exit status: the configuration needs a change
_COLOURS = {"ok": 32, "warn": 33, "fail": 31}


class Report:
    """Prints findings: `ok`, `warn` or `fail`, the subject, and the result; `status` is the exit status so far."""

    def __init__(self, stream: TextIO, environ: Mapping[str, str]) -> None:
        self.status = 0
        self._stream = stream
        self._is_coloured = stream.isatty() and "NO_COLOR" not in environ

    def ok(self, where: str, text: str) -> None:
        """It works."""
        self._print("ok", where, text)

    def warn(self, where: str, text: str) -> None:
        """It works, but the operator should know about it."""
        self._print("warn", where, text)

    def fail(self, where: str, text: str) -> None:
        """It does not work now, but may later."""
        self._print("fail", where, text)
        self.status = max(self.status, FAILED)

    def bad(self, where: str, text: str) -> None:
        """It cannot work without a change of the configuration."""
        self._print("fail", where, text)
        self.status = BAD_INPUT

    def _print(self, level: str, where: str, text: str) -> None:
        line = text if text.isprintable() else printable(text.encode(errors="backslashreplace"), 1000)
        word = f"\x1b[{_COLOURS[level]}m{level}\x1b[0m" if self._is_coloured else level
        self._stream.write(f"{word}{' ' * (4 - len(level))} {where}: {line}\n")
        self._stream.flush()

"""The command line, called in this process: for what ends before anything is served, such as bad input.

It takes a hundredth of the time of a start of the program. What it leaves out is gevent's patch of the standard library
and the script around it; a few tests in tests/e2e start the program itself with the same input.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator
from unittest import mock

from nodepass import cli
from nodepass.daemon.daemon import Daemon
from nodepass.tools import top
from tests.support.process import Environment, Finished, scrubbed


class Accepted(Exception):
    """The input was not refused: a start would serve now."""


class _Daemon(Daemon):
    """Made like the real one, certificates and all, but does not run."""

    def run(self) -> None:
        raise Accepted


def call(*arguments: str, env: Environment | None = None) -> Finished:
    """Call the command line; Accepted where it would begin to serve."""
    output, errors = io.StringIO(), io.StringIO()
    with (
        _log_as_before(),
        mock.patch("nodepass.cli.Daemon", _Daemon),
        mock.patch("gc.freeze"),
        mock.patch.dict(os.environ, scrubbed(env), clear=True),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            code = top.main(arguments[1:]) if arguments[:1] == ("top",) else cli.main(arguments)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    return Finished(code, output.getvalue(), errors.getvalue())


@contextlib.contextmanager
def _log_as_before() -> Iterator[None]:
    logger = logging.getLogger("nodepass")
    before = logger.handlers, logger.propagate, logger.level
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before[0], before[1]
        logger.setLevel(before[2])


def refusals(done: Finished, *parts: str) -> list[str]:
    """What is wrong with how bad input was refused: exit status 2, and one line that has these parts."""
    found = [
        (done.code != 2, f"exit status {done.code}"),
        (done.output != "", "text on standard output"),
        (len(done.lines) != 1 or not done.errors.endswith("\n"), "not one line"),
        ("Traceback" in done.errors, "a traceback"),
        *((part not in done.errors, f"no {part!r}") for part in parts),
    ]
    return [f"{what}: {done.errors!r}" for wrong, what in found if wrong]

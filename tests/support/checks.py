"""Runs `nodepass --check`, started or called in this process, and reads its lines."""

from __future__ import annotations

import re

from tests.support.command import call
from tests.support.process import Finished, run

LINE = re.compile(r"(ok  |warn|fail) [\w:#/.-]+: .+")


def check_of(*arguments: str, **env: str) -> Finished:
    """Start the check; every line it prints has the documented form, and nothing else is printed."""
    return _checked(run("--check", *arguments, env=env))


def check_here(*arguments: str, **env: str) -> Finished:
    """The same, called in this process: for what no other process has to see."""
    return _checked(call("--check", *arguments, env=env))


def _checked(done: Finished) -> Finished:
    assert done.errors == ""
    for line in done.output.splitlines():
        assert LINE.fullmatch(line), line
    return done


def found(done: Finished, level: str, pattern: str) -> bool:
    """Whether a line of this level matches."""
    return any(re.match(rf"{level} .*{pattern}", line) for line in done.output.splitlines())


def trouble(done: Finished) -> list[str]:
    """The lines that are not ok, but for those that say what protects a tunnel."""
    return [line for line in done.output.splitlines() if not re.match(r"ok |warn \S+: security: ", line)]

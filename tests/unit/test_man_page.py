"""The manual page names every setting with its flag, variable, unit, default and meaning, and nothing else.

After a change of the table, `python -m tests.unit.test_man_page` writes that part of the page anew.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from contrib.dist.completion import load_manager
from nodepass.config.settings import Scope, rows
from tests.support.process import REPOSITORY, run

PAGE = REPOSITORY / "docs" / "nodepass.1"
BEGIN, END = '.\\" begin settings\n', '.\\" end settings\n'


def render_settings() -> str:
    """The table of settings as a list of mdoc(7)."""
    lines = [".Bl -tag -width Ds"]
    for name, row in rows().items():
        lines += [
            f".It Fl -{name.replace('_', '-')} Ar {row.kind.unit} , Ev {name.upper()}",
            f"{row.help[0].upper()}{row.help[1:]}.",
            f"Allowed: {row.kind.allowed}.",
            f"Default: {row.default}.",
            *(["For the whole process: not in a URL."] if row.scope is Scope.PROCESS else []),
        ]
    return "\n".join([*lines, ".El\n"])


def split_page() -> tuple[str, str, str]:
    """The page before, in and behind its settings."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    settings, _, behind = rest.partition(END)
    return before, settings, behind


def test_the_page_has_the_settings_of_the_table() -> None:
    assert split_page()[1] == render_settings()


def test_the_page_names_every_option_of_the_help() -> None:
    page = PAGE.read_text()
    options = set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", run("--help").output))
    assert options
    assert {option for option in options if f"Fl -{option}" not in page} == set()


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(line.split(), marks=pytest.mark.programs(line.split()[0]), id=line.split()[0])
        for line in ("mandoc -T lint -W warning", "groff -man -mdoc -ww -z -T utf8", "man --warnings --local-file")
    ],
)
def test_what_shows_manual_pages_has_nothing_to_say_against_it(command: list[str]) -> None:
    done = subprocess.run(
        [*command, str(PAGE)],
        capture_output=True,
        text=True,
        check=False,
        env={"LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    if command[0] == "man":
        assert "SEMAPHORE_LIMIT" in done.stdout
    else:
        assert done.stdout == ""


def test_the_page_of_the_manager_names_its_commands() -> None:
    page = (REPOSITORY / "docs" / "nodepass-manager.8").read_text()
    commands = load_manager().COMMANDS
    assert re.findall(r"^\.It Cm (\S+)", page, re.MULTILINE) == list(commands)


if __name__ == "__main__":
    before, _, behind = split_page()
    Path(PAGE).write_text(before + BEGIN + render_settings() + END + behind)

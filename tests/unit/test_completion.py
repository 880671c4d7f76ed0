"""Completion for shells, made from the command lines: what bash offers, and that zsh takes it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from contrib.dist import completion
from nodepass.config.settings import rows

ASK = """\
compopt() { :; }
source "$1"
shift
function=$1
shift
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
"$function"
printf '%s\\n' "${COMPREPLY[@]}"
"""

ASK_ZSH = """\
_arguments() { print -rl -- "$@"; }
_describe() { print -rl -- $commands; }
words=($2 "")
CURRENT=2
source $1
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("completion")
    completion.write(directory / "bash", directory / "zsh")
    return directory


def ask(files: Path, *words: str) -> set[str]:
    """What bash offers for the last of these words."""
    command = ["bash", "-c", ASK, "bash", str(files / "bash" / words[0]), f"_{words[0].replace('-', '_')}", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return set(done.stdout.split())


def test_bash_completes_every_setting_and_the_values_that_are_words(files: Path) -> None:
    offered = ask(files, "nodepass", "--")
    assert {"--check", "--generate-key", "--tunnel-key-file"} <= offered
    assert {f"--{name.replace('_', '-')}" for name in rows()} <= offered
    assert ask(files, "nodepass", "--log-format", "") == {"text", "json"}
    assert ask(files, "nodepass", "--wire", "2", "cl") == {"client://"}
    assert ask(files, "nodepass", "--pool-get-timeout", "") == set()
    assert ask(files, "nodepass", "top", "--o") == {"--once"}


def test_bash_completes_the_commands_of_the_manager_and_their_flags(files: Path) -> None:
    assert {"create", "list", "logs"} <= ask(files, "nodepass-manager", "")
    assert ask(files, "nodepass-manager", "create", "--ke") == {"--key-file"}
    assert ask(files, "nodepass-manager", "logs", "--f") == {"--follow"}


@pytest.mark.programs("zsh")
@pytest.mark.parametrize("name", ["nodepass", "nodepass-manager"])
def test_zsh_takes_the_same(files: Path, name: str) -> None:
    command = ["zsh", "--no-rcs", "-c", ASK_ZSH, "zsh", str(files / "zsh" / f"_{name}"), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    wanted = "--log-format[text" if name == "nodepass" else "create:write an instance"
    assert wanted in done.stdout

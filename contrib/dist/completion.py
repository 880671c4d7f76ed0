"""Completion of both commands for bash and zsh, made from their own command lines, so that it is never out of date.

The Debian package has it. `debian` calls `write`; nothing here knows where a shell looks for it.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from nodepass import cli
from nodepass.config.settings import rows
from nodepass.tools import top

ROOT = Path(__file__).resolve().parents[2]
MANAGER = ROOT / "contrib" / "systemd" / "nodepass-manager"
FIRST_WORDS = ("server://", "client://", "top")
INSTANCES = "/etc/nodepass/*.env"

Options = dict[str, tuple[str, str, list[str]]]
"""Of a flag: its help, the unit of its value, which is empty where it takes none, and the words that it may be."""


def write(bash: Path, zsh: Path) -> None:
    """Write the files into the directories for the two shells, by the names that these look for."""
    program, manager = cli.make_parser(), load_manager().make_parser()
    bash.mkdir(parents=True)
    zsh.mkdir(parents=True)
    (bash / "nodepass").write_text(bash_program(options_of(program), options_of(top.make_parser())))
    (zsh / "_nodepass").write_text(zsh_program(options_of(program), options_of(top.make_parser())))
    commands = dict(commands_of(manager))
    (bash / "nodepass-manager").write_text(bash_manager(commands))
    (zsh / "_nodepass-manager").write_text(zsh_manager(commands))


def load_manager() -> ModuleType:
    """The manager, a script without a suffix, as a module."""
    loader = importlib.machinery.SourceFileLoader("nodepass_manager", str(MANAGER))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = writes
    return module


def options_of(parser: argparse.ArgumentParser) -> Options:
    """The flags of a command line."""
    found: Options = {}
    for action in parser._actions:
        for flag in action.option_strings:
            unit = "" if action.nargs == 0 else str(action.metavar or action.dest).lower()
            found[flag] = str(action.help or "").replace("%(default)s", str(action.default)), unit, words_of(flag)
    return found


def words_of(flag: str) -> list[str]:
    """The values of a setting that is one of a few words."""
    row = rows().get(flag.lstrip("-").replace("-", "_"))
    return row.kind.allowed.split(" or ") if row and row.kind.unit == "word" else []


def commands_of(parser: argparse.ArgumentParser) -> Iterator[tuple[str, tuple[str, Options, bool]]]:
    """The commands of the manager: what each does, its flags, and whether it takes an instance that exists."""
    (subparsers,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    for name, command in subparsers.choices.items():
        takes_name = name != "create" and any(each.dest == "name" for each in command._actions)
        yield name, (command.description or "", options_of(command), takes_name)


# bash


def bash_cases(options: Options) -> str:
    """What follows a flag that takes a value: its words, or the name of a file."""
    words = [f"        {flag}) _nodepass_words {' '.join(each)} ;;" for flag, (_, _, each) in options.items() if each]
    files = sorted({flag for flag, (_, unit, _) in options.items() if unit in ("file", "dir", "wheel")})
    others = sorted({flag for flag, (_, unit, each) in options.items() if unit and not each and flag not in files})
    lines = [*words, *([f"        {'|'.join(files)}) compopt -o default ;;"] if files else [])]
    return "\n".join([*lines, *([f"        {'|'.join(others)}) ;;"] if others else [])])


HEAD = """\
# Completion of {name} for bash.

_nodepass_words() {{ mapfile -t COMPREPLY < <(compgen -W "$*" -- "${{COMP_WORDS[COMP_CWORD]}}"); }}

"""


def bash_program(options: Options, top_options: Options) -> str:
    """The completion of nodepass."""
    return (
        HEAD.format(name="nodepass")
        + f"""\
_nodepass() {{
    COMPREPLY=()
    if [[ ${{COMP_WORDS[1]}} == top && $COMP_CWORD -gt 1 ]]; then
        case ${{COMP_WORDS[COMP_CWORD]}} in
            -*) _nodepass_words {" ".join(top_options)} ;;
            *) compopt -o default ;;
        esac
        return
    fi
    case ${{COMP_WORDS[COMP_CWORD - 1]}} in
{bash_cases(options)}
        *)
            case ${{COMP_WORDS[COMP_CWORD]}} in
                -*) _nodepass_words {" ".join(options)} ;;
                *) compopt -o nospace; _nodepass_words {" ".join(FIRST_WORDS)} ;;
            esac
            ;;
    esac
}}
complete -F _nodepass nodepass
"""
    )


def bash_manager(commands: dict[str, tuple[str, Options, bool]]) -> str:
    """The completion of nodepass-manager."""
    flags = "\n".join(
        f"        {name}) flags='{' '.join(options)}' instances={'yes' if takes_name else 'no'} ;;"
        for name, (_, options, takes_name) in commands.items()
    )
    merged = {flag: each for _, options, _ in commands.values() for flag, each in options.items()}
    return (
        HEAD.format(name="nodepass-manager")
        + f"""\
_nodepass_manager() {{
    local flags='' instances=no
    COMPREPLY=()
    if [[ $COMP_CWORD -eq 1 ]]; then
        _nodepass_words {" ".join(commands)} --help
        return
    fi
    case ${{COMP_WORDS[1]}} in
{flags}
    esac
    case ${{COMP_WORDS[COMP_CWORD - 1]}} in
{bash_cases(merged)}
        *)
            if [[ ${{COMP_WORDS[COMP_CWORD]}} == -* || $instances == no ]]; then
                _nodepass_words $flags
            else
                _nodepass_words $(compgen -G '{INSTANCES}' | sed 's|.*/||; s|[.]env$||')
            fi
            ;;
    esac
}}
complete -F _nodepass_manager nodepass-manager
"""
    )


# zsh


def zsh_specifications(options: Options, more: Sequence[str] = ()) -> str:
    """The arguments of `_arguments`, one per line."""
    lines = []
    for flag, (text, unit, words) in options.items():
        shown = re.sub(r"([\[\]:\\'])", lambda match: "'\\''" if match[1] == "'" else "\\" + match[1], text)
        action = f"({' '.join(words)})" if words else "_files" if unit in ("file", "dir", "wheel") else " "
        lines.append(f"'{flag}[{shown}]" + (f":{unit.replace(':', ' ')}:{action}'" if unit else "'"))
    return " \\\n        ".join([*lines, *more])


def zsh_program(options: Options, top_options: Options) -> str:
    """The completion of nodepass."""
    return f"""\
#compdef nodepass

_nodepass() {{
    if [[ $words[2] == top && $CURRENT -gt 2 ]]; then
        shift words
        ((CURRENT--))
        _arguments {zsh_specifications(top_options, ["'1:endpoint:_files'"])}
        return
    fi
    _arguments {zsh_specifications(options, [f"'*:tunnel:({' '.join(FIRST_WORDS)})'"])}
}}

_nodepass "$@"
"""


def zsh_manager(commands: dict[str, tuple[str, Options, bool]]) -> str:
    """The completion of nodepass-manager."""
    listed = " \\\n        ".join(f"'{name}:{text.replace(chr(39), '')}'" for name, (text, _, _) in commands.items())
    cases = "\n".join(
        f"    {name}) _arguments "
        + zsh_specifications(options, ["'1:instance:($instances)'".replace("'", '"')] if takes_name else [])
        + " ;;"
        for name, (_, options, takes_name) in commands.items()
    )
    return f"""\
#compdef nodepass-manager

_nodepass_manager() {{
    local -a commands instances
    instances=({INSTANCES}(N:t:r))
    commands=({listed})
    if ((CURRENT == 2)); then
        _describe command commands
        return
    fi
    shift words
    ((CURRENT--))
    case $words[1] in
{cases}
    esac
}}

_nodepass_manager "$@"
"""

"""A machine of its own, booted by a real systemd, with nodepass and its units installed as docs/operations.md says.

It is a throw-away overlay of this machine with a loopback network of its own, see `boot`. Commands are run in it with
`run`, files are written below `root`, and what is done `inside` has its network: visitors, a service, further programs.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tests.support.log import Entry, check_wanted, parse
from tests.support.process import REPOSITORY
from tests.support.scope import Closes
from tests.support.sockets import PATIENCE, until
from tests.support.v2_network import inside

UNITS = REPOSITORY / "contrib" / "systemd"
PROGRAMS = ("systemctl", "nsenter", "setpriv")
PYTHON = "/opt/python"
LONGEST = 300.0
"""Seconds that a command in the box may take: an installation by pip, on a busy machine."""

DROP_IN = """\
[Service]
Environment=PYTHONPATH=/opt/nodepass
"""
"""The one thing in which a unit in the box differs from the one that is shipped."""

T = TypeVar("T")
Made = TypeVar("Made", bound="Machine")


def why_not() -> str:
    """Why there can be no box here; empty where there can."""
    if os.geteuid() != 0:
        return "a machine booted by systemd needs root"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


class BootError(Exception):
    """No systemd can be booted here; the text is what was said."""


class Machine(Closes):
    """A machine in which nothing of ours is installed; a context manager that boots it and throws it away."""

    def __enter__(self: Made) -> Made:
        self._directory = tempfile.TemporaryDirectory(prefix="nodepass-box-", dir="/var/tmp")
        command = [sys.executable, "-m", "tests.support.boot", self._directory.name]
        if not self._python.startswith("/usr/"):
            command += [self._python, PYTHON]
        with tempfile.TemporaryFile() as said:
            self._booter = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, cwd=REPOSITORY
            )
            try:
                assert self._booter.stdout
                self._init = int(self._booter.stdout.readline() or 0)
                until(self._is_up, what="systemd is still starting")
            except BaseException as error:
                self.close()
                said.seek(0)
                raise BootError(said.read().decode(errors="replace").strip() or str(error)) from error
        self.root = Path(f"/proc/{self._init}/root")
        self.network = Path(f"/proc/{self._init}/ns/net")
        self._install()
        return self

    def _install(self) -> None:
        """Nothing."""

    def _is_up(self) -> bool:
        if self._booter.poll() is not None or not Path(f"/proc/{self._init}/comm").exists():
            raise BootError("it ended")
        if Path(f"/proc/{self._init}/comm").read_text().strip() != "systemd":
            return False
        return self.systemctl("is-system-running", check=False).strip() in ("running", "degraded")

    def close(self) -> None:
        self._booter.communicate(timeout=PATIENCE)  # the end of its input is what it waits for
        self._directory.cleanup()

    @property
    def _python(self) -> str:
        """Where the interpreter of the tests is installed."""
        return os.path.realpath(sys.base_prefix)

    @property
    def python(self) -> str:
        """That interpreter as a unit finds it, which has no home directories."""
        prefix = self._python if self._python.startswith("/usr") else PYTHON
        return f"{prefix}/bin/python{sys.version_info[0]}.{sys.version_info[1]}"

    @property
    def enter(self) -> tuple[str, ...]:
        """The beginning of a command that runs in the box."""
        return ("nsenter", "-t", str(self._init), "-m", "-p", "-n", "-u", "-i", "-C")

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command in the box; what it printed. AssertionError where it fails, unless that is not checked."""
        done = subprocess.run([*self.enter, *command], capture_output=True, text=True, check=False, timeout=LONGEST)
        assert not check or done.returncode == 0, f"{command}: {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def systemctl(self, *arguments: str, check: bool = True) -> str:
        """Run systemctl in the box."""
        return self.run("systemctl", *arguments, check=check)

    def inside(self, work: Callable[[], T]) -> T:
        """Do something with the network of the box; sockets and programs that it makes keep it."""
        return inside(self.network, work)

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file in the box."""
        file = self.root / path.removeprefix("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)


class Box(Machine):
    """Such a machine, with nodepass installed."""

    def _install(self) -> None:
        library = self.root / "opt/nodepass"
        for name, source in _installed_files():
            target = library / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
        shutil.copytree(REPOSITORY / "nodepass", library / "nodepass")
        self.write("/usr/local/bin/nodepass", f'#!/bin/sh\nexec {self.python} -m nodepass "$@"\n', 0o755)
        self.write("/etc/systemd/system/nodepass@.service.d/box.conf", DROP_IN)
        for unit in ("nodepass@.service", "nodepass@.socket"):
            shutil.copy(UNITS / unit, self.root / "etc/systemd/system")
        (self.root / "etc/credstore").mkdir(mode=0o700, exist_ok=True)
        self.systemctl("daemon-reload")


class Unit(Closes):
    """One instance of nodepass in a box: nodepass@<name>.service, and its socket unit where it is used."""

    def __init__(self, box: Box, name: str, urls: str, settings: Mapping[str, str] | None = None) -> None:
        self.box = box
        self.instance = name
        self.name = f"nodepass@{name}.service"
        self.socket = f"nodepass@{name}.socket"
        self.configure(urls, settings)

    def close(self) -> None:
        print(*self.journal(), sep="\n")  # which a failed test shows
        self.box.systemctl("stop", self.socket, self.name, check=False)
        self.box.systemctl("reset-failed", check=False)

    def configure(self, urls: str, settings: Mapping[str, str] | None = None) -> None:
        """Write its environment file."""
        environment = {"LOG_FORMAT": "json", **(settings or {})}
        lines = [f'NODEPASS_URL="{urls}"', *(f"{name}={value}" for name, value in environment.items())]
        self.box.write(f"/etc/nodepass/{self.instance}.env", "\n".join(lines) + "\n")

    def drop_in(self, text: str) -> None:
        """Add to the service."""
        self.box.write(f"/etc/systemd/system/{self.name}.d/test.conf", text)
        self.box.systemctl("daemon-reload")

    def start(self) -> None:
        """Start it and wait until it is ready."""
        self.box.systemctl("start", self.name)

    def show(self, name: str) -> str:
        """A property of the service."""
        return self.box.systemctl("show", self.name, "--property", name, "--value").strip()

    def kill(self, number: signal.Signals) -> None:
        """Send a POSIX signal to its main process."""
        self.box.systemctl("kill", "--signal", number.name, "--kill-who", "main", self.name)

    @property
    def pid(self) -> int:
        """Its main process, as the box counts them; 0 while there is none."""
        return int(self.show("MainPID"))

    def wait_for_status(self, pattern: str) -> None:
        """Return once the status text matches."""
        until(lambda: re.search(pattern, self.show("StatusText")), what=pattern)

    def journal(self) -> list[Entry]:
        """What it and systemd have said about it."""
        return [parse(line["MESSAGE"]) for line in self._lines()]

    def wait_for(self, event: str, **fields: Any) -> Entry:
        """The first such event in the journal."""
        check_wanted(event, fields)

        def found() -> list[Entry]:
            return [entry for entry in self.journal() if entry.matches(event, fields)]

        return until(found, what=f"{event} {fields}")[0]

    def wait_for_text(self, pattern: str) -> None:
        """Return once systemd has said that about it."""
        until(lambda: any(re.search(pattern, entry.line) for entry in self.journal() if not entry.data), what=pattern)

    def errors(self) -> list[str]:
        """What was said as an error or worse."""
        return [line["MESSAGE"] for line in self._lines() if int(line["PRIORITY"]) <= 3]

    def _lines(self) -> Iterator[dict[str, str]]:
        for line in self.box.run("journalctl", "-o", "json", "-u", self.name).splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)


def _installed_files() -> Iterator[tuple[str, Path]]:
    """The files of everything that nodepass needs, by their place below the library's directory."""
    wanted, seen = ["nodepass"], set()
    while wanted:
        distribution = importlib.metadata.distribution(wanted.pop())
        for line in distribution.requires or []:
            name = re.split(r"[^\w.-]", line, maxsplit=1)[0].lower()
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                importlib.metadata.distribution(name)
                if name not in seen and "extra ==" not in line:
                    seen.add(name)
                    wanted.append(name)
        if distribution.metadata["Name"] != "nodepass":
            for file in distribution.files or []:
                if ".." not in file.parts and (source := Path(str(file.locate()))).is_file():
                    yield str(file), source

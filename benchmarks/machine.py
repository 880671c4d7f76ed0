"""What a run was made on: the machine and the versions of all programs, without its name or addresses."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from benchmarks.targets import ROOT, find_program

VERSION_TIMEOUT = 10.0  # seconds for a program to say its version
VERSION_COMMANDS: Mapping[str, tuple[str, ...]] = {
    "haproxy": ("haproxy", "-v"),
    "iperf3": ("iperf3", "--version"),
    "nginx": ("nginx", "-v"),
    "nodepass": (str(ROOT / "bin" / "nodepass"), "--version"),
    "rathole": ("rathole", "--version"),
    "ssh": ("ssh", "-V"),
    "wrk": ("wrk", "-v"),
}
LIBRARIES = ("gevent", "pyOpenSSL", "cryptography")


def _read_field(path: str, name: str) -> str | None:
    """Return the first value of a `name : value` line, None if there is none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in pairs if key.strip() == name), None)


def describe_machine() -> dict[str, str]:
    """Return processor, cores, memory and system as text."""
    kilobytes = (_read_field("/proc/meminfo", "MemTotal") or "0").split()[0]
    return {
        "processor": _read_field("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{int(kilobytes) / 1024**2:.0f} GiB",
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
    }


def _ask_version(command: tuple[str, ...]) -> str | None:
    """Return the first version number that a program prints, None if it is not there or says none."""
    program = find_program(command[0])
    if program is None:
        return None
    try:
        told = subprocess.run(
            [program, *command[1:]], capture_output=True, text=True, timeout=VERSION_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"(?<![\d.:])\d+\.\d+[\w.]*", told.stdout + told.stderr)  # no time of day
    return found.group() if found else None


def describe_versions() -> dict[str, str]:
    """Return the versions of what takes part, by name, as far as they are there."""
    versions = {"Python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    asked = {name: _ask_version(command) for name, command in VERSION_COMMANDS.items()}
    return versions | {name: version for name, version in asked.items() if version}

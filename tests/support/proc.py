"""What the kernel says of a process: its descriptors and its connections, read from /proc."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

ESTABLISHED = "01"
REMOTE, STATE, INODE = 2, 3, 9
"""Columns of /proc/net/tcp."""


def count_descriptors(pid: int) -> int:
    """Open file descriptors of the process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def count_connections(pid: int, port: int) -> int:
    """Established IPv4 connections of the process to that port."""
    rows = Path("/proc/net/tcp").read_text().splitlines()[1:]
    columns = [row.split() for row in rows]
    wanted = {
        f"socket:[{column[INODE]}]"
        for column in columns
        if column[REMOTE].endswith(f":{port:04X}") and column[STATE] == ESTABLISHED
    }
    return sum(link in wanted for link in _links(pid))


def cpu_seconds(pid: int) -> float:
    """CPU time that the process has used so far, in user and system mode."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, after_name[11:13])) / os.sysconf("SC_CLK_TCK")


def _links(pid: int) -> list[str]:
    directory = Path(f"/proc/{pid}/fd")
    links = []
    for name in os.listdir(directory):
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            links.append(os.readlink(directory / name))
    return links


def resident_bytes(pid: int) -> int:
    """Memory that the process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

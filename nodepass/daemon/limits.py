"""What the process's limits allow: open files, raised as far as they go, and memory.

`survey` is asked once at start, by the daemon and by `nodepass --check`. Where the settings can need more open files
than there are, it lowers them; of memory it only warns, since what a session needs depends on what it carries.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from nodepass.config import Settings
from nodepass.server.pending import PER_PORT, pending_limit

PER_SESSION = 2  # descriptors: the visitor's or the target's, and the data connection
OWN = 32  # descriptors: listeners, control connections, gevent's own

# Measured with 500 and 1,000 sessions held, on either end, bytes moved both ways, the kernel's part included
# (docs/performance.md): 16 KiB a session in the clear; 45 to 65 under TLS, most of it OpenSSL's.
_MIB = 1 << 20
MEMORY_OWN = {False: 20 * _MIB, True: 32 * _MIB}  # bytes of a process with an idle tunnel, by whether it uses TLS
MEMORY_PER_SESSION = {False: 16 << 10, True: 64 << 10}  # bytes
_NO_LIMIT = 1 << 60  # bytes; cgroup v1 writes about 2^63 where there is none

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Memory:
    """A limit on memory: whose it is (cgroup, address space, machine), and how many bytes."""

    what: str
    size: int

    def __str__(self) -> str:
        whose = "the machine's" if self.what == "machine" else self.what
        return f"{self.size / _MIB:,.0f} MiB of memory ({whose})"


@dataclass(frozen=True)
class Shortage:
    """What does not fit: of open files or memory, what the settings can need, what there is, and what would fit."""

    reason: str  # open_files or memory
    needed: int  # files or bytes
    available: int
    semaphore_limit: int  # lowered to this, or to be lowered
    words: str


@dataclass(frozen=True)
class Survey:
    """What the limits allow: the settings that fit, one line for the log, and what is to be warned of."""

    settings: Settings
    line: str
    warnings: list[Shortage]
    files: int  # that may be open
    sessions: int  # that these files allow
    memory: Memory | None
    memory_sessions: int | None  # that this memory allows


def survey(settings: Settings, tunnels: int, tls: bool) -> Survey:
    """Raise the limit on open files; see what so many tunnels can have. `tls`: whether one of them may need it."""
    warnings = []
    files = raise_descriptor_limit()
    kept = min(pending_limit(), 2 * PER_PORT * tunnels)
    fitting = fit_descriptors(settings, tunnels, files - kept)
    if fitting != settings:
        needed = _descriptors(settings, tunnels) + kept
        words = (
            f"open files: SEMAPHORE_LIMIT {settings.semaphore_limit} and MAX_POOL_CAPACITY {settings.max_pool_capacity}"
            f" can need {needed:,}, {needed - files:,} more than the limit of {files:,} allows: lowered to"
            f" {fitting.semaphore_limit} and {fitting.max_pool_capacity}; raise it (ulimit -Hn, LimitNOFILE=)"
        )
        warnings.append(Shortage("open_files", needed, files, fitting.semaphore_limit, words))
    by_files = max(0, (files - kept - OWN - tunnels * fitting.max_pool_capacity) // PER_SESSION)
    line = f"limits: {files:,} open files allow {by_files:,} sessions"
    by_memory = None
    if memory := min(memory_limits(), key=lambda each: each.size, default=None):
        by_memory = max(0, (memory.size - MEMORY_OWN[tls]) // MEMORY_PER_SESSION[tls])
        line += f"; {memory} allow about {by_memory:,}"
        wanted = tunnels * fitting.semaphore_limit
        if wanted > by_memory:
            needed, least = MEMORY_OWN[tls] + wanted * MEMORY_PER_SESSION[tls], max(1, by_memory // tunnels)
            lacking = (needed - memory.size) / _MIB
            words = (
                f"memory: SEMAPHORE_LIMIT {fitting.semaphore_limit} can need about {lacking:,.0f} MiB more than"
                f" {memory}: lower it to {least}, or allow more (MemoryMax=)"
            )
            warnings.append(Shortage("memory", needed, memory.size, least, words))
    return Survey(fitting, line, warnings, files, by_files, memory, by_memory)


def raise_descriptor_limit() -> int:
    """Raise the soft limit on open files to the hard one, if we may; what it is now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # a filter of system calls may forbid it
            return soft
    return hard


def fit_descriptors(settings: Settings, tunnels: int, files: int) -> Settings:
    """The settings, lowered in proportion where so many tunnels could need more open files than there are."""
    needed = _descriptors(settings, tunnels)
    if needed <= files:
        return settings
    budget = max(0, files - OWN) // tunnels
    share = budget / (PER_SESSION * settings.semaphore_limit + settings.max_pool_capacity)
    pool = max(1, int(settings.max_pool_capacity * share), min(settings.min_pool_capacity, budget // 4))
    return replace(
        settings,
        semaphore_limit=max(1, min(settings.semaphore_limit, (budget - pool) // PER_SESSION)),
        min_pool_capacity=min(settings.min_pool_capacity, pool),
        max_pool_capacity=pool,
    )


def _descriptors(settings: Settings, tunnels: int) -> int:
    """How many so many tunnels can need."""
    return tunnels * (PER_SESSION * settings.semaphore_limit + settings.max_pool_capacity) + OWN


def memory_limits() -> list[Memory]:
    """The limits on the memory of this process: its cgroups', its address space's, the machine's."""
    found = [Memory("cgroup", size) for size in _cgroup_limits()]
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        # Libraries take up address space and hardly any memory: what is free counts, beside what we have.
        pages, resident = map(int, Path("/proc/self/statm").read_text().split()[:2])
        unused = (pages - resident) * resource.getpagesize()
        found.append(Memory("address space", max(0, space - unused)))
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return [*found, Memory("machine", machine)] if machine > 0 else found


def _cgroup_limits(root: Path = _CGROUP, membership: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """The limits of our cgroup and of those above it, in bytes, cgroup v2 and v1."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            places, name = (root, root / "unified"), "memory.max"
        elif "memory" in controllers.split(","):
            places, name = (root / "memory", root), "memory.limit_in_bytes"
        else:
            continue
        # In a container the path may be the host's, and the cgroup is mounted as the root: look there, too.
        for place in places:
            group = place / path.lstrip("/")
            for each in (group, *group.parents):
                if each.is_relative_to(place):
                    yield from _read_limit(each / name)


def _read_limit(file: Path) -> Iterator[int]:
    try:
        text = file.read_text().strip()
    except OSError:
        return
    if text.isdigit() and int(text) < _NO_LIMIT:
        yield int(text)

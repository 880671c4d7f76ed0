"""The limits on open files and memory, and what the settings of all tunnels together can need of both.

`survey` is called once at start, by the daemon and by `nodepass --check`. It raises the limit on open files as far as
allowed. If the settings can need more open files than that, it lowers those of each tunnel in proportion; if they can
need more memory it only warns, because a session's memory depends on its traffic.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nodepass.config.settings import Settings
from nodepass.server.pending import PER_PORT, pending_limit
from nodepass.tunnel.buffers import LEAST as LEAST_BUFFERS

PER_SESSION = 2  # descriptors: the visitor's or the target's, and the data connection
OWN = 32  # descriptors: listeners, control connections, gevent's own
LEAST = PER_SESSION + 1  # descriptors of a tunnel: one session, and one connection in its pool

# The worst case, by whether the process uses TLS: its visitors or its target read nothing. Measured in cgroups,
# with 300 and 500 such sessions, and with 1,000 that were quiet. An idle tunnel takes 20 and 32 MiB; what all stopped
# directions keep adds 4 MiB (`net.pump`), and so do large batches of TLS (`tls.bio`).
_MIB = 1 << 20
MEMORY_OWN = {False: 24 * _MIB, True: 40 * _MIB}  # bytes of a process
MEMORY_PER_SESSION = {False: 16 << 10, True: 80 << 10}  # bytes; most of it is OpenSSL's
_NO_LIMIT = 1 << 60  # bytes; cgroup v1 has about 2^63 where there is no limit

_CGROUP = Path("/sys/fs/cgroup")


def forbid_core_dumps() -> None:
    """From now on this process leaves no copy of its memory, which has keys and payload, when it is killed by a fault.

    Not by PR_SET_DUMPABLE: /proc/PID would belong to root, so that its own user could not look at the process.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@dataclass(frozen=True)
class Memory:
    """A limit on memory: which one (cgroup, address space, machine), and its bytes."""

    what: str
    size: int

    def __str__(self) -> str:
        whose = "the machine's" if self.what == "machine" else self.what
        return f"{self.size / _MIB:,.0f} MiB of memory ({whose})"


@dataclass(frozen=True)
class Shortage:
    """The settings can need more open files or memory than available."""

    reason: str  # open_files or memory
    needed: int  # files or bytes
    available: int
    semaphore_limit: int  # the sum, over all tunnels, that fits
    words: str


@dataclass(frozen=True)
class Survey:
    """What the limits allow: the settings that fit, a tunnel each, one line for the log, and the warnings."""

    settings: list[Settings]
    line: str
    warnings: list[Shortage]
    files: int  # that may be open
    sessions: int  # that these files allow
    memory: Memory | None
    memory_sessions: int | None  # that this memory allows
    buffers: int | None = None  # bytes for `kernel_buffers`; None where nothing limits them


def survey(settings: Sequence[Settings], tls: bool) -> Survey:
    """Raise the limit on open files, and fit the settings of each tunnel. `tls`: whether one may need TLS."""
    files = raise_descriptor_limit()
    reserved = min(pending_limit(), 2 * PER_PORT * len(settings))  # for pending connections
    fitting = fit_descriptors(settings, files - reserved)
    warnings = []
    if fitting != list(settings):
        warnings.append(_too_few_files(settings, fitting, _descriptors(settings) + reserved, files))
    sessions = max(0, (files - reserved - OWN - _pools(fitting)) // PER_SESSION)
    line = f"limits: {files:,} open files allow {sessions:,} sessions"
    memory_sessions = buffers = None
    if memory := min(memory_limits(), key=lambda each: each.size, default=None):
        per_session = memory_per_session(memory, tls)
        memory_sessions = max(0, (memory.size - MEMORY_OWN[tls]) // per_session)
        line += f"; {memory} allow about {memory_sessions:,}"
        needed = MEMORY_OWN[tls] + _sessions(fitting) * per_session
        if needed > memory.size:
            warnings.append(_too_little_memory(fitting, needed, memory, max(len(fitting), memory_sessions)))
        if memory.what == "cgroup":
            buffers = max(0, memory.size - needed)
    return Survey(fitting, line, warnings, files, sessions, memory, memory_sessions, buffers)


def memory_per_session(memory: Memory, tls: bool) -> int:
    """The bytes that a session can take of this memory. Only a cgroup is charged with the kernel's buffers."""
    return MEMORY_PER_SESSION[tls] + (LEAST_BUFFERS if memory.what == "cgroup" else 0)


def _too_few_files(settings: Sequence[Settings], fitting: Sequence[Settings], needed: int, files: int) -> Shortage:
    words = (
        f"open files: SEMAPHORE_LIMIT {_sessions(settings)} and MAX_POOL_CAPACITY {_pools(settings)}{_sums(settings)}"
        f" can need {needed:,}, {needed - files:,} more than the limit of {files:,} allows: lowered to"
        f" {_sessions(fitting)} and {_pools(fitting)}; raise it (ulimit -Hn, LimitNOFILE=)"
    )
    return Shortage("open_files", needed, files, _sessions(fitting), words)


def _too_little_memory(settings: Sequence[Settings], needed: int, memory: Memory, semaphore_limit: int) -> Shortage:
    words = (
        f"memory: SEMAPHORE_LIMIT {_sessions(settings)}{_sums(settings)} can need about"
        f" {(needed - memory.size) / _MIB:,.0f} MiB more than {memory}: lower it to {semaphore_limit}, or allow more"
        " (MemoryMax=)"
    )
    return Shortage("memory", needed, memory.size, semaphore_limit, words)


def _sums(settings: Sequence[Settings]) -> str:
    return f" (sums of {len(settings)} tunnels)" if len(settings) > 1 else ""


def _sessions(settings: Sequence[Settings]) -> int:
    return sum(each.semaphore_limit for each in settings)


def _pools(settings: Sequence[Settings]) -> int:
    return sum(each.max_pool_capacity for each in settings)


def raise_descriptor_limit() -> int:
    """Raise the soft limit on open files to the hard one, if that is allowed; what it is now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # a filter of system calls may forbid it
            return soft
    return hard


def fit_descriptors(settings: Sequence[Settings], files: int) -> list[Settings]:
    """The settings of all tunnels, lowered in proportion if together they can need more open files than these."""
    needed = _descriptors(settings)
    if needed <= files:
        return list(settings)
    least = LEAST * len(settings)
    more, wanted = max(0, files - OWN - least), needed - OWN - least
    budgets = [LEAST + more * (_descriptors([each]) - OWN - LEAST) // max(1, wanted) for each in settings]
    return [_fit_one(each, budget) for each, budget in zip(settings, budgets, strict=True)]


def _fit_one(settings: Settings, budget: int) -> Settings:
    """The settings of one tunnel that may have so many descriptors, at least LEAST."""
    share = budget / (PER_SESSION * settings.semaphore_limit + settings.max_pool_capacity)
    pool = max(int(settings.max_pool_capacity * share), min(settings.min_pool_capacity, budget // 4))
    pool = max(1, min(pool, budget - PER_SESSION))  # there must be room for one session
    return replace(
        settings,
        semaphore_limit=max(1, min(settings.semaphore_limit, (budget - pool) // PER_SESSION)),
        min_pool_capacity=min(settings.min_pool_capacity, pool),
        max_pool_capacity=pool,
    )


def _descriptors(settings: Sequence[Settings]) -> int:
    """How many descriptors these tunnels can need together."""
    return PER_SESSION * _sessions(settings) + _pools(settings) + OWN


def memory_limits() -> list[Memory]:
    """The limits on the memory of this process: its cgroups', its address space's, the machine's."""
    found = [Memory("cgroup", size) for size in _cgroup_limits()]
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        # Libraries take up address space but hardly any memory: what is unused, and what is resident, counts.
        pages, resident = map(int, Path("/proc/self/statm").read_text().split()[:2])
        unused = (pages - resident) * resource.getpagesize()
        found.append(Memory("address space", max(0, space - unused)))
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return [*found, Memory("machine", machine)] if machine > 0 else found


def _cgroup_limits(root: Path = _CGROUP, membership: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """The limits of this process's cgroup and its parents, in bytes, cgroup v2 and v1."""
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
        # In a container the path may be the host's while the cgroup is mounted as the root: the parents include it.
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

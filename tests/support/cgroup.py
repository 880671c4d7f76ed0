"""A cgroup with a limit on memory, version 1 or 2, for a program that is started in it. Needs root."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tests.support.sockets import until

ROOT = Path("/sys/fs/cgroup")


class MemoryCgroup:
    """One cgroup; `prefix` is what a command line must begin with to run in it."""

    def __init__(self, path: Path, is_v1: bool) -> None:
        self.path = path
        self._is_v1 = is_v1

    @property
    def prefix(self) -> tuple[str, ...]:
        """A shell that joins and becomes the program, so that not a page is charged to anybody else."""
        return ("/bin/sh", "-c", f'echo $$ >{self.path}/cgroup.procs && exec "$0" "$@"')

    def limit(self, size: int) -> None:
        """Allow so many bytes, and no swap."""
        if self._is_v1:
            (self.path / "memory.limit_in_bytes").write_text(str(size))
            with contextlib.suppress(OSError):  # version 1 counts the buffers of sockets only where they have a limit
                (self.path / "memory.kmem.tcp.limit_in_bytes").write_text(str(size))
            with contextlib.suppress(OSError):  # there is no accounting of swap
                (self.path / "memory.memsw.limit_in_bytes").write_text(str(size))
        else:
            (self.path / "memory.max").write_text(str(size))
            with contextlib.suppress(OSError):
                (self.path / "memory.swap.max").write_text("0")

    @property
    def peak(self) -> int:
        """The most that was in use at any time, page cache included, in bytes."""
        return int((self.path / ("memory.max_usage_in_bytes" if self._is_v1 else "memory.peak")).read_text())

    @property
    def needed(self) -> int:
        """What is in use now and cannot be reclaimed, the buffers of sockets included, in bytes."""
        stat = dict(map(str.split, (self.path / "memory.stat").read_text().splitlines()))
        if not self._is_v1:
            return int((self.path / "memory.current").read_text()) - int(stat["file"])
        names = ("memory.usage_in_bytes", "memory.kmem.tcp.usage_in_bytes")
        return sum(int((self.path / name).read_text()) for name in names) - int(stat["cache"])

    @property
    def kills(self) -> int:
        """How often the kernel has killed for want of memory."""
        text = (self.path / ("memory.oom_control" if self._is_v1 else "memory.events")).read_text()
        return {name: int(count) for name, count in map(str.split, text.splitlines())}["oom_kill"]


def _candidates(name: str) -> Iterator[MemoryCgroup]:
    yield MemoryCgroup(ROOT / "memory" / name, is_v1=True)
    yield MemoryCgroup(ROOT / name, is_v1=False)


def why_not() -> str:
    """Why there can be no such cgroup here; empty where there can."""
    try:
        with memory_cgroup(1 << 30):
            return ""
    except OSError as error:
        return f"no cgroup with a limit on memory can be made here: {error}"


@contextlib.contextmanager
def memory_cgroup(size: int) -> Iterator[MemoryCgroup]:
    """A cgroup that allows so many bytes; it is removed when its processes have ended. Raises OSError."""
    failure: OSError | None = None
    for group in _candidates(f"nodepass-test-{os.getpid()}"):
        if not group.path.parent.is_dir():
            continue
        try:
            group.path.mkdir()
        except OSError as error:
            failure = error
            continue
        try:
            group.limit(size)
        except OSError as error:
            group.path.rmdir()
            failure = error
            continue
        try:
            yield group
        finally:
            until(lambda where=group.path: _removed(where), what="processes are left in the cgroup")  # type: ignore[misc]
        return
    raise failure or FileNotFoundError(f"no memory controller under {ROOT}")


def _removed(path: Path) -> bool:
    try:
        path.rmdir()
    except OSError:
        return False
    return True

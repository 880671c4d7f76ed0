"""Boots a real systemd on a throw-away overlay of this machine.

`python -m tests.support.boot DIRECTORY [SOURCE TARGET]` mounts the overlay below DIRECTORY, on a tmpfs, in PID, mount,
network, UTS, IPC and cgroup namespaces of its own, so that nothing its units do reaches this machine. The network is
the loopback interface, /dev has a few devices, and of this machine's units only those start that every systemd needs.
SOURCE is bound to TARGET.

The process prints the process id of that systemd, and ends it at the end of its standard input; if it is killed, the
systemd dies with it. Needs root. `box` starts it and waits until systemd is up.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x40000000  # mount, cgroup, UTS, IPC, network
NEW_PID_NAMESPACE = 0x20000000
PR_SET_PDEATHSIG = 1
READ_ONLY, NO_SUID, BIND, RECURSIVE, PRIVATE, SHARED = 1, 2, 1 << 12, 1 << 14, 1 << 18, 1 << 20  # flags of mount
DETACH = 2  # flag of umount2
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}  # numbers of the system call, which the C library does not have
GET_FLAGS, SET_FLAGS, UP = 0x8913, 0x8914, 1  # of a network interface

SIZE = "2g"  # of the tmpfs, at most
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
SYSTEMD = ("/usr/lib/systemd/systemd", "/lib/systemd/systemd")
NEEDED = {"systemd-journald.service", "systemd-tmpfiles-setup.service", "dbus.socket", "systemd-journald.socket"}
"""The units that may stay wanted by a target: the others set up a machine, and this one is set up already."""

libc = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    """Boot, and wait for the end of standard input."""
    directory = Path(sys.argv[1])
    cgroup = make_cgroup()
    check(libc.unshare(NEW_PID_NAMESPACE), "unshare")
    init = os.fork()
    if not init:
        become_systemd(directory, cgroup)
    try:
        sys.stdout.write(f"{init}\n")
        sys.stdout.flush()
        sys.stdin.read()
    finally:
        os.kill(init, signal.SIGKILL)
        os.waitpid(init, 0)
        if cgroup:
            remove_cgroup(cgroup)
    return 0


def become_systemd(directory: Path, cgroup: Path | None) -> None:
    """Build the machine around this process, its process 1."""
    try:
        check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL), "prctl")
        if cgroup:
            (cgroup / "cgroup.procs").write_text("0")
        check(libc.unshare(NAMESPACES), "unshare")
        mount("", "/", flags=PRIVATE | RECURSIVE)
        root = make_overlay(directory)
        furnish(root)
        if len(sys.argv) > 2:
            source, target = sys.argv[2:]
            (root / target.lstrip("/")).mkdir(parents=True, exist_ok=True)
            mount(source, root / target.lstrip("/"), flags=BIND)
        change_root(root)
        set_up_loopback()
        program = next(path for path in SYSTEMD if os.access(path, os.X_OK))
        environment = {"container": "nodepass-tests", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        options = ("--system", "--unit=basic.target", "--log-target=journal", "--show-status=false")
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(2, 1)
        os.execve(program, [program, *options], environment)
    except BaseException:  # noqa: BLE001  # not to return into the code of the parent
        traceback.print_exc()
        os._exit(1)


def make_overlay(directory: Path) -> Path:
    """A file system that shows this machine's, and keeps what is written to it."""
    mount("tmpfs", directory, "tmpfs", data=f"size={SIZE}")
    upper, work, root = (directory / name for name in ("upper", "work", "root"))
    for path in (upper, work, root):
        path.mkdir()
    mount("overlay", root, "overlay", data=f"lowerdir=/,upperdir={upper},workdir={work}")
    return root


def furnish(root: Path) -> None:
    """Mount what is not on a disk, and take away what belongs to this machine only."""
    mount("proc", root / "proc", "proc")
    mount("sysfs", root / "sys", "sysfs", READ_ONLY)
    mount("cgroup2", root / "sys/fs/cgroup", "cgroup2")
    for name in ("run", "tmp", "dev"):
        mount("tmpfs", root / name, "tmpfs", data="mode=1777" if name == "tmp" else "mode=755")
    furnish_dev(root / "dev")
    (root / "etc/machine-id").write_text("")
    (root / "etc/fstab").write_text("")
    for folder in ("etc/systemd/system", "usr/lib/systemd/system", "lib/systemd/system"):
        for link in (root / folder).glob("*.target.wants/*"):
            if link.name not in NEEDED:
                link.unlink()


def furnish_dev(dev: Path) -> None:
    """The devices that every program expects."""
    for name in DEVICES:
        (dev / name).touch()
        mount(f"/dev/{name}", dev / name, flags=BIND)
    for name in ("pts", "shm"):
        (dev / name).mkdir()
    mount("devpts", dev / "pts", "devpts", data="newinstance,ptmxmode=0666,mode=620")
    mount("tmpfs", dev / "shm", "tmpfs", NO_SUID, "mode=1777")
    links = {"ptmx": "pts/ptmx", "fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}
    for name, target in links.items():
        (dev / name).symlink_to(target)


def change_root(root: Path) -> None:
    """Make it the root of the mount namespace; not by chroot, below which there are no user namespaces."""
    os.chdir(root)
    check(libc.syscall(PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    check(libc.umount2(b".", DETACH), "umount")
    os.chdir("/")
    # Credentials reach a unit through shared mounts, as a machine with disks has them.
    mount("", "/", flags=SHARED | RECURSIVE)


def set_up_loopback() -> None:
    """Bring the one network interface up."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh22x", b"lo", 0)
        (flags,) = struct.unpack("16xh22x", fcntl.ioctl(any_socket, GET_FLAGS, request))
        fcntl.ioctl(any_socket, SET_FLAGS, struct.pack("16sh22x", b"lo", flags | UP))


def make_cgroup() -> Path | None:
    """A cgroup for the machine below our own, so that several machines do not share theirs; None without cgroup 2."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    mounted = (line.split()[4] for line in lines if line.partition(" - ")[2].startswith("cgroup2 "))
    ours = (line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    for place, own in zip(mounted, ours, strict=False):
        made = Path(place + own) / f"nodepass-box-{os.getpid()}"
        with contextlib.suppress(OSError):
            made.mkdir()
            return made
    return None


def remove_cgroup(cgroup: Path) -> None:
    """Remove a cgroup, and those that systemd made below it."""
    for path in (*sorted(descendants(cgroup), key=lambda each: len(each.parts), reverse=True), cgroup):
        with contextlib.suppress(OSError):
            path.rmdir()


def descendants(cgroup: Path) -> Iterator[Path]:
    """The directories below it."""
    yield from (path for path in cgroup.rglob("*") if path.is_dir())


def mount(source: str, target: str | Path, kind: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2). Raises OSError."""
    texts = [text.encode() or None for text in (source, str(target), kind)]
    check(libc.mount(*texts, ctypes.c_ulong(flags), data.encode() or None), f"mount {source or kind} at {target}")


def check(result: int, what: str) -> None:
    """Raise OSError if a call of the C library failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    sys.exit(main())

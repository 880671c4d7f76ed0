"""A Debian that has nothing but what every Debian has, made by debootstrap: no Python, no systemd.

Made once on a machine and kept as an archive; each test has a copy of its own, in mount and process namespaces.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.support.process import Finished
from tests.support.scope import Closes

SUITE = "bookworm"
ENTER = 'mount -t proc proc "$0/proc" && mount --bind /dev "$0/dev" && exec chroot "$0" "$@"'


class NoDebian(Exception):
    """None can be made here; the text is the reason."""


def bootstrap(target: Path, include: str = "") -> None:
    """Make one, with these packages, separated by commas, as well. Raises NoDebian."""
    options = ["--variant=minbase", *([f"--include={include}"] if include else [])]
    done = subprocess.run(["debootstrap", *options, SUITE, str(target)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoDebian(f"debootstrap: {(done.stdout + done.stderr).strip().splitlines()[-1]}")


class Chroot(Closes):
    """A copy of such a Debian; a context manager that throws it away."""

    def __init__(self, original: Path) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="nodepass-bare-", dir="/var/tmp")
        self.root = Path(self._directory.name) / "root"
        subprocess.run(["cp", "--archive", "--reflink=auto", str(original), str(self.root)], check=True)
        self.prefix = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", ENTER, str(self.root))

    def close(self) -> None:
        self._directory.cleanup()

    def run(self, *command: str) -> Finished:
        """Run a command in it."""
        env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
        done = subprocess.run([*self.prefix, *command], env=env, capture_output=True, text=True, check=False)
        return Finished(done.returncode, done.stdout, done.stderr)

    def do(self, *command: str) -> str:
        """Run a command in it, which must succeed; what it printed."""
        done = self.run(*command)
        assert done.code == 0, (command, done)
        return done.output + done.errors

    def give(self, file: Path) -> str:
        """Copy a file into it; its path there."""
        shutil.copy(file, self.root / "srv")
        return f"/srv/{file.name}"

    def list_files(self) -> dict[str, tuple[int, int, int]]:
        """Every file with its mode, owner and group, but for logs, caches and the package manager's notes."""
        found = {}
        for directory, folders, files in os.walk(self.root):
            for name in (*folders, *files):
                path = Path(directory, name)
                place = "/" + str(path.relative_to(self.root))
                if not place.startswith(("/var/lib/dpkg", "/var/log", "/var/cache", "/srv", "/dev", "/proc", "/tmp")):
                    status = path.lstat()
                    found[place] = (status.st_mode, status.st_uid, status.st_gid)
        return found

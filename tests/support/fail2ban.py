"""fail2ban's own programs with what contrib/fail2ban adds to them: the filter, the jail, and the action."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support.process import REPOSITORY, scrubbed
from tests.support.programs import installed
from tests.support.sockets import until

CONTRIB = REPOSITORY / "contrib" / "fail2ban"
FILTER = CONTRIB / "filter.d" / "nodepass.conf"
SYSTEM = Path("/etc/fail2ban")

HERE = """
[Definition]
logtarget = STDERR
dbfile = {root}/bans.sqlite3
"""


def banned(log: Path, mode: str = "silent") -> list[str]:
    """The addresses that one match each would ban, in the order of the lines."""
    command = ["fail2ban-regex", "--out", "ip", str(log), f"{FILTER}[mode={mode}]"]
    done = subprocess.run(command, env=scrubbed(), capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.split()


class Jail:
    """fail2ban-server with our jail alone; its files are below `root`."""

    def __init__(self, root: Path, local: str) -> None:
        """local: what the operator adds to the jail in jail.d/nodepass.local."""
        self._root = root
        configuration = root / "etc"
        shutil.copytree(SYSTEM, configuration, ignore=shutil.ignore_patterns("jail.d"))
        shutil.copytree(CONTRIB, configuration, dirs_exist_ok=True)
        (configuration / "jail.d" / "nodepass.local").write_text(local)
        (configuration / "fail2ban.local").write_text(HERE.format(root=root))
        self._places = ("-c", str(configuration), "-s", str(root / "socket"), "-p", str(root / "pid"))

    def ask(self, *words: str) -> str:
        """What it answers to such a command; empty where that fails, as before it is up."""
        command = [installed("fail2ban-client"), *self._places, *words]
        done = subprocess.run(command, env=scrubbed(), capture_output=True, text=True, timeout=60, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """From the start of the jail to its stop, which lifts the bans."""
        command = [installed("fail2ban-server"), *self._places, "-f", "start"]
        with subprocess.Popen(command, env=scrubbed(), stdin=subprocess.DEVNULL) as process:
            try:
                until(lambda: process.poll() is not None or self.ask("status", "nodepass"))
                assert process.poll() is None, f"{command} did not start"
                yield
            finally:
                process.terminate()
                process.wait(60)

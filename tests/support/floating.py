"""keepalived on a machine of a `Lan`, as contrib/keepalived configures it: it has the floating address, or not."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from functools import partial
from pathlib import Path

from tests.support.machines import FLOATING, Machine
from tests.support.process import REPOSITORY, scrubbed
from tests.support.programs import installed
from tests.support.scope import Closes

CONFIG = REPOSITORY / "contrib" / "keepalived" / "keepalived.conf"
SYSCTLS = re.findall(
    r"^    (net\.ipv4\.conf\.all\.\w+) = (\d)$", CONFIG.with_name("README.md").read_text(), re.MULTILINE
)
"""What README.md asks for."""


class Keepalived(Closes):
    """keepalived with the file of contrib/keepalived; killed and started again by a test."""

    def __init__(self, root: Path, machine: Machine, peer: Machine) -> None:
        root.mkdir()
        self._machine = machine
        self._log = root / "log"
        self._pid_files = root / "pid", root / "vrrp.pid"
        config = root / "keepalived.conf"
        config.write_text(shipped(machine, peer))
        config.chmod(0o600)
        pid, vrrp_pid = self._pid_files
        files = (f"--use-file={config}", f"--pid={pid}", f"--vrrp_pid={vrrp_pid}")
        self._command = [installed("keepalived"), "--dont-fork", "--log-console", "--vrrp", *files]
        self._running: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Keepalived:
        assert len(SYSCTLS) == 2
        for name, value in SYSCTLS:
            file = Path("/proc/sys", *name.split("."))
            self._machine.namespace.inside(partial(file.write_text, value))
        self.start()
        return self

    def close(self) -> None:
        """Have it give the address up; its log is shown where a test fails."""
        if self._running:
            self._running.terminate()
            self._running.wait()
        print(self._log.read_text())

    def start(self) -> None:
        """Start it, also again after it has been killed."""
        for file in self._pid_files:  # of one that was killed, and that init has perhaps not reaped yet
            file.unlink(missing_ok=True)
        self._running = self._machine.namespace.inside(self._begin)

    def _begin(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                self._command, env=scrubbed(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self) -> None:
        """End both of its processes at once."""
        assert self._running
        os.killpg(self._running.pid, signal.SIGKILL)
        self._running.wait()
        self._running = None

    def is_ready(self) -> bool:
        """Whether it believes that a visitor would be served here."""
        said = self._log.read_text()
        return said.rfind("VRRP_Script(ready) succeeded") > said.rfind("VRRP_Script(ready) failed")

    def has_address(self) -> bool:
        """Whether the machine has the floating address on the network."""
        where = ("dev", self._machine.cable, "to", FLOATING)
        command = ["ip", "-n", self._machine.namespace.name, "-oneline", "address", "show", *where]
        return bool(subprocess.run(command, capture_output=True, check=True).stdout)


def shipped(machine: Machine, peer: Machine) -> str:
    """The file of contrib/keepalived with the addresses and the interface of a machine in place of its own."""
    text = CONFIG.read_text()
    for pattern, new in (
        (r"interface eth0", f"interface {machine.cable}"),
        (r"192\.0\.2\.10/24", f"{FLOATING}/24"),
        (r"192\.0\.2\.10/32", f"{FLOATING}/32"),
        (r"unicast_src_ip 192\.0\.2\.1\b", f"unicast_src_ip {machine.address}"),
        (r"^        192\.0\.2\.2$", peer.address),
    ):
        text, found = re.subn(pattern, new, text, flags=re.MULTILINE)
        assert found == 1, f"{pattern} is not in {CONFIG} once"
    return text

"""What the filter in contrib/fail2ban finds in an access log, by fail2ban's own program."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.support.process import REPOSITORY, scrubbed

FILTER = REPOSITORY / "contrib" / "fail2ban" / "filter.d" / "nodepass.conf"


def banned(log: Path, mode: str = "silent") -> list[str]:
    """The addresses that one match each would ban, in the order of the lines."""
    command = ["fail2ban-regex", "--out", "ip", str(log), f"{FILTER}[mode={mode}]"]
    done = subprocess.run(command, env=scrubbed(), capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.split()

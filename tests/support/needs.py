"""What a test needs of the machine, by name: another package's program, or something only root may do.

`@pytest.mark.programs("nginx", "curl")` puts a test into the suite of `make programs`, where it is skipped with the
reason if one of these is missing. Called by tests/conftest.py; nothing is probed before a test needs it.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Callable
from glob import glob
from importlib.util import find_spec
from pathlib import Path

from tests.support import box, cgroup, delay_line, v2_network

FAKETIME = "/usr/lib/*/faketime/libfaketime.so.1"
STREAM_MODULE = "/usr/lib/nginx/modules/ngx_stream_module.so"
DAEMONS = "/usr/sbin:/usr/local/sbin:/sbin"
"""Directories that are often not on the PATH of a user."""


def program(name: str) -> str | None:
    """The path of a program, or None where it is not installed."""
    return shutil.which(name) or shutil.which(name, path=DAEMONS)


def _faketime() -> str:
    return "" if glob(FAKETIME) else "not installed: faketime"


def _stream_module() -> str:
    return "" if Path(STREAM_MODULE).exists() else "not installed: libnginx-mod-stream"


def _ssl_bump() -> str:
    found = program("squid")
    done = found and subprocess.run([found, "-v"], capture_output=True, text=True, check=False)
    return "" if done and "with-openssl" in done.stdout else "not installed: squid-openssl"


def _mounts() -> str:
    found = program("unshare")
    done = found and subprocess.run([found, "--mount", "true"], capture_output=True, check=False)
    return "" if done and done.returncode == 0 else "mount namespaces need root and unshare"


def _compose() -> str:
    found = program("docker")
    done = found and subprocess.run([found, "compose", "version"], capture_output=True, check=False)
    return "" if done and done.returncode == 0 else "not installed: docker compose"


def _kubernetes_validate() -> str:
    return "" if find_spec("kubernetes_validate") else "not installed: kubernetes-validate"


CAPABILITIES: dict[str, Callable[[], str]] = {
    "a box": box.why_not,
    "delay line": delay_line.why_not,
    "docker compose": _compose,
    "faketime": _faketime,
    "kubernetes-validate": _kubernetes_validate,
    "memory cgroups": cgroup.why_not,
    "mount namespaces": _mounts,
    "nginx's stream module": _stream_module,
    "network namespaces": v2_network.why_not,
    "squid's ssl-bump": _ssl_bump,
}
"""What is more than a program on the PATH: each returns the reason why it is not there, or an empty string."""


@functools.cache
def why_not(name: str) -> str:
    """Why this machine does not have it; empty where it does."""
    if name in CAPABILITIES:
        return CAPABILITIES[name]()
    return "" if program(name) else f"not installed: {name}"


def missing(names: tuple[str, ...]) -> str:
    """The reasons for all that is missing, in one line."""
    return "; ".join(reason for name in names if (reason := why_not(name)))

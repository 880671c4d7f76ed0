"""How this program is installed: what starts it again, and what adds a package that it lacks.

Looks at the interpreter and the environment only, and imports nothing that the patch of gevent concerns: `__main__`
calls it before. Messages about a missing package end with `how_to_add`, so that each names the environment that the
program runs in.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

PROGRAM = "NODEPASS_PROGRAM"
"""The variable in which the executable and the Debian package pass the path by which they were started."""

_DISTRIBUTIONS = {
    "OpenSSL": "pyOpenSSL",
    "configargparse": "ConfigArgParse",
    "prometheus_client": "prometheus-client",
    "service_identity": "service-identity",
    "zope": "zope.event",
}
"""Modules whose distribution has another name."""


def command() -> list[str]:
    """What starts this program again, with its arguments: in the release that is installed then, where that differs."""
    if _is_bundle():
        return [os.environ[PROGRAM], *sys.argv[1:]]
    script = Path(sys.argv[0])
    if script.suffix != ".py" and os.access(script, os.X_OK):  # of an installation; its link leads to the current one
        return [os.path.abspath(script), *sys.argv[1:]]
    return [sys.executable, *sys.orig_argv[1:]]


def how_to_add(error: ImportError) -> str:
    """What the user does about a missing package, for the end of a line."""
    module = (error.name or "").partition(".")[0]
    package = _DISTRIBUTIONS.get(module, module) or "nodepass"  # some errors name none
    prefix = Path(sys.prefix)
    if _is_bundle():
        remedy = "reinstall the package nodepass" if prefix.parts[1:2] == ("opt",) else f"remove {prefix}"
        return f"this installation is incomplete: {remedy}, then start it again"
    if prefix.parent.name == "nodepass" and (prefix / "share" / "nodepass" / "systemd").exists():
        return "install it with: nodepass-manager update --extras metrics,top --wheel FILE"
    if (prefix / "pipx_metadata.json").exists():
        return f"install it with: pipx inject nodepass {package}"
    if (prefix / "uv-receipt.toml").exists():
        return f"install it with: uv pip install --python {sys.executable} {package}"
    if sys.prefix == sys.base_prefix and (checkout := find_checkout()):
        return f"run this first: make -C {checkout} venv"
    return f"install it with: {sys.executable} -m pip install {package}"


def find_checkout() -> Path | None:
    """The checkout that this program runs from, if it does."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "Makefile").exists() and (root / "bin" / "nodepass").exists() else None


def _is_bundle() -> bool:
    """Whether it has brought its own interpreter, which reads no variable of Python's."""
    return bool(sys.flags.isolated) and PROGRAM in os.environ

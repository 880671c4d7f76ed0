"""A checkout: what it says before `make venv`, and the demo, its first command."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.process import REPOSITORY, scrubbed


@pytest.mark.parametrize("python", [True, False], ids=["a python without the dependencies", "no python"])
def test_a_checkout_without_its_environment_says_what_makes_it(tmp_path: Path, python: bool) -> None:
    program = tmp_path / "checkout" / "bin" / "nodepass"
    program.parent.mkdir(parents=True)
    shutil.copy(REPOSITORY / "bin" / "nodepass", program)
    path = tmp_path / "path"
    path.mkdir()
    (path / "readlink").symlink_to(str(shutil.which("readlink")))
    if python:
        (path / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} -IS "$@"\n')
        (path / "python3").chmod(0o755)
    env = {"PATH": str(path)}
    done = subprocess.run(["/bin/sh", str(program), "--version"], env=env, capture_output=True, text=True, check=False)
    wanted = f"nodepass: this checkout has no .venv; run this first: make -C {tmp_path / 'checkout'} venv\n"
    assert (done.returncode, done.stdout, done.stderr) == (127, "", wanted)


@pytest.mark.programs
def test_the_demo_shows_a_key_names_what_protects_the_tunnel_and_what_to_type_next() -> None:
    command = [sys.executable, str(REPOSITORY / "contrib/demo/demo.py"), "--once"]
    done = subprocess.run(command, env=scrubbed(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r'^What protects the tunnel: key "demo", tls 1 \(TLS 1\.3', done.stdout, re.MULTILINE)
    assert 'bin/nodepass "client://SERVER:10101/127.0.0.1:80?name=web"' in done.stdout
    assert "bytes, status 200, in " in done.stdout
    assert "the echo of 'knock, knock' in " in done.stdout

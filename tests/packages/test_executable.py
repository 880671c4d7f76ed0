"""The executable: one process, wherever it can be unpacked, and a reason where it cannot."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nodepass.installed import PROGRAM
from tests.packages.conftest import build
from tests.support.process import Finished, Nodepass
from tests.support.sockets import connect
from tests.support.systemd import NotifySocket
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, assert_connected, listening

pytestmark = pytest.mark.programs("strip", "objdump", "dpkg-deb")
needs_mounts = pytest.mark.programs("mount namespaces")

URL = "server://127.0.0.1:0/127.0.0.1:0?tls=1"
CLOSED = (
    "mount -t tmpfs -o noexec tmpfs /tmp && mount -t tmpfs -o noexec tmpfs /dev/shm && mount -o remount,bind,ro / && "
)
"""Makes a machine of one that can be written to nowhere but where nothing can be executed."""


def run(program: Path, *arguments: str, env: Mapping[str, str], closed: bool = False) -> Finished:
    """Run the executable to its end, without any Python on its PATH, if need be on a closed machine."""
    command = [str(program), *arguments]
    if closed:
        command = ["unshare", "--mount", "sh", "-c", CLOSED + 'exec "$0" "$@"', *command]
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **env}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd="/")
    return Finished(done.returncode, done.stdout, done.stderr)


class Executable(Nodepass):
    """A run of the executable."""

    def __init__(self, program: Path, cache: Path, *arguments: str, env: Mapping[str, str] = CALM) -> None:
        super().__init__(*arguments, env={**env, "NODEPASS_CACHE": str(cache)})
        self.program = (str(program),)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, executable: Path) -> Path:
    """Where it has been unpacked."""
    made = tmp_path_factory.mktemp("cache")
    assert run(executable, "--version", env={"NODEPASS_CACHE": str(made)}).code == 0
    return made


def test_the_same_commit_gives_the_same_bytes(dist: Path, tmp_path: Path) -> None:
    sums = (dist / "SHA256SUMS").read_text()
    assert (build(tmp_path / "dist") / "SHA256SUMS").read_text() == sums
    names = [line.partition("  ")[2] for line in sums.splitlines()]
    assert [name for name in names if name.endswith((".whl", ".tar.gz"))]
    assert sorted(names) == sorted(path.name for path in dist.iterdir() if path.name != "SHA256SUMS")
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=dist, check=False).returncode == 0


def test_it_is_one_process_which_tells_systemd_that_it_is_ready(
    stack: contextlib.ExitStack, executable: Path, cache: Path
) -> None:
    notified = stack.enter_context(NotifySocket())
    env = {**CALM, "NOTIFY_SOCKET": notified.address, "DATA_PORT": "tunnel"}
    server = stack.enter_context(Executable(executable, cache, URL, env=env))
    notified.wait_for("READY=1")
    process = Path(f"/proc/{server.pid}")
    assert (process / "comm").read_text() == "nodepass\n"
    assert (process / f"task/{server.pid}/children").read_text() == ""
    assert f"{PROGRAM}={executable}" in (process / "environ").read_text().split("\0")
    target = stack.enter_context(Target())
    tunnel, _, visitors = listening(server)
    client = stack.enter_context(OurClient(tunnel, target.address))
    client.wait_until_connected()
    with connect(visitors) as visitor, target.accept() as service:
        assert_connected(visitor, service)
    assert server.stop() == 0


def test_it_has_all_that_metrics_top_and_encryption_need(executable: Path, cache: Path) -> None:
    env = {"NODEPASS_CACHE": str(cache), "METRICS_LISTEN": "127.0.0.1:0", "COLUMNS": "100"}
    checked = run(executable, "--check", "client://127.0.0.1:1/127.0.0.1:2?tls=2", URL, env=env)
    assert "metrics" in checked.output
    assert "No module" not in checked.output + checked.errors
    assert (
        "no response" in (shown := run(executable, "top", "--once", "127.0.0.1:1", env=env)).errors or shown.code == 1
    )
    assert "No module" not in shown.errors
    (tree,) = cache.iterdir()
    modules = "nodepass.tools.top_screen, nodepass.metrics.endpoint, nodepass.tls.verify, nodepass.metrics.healthcheck"
    imported = subprocess.run([tree / "bin/nodepass", "-ISB", "-c", f"import {modules}"], check=False)
    assert imported.returncode == 0


def test_many_first_starts_at_the_same_time_leave_one_copy(executable: Path, tmp_path: Path) -> None:
    env = {"NODEPASS_CACHE": str(tmp_path / "new" / "cache")}
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda _: run(executable, "--version", env=env), range(3)))
    assert [(each.code, each.errors) for each in done] == [(0, "")] * 3
    assert len(list((tmp_path / "new" / "cache").iterdir())) == 1


def test_it_starts_from_a_relative_path_and_through_a_link(executable: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "tunnel").symlink_to(executable)
    command = ["./tunnel", "--version"]
    env = {"PATH": os.defpath, "NODEPASS_CACHE": str(cache)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert re.fullmatch(r"nodepass \d+\.\d+\S*\n", done.stdout)


@pytest.fixture
def outside(executable: Path) -> Iterator[Path]:
    """A directory outside of /tmp, which a closed machine hides, with the executable in it."""
    with tempfile.TemporaryDirectory(prefix="nodepass-", dir="/var/tmp") as directory:
        shutil.copy(executable, Path(directory) / "nodepass")
        yield Path(directory)


@needs_mounts
def test_on_a_read_only_root_it_runs_from_what_was_unpacked_before(outside: Path) -> None:
    env = {"NODEPASS_CACHE": str(outside / "cache")}
    assert run(outside / "nodepass", "--version", env=env).code == 0
    assert run(outside / "nodepass", "--version", env=env, closed=True).code == 0


@needs_mounts
@pytest.mark.parametrize(
    ("cache", "reason"), [("/tmp/cache", "Permission denied"), ("/srv/cache", "Read-only file system")]
)
def test_where_nothing_can_be_both_written_and_executed_one_line_says_so(
    outside: Path, cache: str, reason: str
) -> None:
    done = run(outside / "nodepass", "--version", env={"NODEPASS_CACHE": cache}, closed=True)
    assert (done.code, len(done.lines)) == (1, 1)
    assert re.match(f"nodepass: cannot be unpacked: {cache}: .*{reason}; set NODEPASS_CACHE", done.errors)


@pytest.mark.parametrize("part", ["", "tree"])
def test_a_copy_that_another_user_could_have_changed_is_not_run(
    executable: Path, cache: Path, tmp_path: Path, part: str
) -> None:
    (tree,) = cache.iterdir()
    own = tmp_path / "cache"
    (own / tree.name / "bin").mkdir(parents=True)
    (own / tree.name / "bin" / "nodepass").symlink_to("/bin/echo")
    env = {"NODEPASS_CACHE": str(own)}
    assert "-m nodepass" in run(executable, "--version", env=env).output
    (own / tree.name if part else own).chmod(0o777)
    done = run(executable, "--version", env=env)
    assert "-m nodepass" not in done.output
    assert (done.code, "another user can write to it" in done.errors) == (1, True)

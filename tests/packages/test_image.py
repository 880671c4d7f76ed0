"""The image, built and run without a container engine's daemon, on a base made by debootstrap."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.bare import NoDebian, bootstrap
from tests.support.process import REPOSITORY, Nodepass
from tests.support.sockets import connect
from tests.support.target import Target
from tests.support.tunnel import OurClient, assert_connected, listening

pytestmark = pytest.mark.programs("buildah", "debootstrap", "mount namespaces")

LARGEST = 18_446_805
"""Bytes that the image may add to its base: half of what it added when it held all that pip installs."""

READ_ONLY = (
    'mount --rbind "$0" "$0" && mount -o remount,bind,ro "$0" && mount -t proc proc "$0/proc"'
    ' && mount -t tmpfs tmpfs "$0/dev" && mkdir "$0/dev/shm" && chmod 1777 "$0/dev/shm" && : >"$0/dev/null"'
    ' && mount --bind /dev/null "$0/dev/null" && : >"$0/dev/urandom" && mount --bind /dev/urandom "$0/dev/urandom"'
    ' && exec "$@"'
)
"""What a container engine makes of an image: a root that cannot be written to, and process 1 below it."""


class Images:
    """Images in a store of their own."""

    def __init__(self, directory: Path) -> None:
        self._store = ("--root", str(directory / "store"), "--runroot", str(directory / "run"))

    def do(self, command: str, *arguments: str) -> str:
        """Run a command of buildah, which must succeed; what it printed."""
        done = subprocess.run(
            ["buildah", *self._store, "--storage-driver", "vfs", command, *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=REPOSITORY,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()


@pytest.fixture(scope="module")
def images() -> Iterator[Images]:
    with tempfile.TemporaryDirectory(prefix="nodepass-images-", dir="/var/tmp") as directory:
        made = Images(Path(directory))
        base = Path(directory) / "base"
        try:
            bootstrap(base, "python3,python3-venv")
        except NoDebian as error:
            pytest.skip(str(error))
        container = made.do("from", "scratch")
        made.do("add", "--quiet", container, str(base), "/")
        made.do("commit", "--quiet", "--rm", container, "localhost/base")
        made.do("build", *BUILD, "--build-arg", "BASE=localhost/base", "--tag", "localhost/nodepass", ".")
        yield made
        made.do("rm", "--all")


CERTIFICATES = ("--volume", "/etc/ssl/certs:/etc/ssl/certs:ro")  # pip's, which a minimal base does not have
BUILD = ("--quiet", "--format", "docker", "--pull=never", "--isolation", "chroot", *CERTIFICATES)


@pytest.fixture(scope="module")
def container(images: Images) -> str:
    return images.do("from", "localhost/nodepass")


@pytest.fixture(scope="module")
def root(images: Images, container: str) -> Path:
    return Path(images.do("mount", container))


@pytest.fixture(scope="module")
def settings(images: Images) -> dict[str, object]:
    """What the image says about running it."""
    shown = json.loads(images.do("inspect", "--type", "image", "localhost/nodepass"))
    found = shown["Docker"]["config"]
    assert isinstance(found, dict)
    return found


def test_it_runs_as_an_unprivileged_user_and_adds_half_of_what_it_did(
    images: Images, container: str, root: Path
) -> None:
    said = images.do("run", "--isolation", "chroot", container, "--", "sh", "-c", "id -u; nodepass --version")
    assert re.fullmatch(r"65532\nnodepass \d+\.\d+\S*", said)
    added = [path for path in (root / "opt/nodepass").rglob("*") if not path.is_symlink() and path.is_file()]
    assert sum(path.stat().st_size for path in added) <= LARGEST
    assert not [path for path in added if path.suffix == ".py" or "pip" in path.parts]


class Contained(Nodepass):
    """The image's own command as process 1, as its user, on a read-only root."""

    def __init__(self, root: Path, settings: dict[str, object], env: dict[str, str]) -> None:
        given = dict(each.partition("=")[::2] for each in settings["Env"])  # type: ignore[attr-defined]
        super().__init__(env=env)
        self._env = {"LOG_FORMAT": "json", **given, **env}
        entry = settings["Entrypoint"]
        assert isinstance(entry, list)
        self.program = tuple(entry)
        user = str(settings["User"])
        enter = ("chroot", f"--userspec={user}", str(root))
        self.prefix = (
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "sh",
            "-c",
            READ_ONLY,
            str(root),
            *enter,
        )

    def inside(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the same container."""
        enter = ["nsenter", "--target", str(self.inner), "--mount", "--pid", "--root", "--wd=/"]
        user = ["setpriv", "--reuid=65532", "--regid=65532", "--clear-groups", "--no-new-privs"]
        return subprocess.run([*enter, *user, *command], env=self._env, capture_output=True, text=True, check=False)

    @property
    def inner(self) -> int:
        """Process 1, as this machine counts."""
        return int(Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text())


def test_on_a_read_only_root_it_serves_on_one_port_is_healthy_and_drains_at_sigterm(
    stack: contextlib.ExitStack, root: Path, settings: dict[str, object]
) -> None:
    env = {"NODEPASS_URL": "server://127.0.0.1:0/127.0.0.1:0?tls=1", "DATA_PORT": "tunnel", "SHUTDOWN_TIMEOUT": "20s"}
    server = stack.enter_context(Contained(root, settings, env))
    tunnel, data, visitors = listening(server)
    assert data == tunnel
    status = Path(f"/proc/{server.inner}/status").read_text()
    assert re.search(r"^Uid:\s+65532\s+65532", status, re.MULTILINE)
    assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
    assert (
        "Read-only file system"
        in server.inside("touch", "/opt/nodepass/x").stderr + server.inside("sh", "-c", ": >/x").stderr
    )
    check = server.inside(*health_check(settings))
    assert (check.returncode, "200" in check.stdout) == (0, True), check
    target = stack.enter_context(Target())
    client = stack.enter_context(OurClient(tunnel, target.address))
    client.wait_until_connected()
    with connect(visitors) as visitor, target.accept() as service:
        assert_connected(visitor, service)
        os.kill(server.inner, signal.SIGHUP)
        server.wait_for("process.reloading")
        os.kill(server.inner, signal.SIGUSR1)
        assert server.wait_for("process.bugs")["greenlets"]
        os.kill(server.inner, getattr(signal, str(settings["StopSignal"])))
        server.wait_for("process.stopping", sessions=1)
        assert_connected(visitor, service)
    assert server.wait() == 0
    assert not server.find("process.cut")


def health_check(settings: dict[str, object]) -> list[str]:
    """The command of the image's health check."""
    check = settings["Healthcheck"]
    assert isinstance(check, dict)
    kind, *command = check["Test"]
    return command if kind == "CMD" else ["sh", "-c", *command]

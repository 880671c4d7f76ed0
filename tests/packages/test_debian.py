"""The Debian package, in a Debian without Python and on a machine that systemd booted: installed, upgraded, purged."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.bare import Chroot, NoDebian, bootstrap
from tests.support.box import BootError, Machine
from tests.support.process import Nodepass
from tests.support.sockets import connect
from tests.support.target import Target
from tests.support.tunnel import OurClient, assert_connected, listening

pytestmark = pytest.mark.programs("strip", "objdump", "dpkg-deb")
URL = "server://127.0.0.1:0/127.0.0.1:0"


@pytest.fixture(scope="module")
def package(dist: Path) -> Path:
    (found,) = dist.glob("*.deb")
    return found


@pytest.fixture(scope="module")
def newer(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same package as the next version."""
    root = tmp_path_factory.mktemp("newer") / "root"
    subprocess.run(["dpkg-deb", "--raw-extract", str(package), str(root)], check=True)
    control = root / "DEBIAN" / "control"
    control.write_text(re.sub(r"^Version: .*$", "Version: 99", control.read_text(), flags=re.MULTILINE))
    made = root.parent / "nodepass_99.deb"
    command = ["dpkg-deb", "--root-owner-group", "-Znone", "--build", str(root), str(made)]
    subprocess.run(command, check=True, capture_output=True)
    return made


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("debian") / "root"
    try:
        bootstrap(root)
    except NoDebian as error:
        pytest.skip(str(error))
    return root


@pytest.mark.programs("debootstrap", "mount namespaces")
def test_on_a_debian_without_python_it_serves_is_upgraded_and_leaves_nothing_behind(
    stack: contextlib.ExitStack, debian: Path, package: Path, newer: Path
) -> None:
    bare = stack.enter_context(contextlib.closing(Chroot(debian)))
    assert bare.run("sh", "-c", "command -v python3").code != 0
    before = bare.list_files()
    bare.do("dpkg", "--install", bare.give(package))
    assert re.fullmatch(r"nodepass \d+\.\d+\S*\n", bare.do("nodepass", "--version"))
    assert re.search(r"^drwxr-s--- .* root nodepass ", bare.do("ls", "-ld", "/etc/nodepass"))
    serve(bare)
    bare.do("nodepass-manager", "create", "web", "--url", "client://127.0.0.1:1/127.0.0.1:2", "--no-start")
    assert re.search(r"^-rw-r----- .* root nodepass ", bare.do("ls", "-l", "/etc/nodepass/web.env"))
    assert "apt-get" in bare.run("nodepass-manager", "uninstall", "--yes").errors
    for shell in ("nodepass", "nodepass-manager"):
        bare.do("bash", "-n", f"/usr/share/bash-completion/completions/{shell}")
    bare.do("sh", "-c", "echo '# mine' >>/etc/logrotate.d/nodepass")
    bare.do("dpkg", "--install", bare.give(newer))
    assert "# mine" in bare.do("cat", "/etc/logrotate.d/nodepass")
    bare.do("dpkg", "--remove", "nodepass")
    assert not (bare.root / "opt/nodepass").exists()
    assert "client://" in bare.do("cat", "/etc/nodepass/web.env")
    bare.do("dpkg", "--purge", "nodepass")
    assert "nodepass" not in bare.do("cat", "/etc/group")
    after = bare.list_files()
    changed = {path for path in {*before, *after} if before.get(path) != after.get(path)}
    backups = {f"/etc/{name}{end}" for name in ("group", "gshadow") for end in ("", "-")}
    assert changed <= {"/etc/.pwd.lock", *backups, "/opt"}  # which dpkg removes once it is empty


def serve(bare: Chroot) -> None:
    """Run a tunnel with its server in the bare Debian."""
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(Target())
        server = Nodepass(f"{URL}?tls=1", env={"DATA_PORT": "tunnel", "METRICS_LISTEN": "127.0.0.1:0"})
        server.prefix, server.program = bare.prefix, ("/usr/bin/nodepass",)
        stack.enter_context(server)
        tunnel, _, visitors = listening(server)
        client = stack.enter_context(OurClient(tunnel, target.address))
        client.wait_until_connected()
        visitor = stack.enter_context(connect(visitors))
        with target.accept() as service:
            assert_connected(visitor, service)


@pytest.fixture
def box(package: Path, newer: Path) -> Iterator[Machine]:
    with contextlib.ExitStack() as stack:
        try:
            booted = stack.enter_context(Machine())
        except BootError as error:
            pytest.skip(f"systemd does not boot here: {error}")
        for file in (package, newer):
            (booted.root / "srv" / file.name).write_bytes(file.read_bytes())
        yield booted


@pytest.mark.programs("a box")
def test_under_systemd_an_upgrade_restarts_instances_and_a_removal_stops_them(
    box: Machine, package: Path, newer: Path
) -> None:
    def pid() -> int:
        return int(box.systemctl("show", "nodepass@web.service", "--property=MainPID", "--value"))

    box.run("dpkg", "--install", f"/srv/{package.name}")
    box.run("sh", "-c", "umask 077; nodepass --generate-key >/srv/key")
    options = ("--url", "server://:10101/:443", "--set", "DATA_PORT=tunnel", "--key-file", "/srv/key")
    assert "nodepass@web is active" in box.run("nodepass-manager", "create", "web", *options)
    first = pid()
    assert first
    assert os.path.basename(box.run("readlink", f"/proc/{first}/exe").strip()) == "nodepass"
    box.run("dpkg", "--install", f"/srv/{newer.name}")
    assert pid() not in (0, first)
    assert box.systemctl("is-active", "nodepass@web.socket").strip() == "active"
    assert re.search(r"web +active +enabled .*key, tls 1", box.run("nodepass-manager", "list"))
    box.run("dpkg", "--remove", "nodepass")
    assert pid() == 0
    box.run("dpkg", "--purge", "nodepass")
    left = box.run(
        "sh", "-c", "ls -d /etc/nodepass /etc/credstore/nodepass.* /etc/systemd/system/*/nodepass@* 2>&1 || :"
    )
    assert "No such file" in left
    assert not re.search("^/", left, re.MULTILINE)


@pytest.mark.programs("lintian")
def test_lintian_finds_nothing_that_is_not_explained(package: Path) -> None:
    done = subprocess.run(["lintian", "--allow-root", str(package)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")

"""contrib/systemd/nodepass-manager on a machine that a real systemd booted, from install to uninstall, offline."""

from __future__ import annotations

import argparse
import contextlib
import importlib.machinery
import importlib.util
import os
import pty
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.box import BootError, Machine
from tests.support.certificates import Authority
from tests.support.process import REPOSITORY
from tests.support.sockets import PATIENCE, connect, until
from tests.support.target import Target
from tests.support.tunnel import OurClient, assert_connected
from tests.support.wheels import build_wheel, pack_needed

MANAGER = REPOSITORY / "contrib" / "systemd" / "nodepass-manager"
needs_box = pytest.mark.programs("a box")

SERVER = "server://127.0.0.1:10101/127.0.0.1:8080?tls=1"
ENV = "/etc/nodepass/web.env"
KEY = "/etc/credstore/nodepass.web.tunnel-key"
UNIT = "/etc/systemd/system/nodepass@.service"
PORTS = "/etc/systemd/system/nodepass@edge.socket.d/manager.conf"
COMMANDS = (
    *("install", "update", "uninstall", "list", "create", "edit", "start", "stop", "restart"),
    *("handover", "enable", "disable", "status", "show", "delete", "logs"),
)
CHECK_FIRST = "[Service]\nExecStartPre=/usr/local/bin/nodepass --check\n"


class ManagedBox(Machine):
    """A box in which nothing is installed: that is the manager's business."""

    def prepare(self, wheels: Path) -> None:
        """Put wheels, manager and a key where a user would have them."""
        for wheel in wheels.iterdir():
            target = self.root / "srv/wheels" / wheel.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(wheel.read_bytes())
        self.write("/srv/nodepass-manager", MANAGER.read_text(), 0o755)
        self.write("/srv/key", "0123456789abcdef" * 4, 0o600)

    def manage(self, *arguments: str) -> tuple[int, str]:
        """Run the manager; its exit status and what it printed."""
        said = self.run("sh", "-c", '"$@"; echo "status $?"', "sh", self.python, "/srv/nodepass-manager", *arguments)
        found = re.search(r"status (\d+)$", said.strip(), re.MULTILINE)
        assert found, said
        return int(found[1]), said

    def do(self, *arguments: str) -> str:
        """Run the manager, which must succeed; what it printed."""
        code, said = self.manage(*arguments)
        assert code == 0, said
        return said

    def refuse(self, *arguments: str) -> str:
        """Run the manager, which must refuse; what it printed."""
        code, said = self.manage(*arguments)
        assert code == 1, said
        return said

    def read(self, path: str) -> str:
        return (self.root / path.removeprefix("/")).read_text()

    def has(self, path: str) -> bool:
        return os.path.lexists(self.root / path.removeprefix("/"))


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    build_wheel(folder, tmp_path_factory.mktemp("workspace"))
    pack_needed(folder)
    return folder


@pytest.fixture
def box(wheels: Path) -> Iterator[ManagedBox]:
    with contextlib.ExitStack() as stack:
        try:
            booted = stack.enter_context(ManagedBox())
        except BootError as error:
            pytest.skip(f"systemd does not boot here: {error}")
        booted.prepare(wheels)
        yield booted


@needs_box
def test_an_instance_lives_from_install_and_create_to_delete_and_uninstall(
    box: ManagedBox, manager: ModuleType
) -> None:
    read_environment(box, manager)
    wheel = next((box.root / "srv/wheels").glob("nodepass-*.whl")).name
    installing = ("--wheel", f"/srv/wheels/{wheel}", "--find-links", "/srv/wheels", "--python", box.python)
    assert "nodepass is not installed" in box.refuse("create", "web", "--url", SERVER)
    assert "nothing to update" in box.refuse("update", *installing)
    box.do("install", *installing)
    assert "nodepass 0." in box.run("/usr/local/bin/nodepass", "--version")
    assert ".Dt NODEPASS 1" in box.run("cat", "/usr/local/share/man/man1/nodepass.1")
    assert "ExecStart=/usr/local/bin/nodepass" in box.read(UNIT)
    box.write("/etc/systemd/system/nodepass@.service.d/check.conf", CHECK_FIRST)
    box.systemctl("daemon-reload")
    start_by_socket(box)
    guide(box)
    create(box)
    carry(box)
    edit(box)
    check_as_another_user(box)
    start_without_its_key(box)
    assert "still running the previous release: web" in box.do("update", *installing)
    assert (box.root / "usr/local/lib/nodepass/current").readlink() == Path("2")
    hand_over(box, *installing)
    stop_and_delete(box)
    uninstall(box)


def start_by_socket(box: ManagedBox) -> None:
    """Check that systemd opens ports under 1024 for a hardened unit, and that a check before its start expects that."""
    said = box.do("create", "edge", "--url", "server://:10101/:443?tls=0", "--set", "DATA_PORT=tunnel")
    assert "nodepass@edge is active" in said
    assert opened(box) == {"10101", "443"}
    said = box.do("logs", "edge")
    assert "warn server:10101: tunnel address :10101: in use by a process that cannot be seen" in said
    assert "warn server:10101: target address (udp) :443: in use by a process that cannot be seen" in said
    assert "listening: tunnel" in said
    since = socket_since(box)
    box.do("restart", "edge")
    assert socket_since(box) == since  # nobody was refused
    box.do("stop", "edge")
    assert opened(box) == set()
    box.do("start", "edge")
    assert opened(box) == {"10101", "443"}
    assert box.has(PORTS)
    box.do("edit", "edge", "--url", "server://:10101/:444?tls=0", "--set", "DATA_PORT=10102")
    assert opened(box) == {"10101", "443"}
    box.do("restart", "edge")
    assert opened(box) == {"10101", "444", "10102"}
    box.do("edit", "edge", "--url", "client://127.0.0.1:10101/127.0.0.1:80")
    assert not box.has(PORTS)
    box.do("delete", "edge", "--yes")
    assert box.systemctl("is-active", "nodepass@edge.socket", check=False).strip() == "inactive"


def opened(box: ManagedBox) -> set[str]:
    """The TCP ports that are listened on."""
    lines = box.run("cat", "/proc/net/tcp", "/proc/net/tcp6").splitlines()
    return {str(int(fields[1][-4:], 16)) for line in lines if (fields := line.split())[3] == "0A"}


def socket_since(box: ManagedBox) -> str:
    return box.systemctl("show", "--property", "ActiveEnterTimestampMonotonic", "nodepass@edge.socket")


def create(box: ManagedBox) -> None:
    assert "fail url: " in box.refuse("create", "web", "--url", "server://:1/:2?tls=7")
    assert "would have no tunnel; use --url" in box.refuse("create", "web")
    assert "--key-file /srv/none: cannot be read: " in box.refuse(
        "create", "web", "--url", SERVER, "--key-file", "/srv/none"
    )
    assert not box.has(ENV)
    box.do("create", "web", "--url", SERVER, "--set", "DATA_PORT=tunnel", "--key-file", "/srv/key")
    assert f'NODEPASS_URL="{SERVER}"\nDATA_PORT="tunnel"\nTUNNEL_KEY_FILE=' in box.read(ENV)
    assert (box.root / ENV[1:]).stat().st_mode & 0o777 == 0o640
    assert (box.root / KEY[1:]).stat().st_mode & 0o777 == 0o600
    assert re.search(rf"web +active +enabled +[-\d]+ \S+ \S+ +none +key, tls \d +{re.escape(SERVER)}", box.do("list"))
    assert "already exists" in box.refuse("create", "web", "--url", SERVER)
    said = box.refuse("create", "twin", "--url", SERVER, "--set", "SEMAFORE_LIMIT=3")
    assert "SEMAFORE_LIMIT is not a setting of nodepass" in said
    assert "cannot listen on tunnel address 127.0.0.1:10101: Address already in use" in said  # the end of its log
    box.do("delete", "twin", "--yes")


class Conversation:
    """The manager's menu at a terminal in the box."""

    def __init__(self, box: ManagedBox) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [*box.enter, box.python, "/srv/nodepass-manager"],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self.said = ""

    def answer(self, *dialog: tuple[str, str]) -> str:
        """Answer each of the questions as it is asked; what was said until the menu is shown again."""
        self.said = ""
        for question, reply in dialog:
            self._read_until(re.escape(question))
            os.write(self._master, f"{reply}\n".encode())
        return self._read_until(r"What\? ")

    def leave(self) -> int:
        os.write(self._master, b"q\n")
        return self.process.wait(PATIENCE)

    def _read_until(self, pattern: str) -> str:
        begun, deadline = len(self.said), time.monotonic() + 3 * PATIENCE
        while not (found := re.search(pattern, self.said[begun:])):
            assert time.monotonic() < deadline, (pattern, self.said)
            if select.select([self._master], [], [], 0.1)[0]:
                self.said += os.read(self._master, 1 << 16).decode(errors="replace").replace("\r", "")
        assert found
        return self.said


def guide(box: ManagedBox) -> None:
    """Create both ends and a server with a certificate by the questions of the menu, and use its other commands."""
    menu = Conversation(box)
    assert "show the files of an instance" in menu.answer()
    said = menu.answer(*server_dialog(key="m", certificate="s", ports="1", metrics="n"))
    assert "nodepass@east is active" in said
    assert re.search(
        r"nodepass-manager create east --url 'client://\S+:10101/127\.0\.0\.1:80\?name=web' --key-file -", said
    )
    assert 'NODEPASS_URL="server://:10101/:8080?tls=1&name=web"\nDATA_PORT="tunnel"' in box.read(
        "/etc/nodepass/east.env"
    )
    (key,) = re.findall(r"shown this once:\s+(\S{43})\n", said)
    said = menu.answer(
        *(("", "create"), ("Name of the instance", "west"), ("server, which visitors reach, or the client", "c")),
        *(("Name of the tunnel", "web"), ("Address of the server", "127.0.0.1:10101"), ("Address of the service", "")),
        *(("paste the server's, or none", "p"), ("tunnel's key", key), ("certificate of its own", "n")),
        *(("Serve metrics", "n"), ("A further setting", "UDP_LANES=2"), ("A further setting", "")),
    )
    assert "nodepass@west is active" in said
    assert 'UDP_LANES="2"' in box.read("/etc/nodepass/west.env")
    assert key not in said
    until(
        lambda: re.search(r"west +active .* 127\.0\.0\.1:10101 .*key \"web\", tls 1", box.do("list")),
        what="they are connected",
    )
    menu.answer(("", "disable"), ("Name", "west"))
    assert re.search(r"west +active +disabled", menu.answer(("", "list")))
    menu.answer(("", "enable"), ("Name", "west"))
    assert "nodepass@west.service" in menu.answer(("", "status"), ("Name", "west"))
    said = menu.answer(("", "show"), ("Name", "west"))
    assert "/etc/credstore/nodepass.west.tunnel-key (not shown)" in said
    assert "server://:10101/:8080?name=web" in said
    for name in ("east", "west"):
        menu.answer(("", "delete"), ("Name", name), ("Stop the tunnel", "y"))
    guide_certificate(box, menu, key)
    assert menu.leave() == 0


def guide_certificate(box: ManagedBox, menu: Conversation, key: str) -> None:
    """Create a server with a certificate, a pasted key, a data port and wrong answers on the way."""
    with tempfile.TemporaryDirectory() as directory:
        made = Authority(Path(directory)).issue("localhost")
        for name, file in (("crt", made.crt), ("key", made.key)):
            box.write(f"/srv/own.{name}", Path(file).read_text(), 0o600)
    said = menu.answer(*server_dialog(key="p", certificate="o", ports="2", metrics="n", pasted=key))
    assert "'x' is not usable here" in said
    assert "nodepass@east is active" in said
    assert "/127.0.0.1:80?name=web&tls=2' --key-file -" in said
    assert 'DATA_PORT="10102"' in box.read("/etc/nodepass/east.env")
    said = menu.answer(("", "delete"), ("Name", "east"), ("Stop the tunnel", "y"))
    assert "/etc/credstore/nodepass.east.key" in said
    assert not box.has("/etc/credstore/nodepass.east.key")


def server_dialog(key: str, certificate: str, ports: str, metrics: str, pasted: str = "") -> list[tuple[str, str]]:
    """Questions and answers for a server."""
    data = [("Port for data", "")] if ports == "2" else []
    secret = [("tunnel's key", pasted)] if key == "p" else []
    files = (
        [("certificate and its chain", "/srv/own.crt"), ("private key", "/srv/own.key")] if certificate == "o" else []
    )
    return [
        *(("", "create"), ("Name of the instance", "east"), ("server, which visitors reach", "x"), ("s, c", "s")),
        *(("Name of the tunnel", "web"), ("Port for the client", ""), ("Port for visitors", "8080")),
        *(("One port for the client", ports), *data, ("make one, paste one", key), *secret),
        *(("self-signed, or your own", certificate), *files, ("Serve metrics", metrics), ("A further setting", "")),
    ]


def carry(box: ManagedBox) -> None:
    """Check that the instance is a server that has the key, and serves."""
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(box.inside(Target))
        client = OurClient(("127.0.0.1", 10101), target.address, env={"TUNNEL_KEY": box.read("/srv/key")})
        box.inside(lambda: stack.enter_context(client))
        client.wait_until_connected()
        until(lambda: re.search(r"web .* 127\.0\.0\.1:\d+ .*key, tls 1", box.do("list")), what="its peer in the list")
        visitor = stack.enter_context(box.inside(lambda: connect(("127.0.0.1", 8080))))
        with target.accept() as service:
            assert_connected(visitor, service)


def edit(box: ManagedBox) -> None:
    before = box.read(ENV)
    assert "SEMAPHORE_LIMIT: 'many'" in box.refuse("edit", "web", "--set", "SEMAPHORE_LIMIT=many")
    assert box.read(ENV) == before
    box.do("edit", "web", "--set", "SEMAPHORE_LIMIT=77", "--unset", "DATA_PORT", "--restart")
    assert 'SEMAPHORE_LIMIT="77"' in box.read(ENV)
    assert "DATA_PORT" not in box.read(ENV)
    assert box.systemctl("is-active", "nodepass@web.service").strip() == "active"
    said = box.do("logs", "web")
    assert "ok   server:10101: tunnel address 127.0.0.1:10101: can be listened on" in said
    assert "listening: tunnel 127.0.0.1:10101" in said


def check_as_another_user(box: ManagedBox) -> None:
    """Check that an instance's variables run nothing as root: whoever may edit them would be root, too."""
    box.write("/srv/evil/sitecustomize.py", "import os; print('running as', os.getuid())\n", 0o755)
    said = box.do("edit", "web", "--set", "PYTHONPATH=/srv/evil", "--set", "LD_PRELOAD=/srv/evil/no.so")
    assert "PYTHONPATH is not a setting of nodepass" in said
    assert "the key is not the output of nodepass --generate-key" in said  # it was read
    assert "fail" not in said
    assert "running as" not in said
    assert "no.so" not in said.replace("LD_PRELOAD=/srv/evil/no.so", "")
    box.do("edit", "web", "--unset", "PYTHONPATH", "--unset", "LD_PRELOAD")


def start_without_its_key(box: ManagedBox) -> None:
    """Check that an instance that was made with a key never runs without one."""
    key = box.read(KEY)
    (box.root / KEY[1:]).unlink()
    assert "tunnel-key" in box.refuse("restart", "web")
    assert box.systemctl("is-active", "nodepass@web.service", check=False).strip() in ("failed", "activating")
    box.write(KEY, key, 0o600)
    box.do("restart", "web")


def hand_over(box: ManagedBox, *installing: str) -> None:
    """Check that a handover starts the installed release, and that one is refused where settings have changed."""
    before = main_process(box)
    assert "has taken over" in box.do("update", *installing, "--handover")
    after = main_process(box)
    assert after != before
    assert "/lib/nodepass/3/" in box.run("cat", f"/proc/{after}/cmdline")  # the interpreter of the new release
    kept = box.read(ENV)
    box.do("edit", "web", "--set", "UDP_LANES=2", "--unset", "SEMAPHORE_LIMIT")
    assert "SEMAPHORE_LIMIT, UDP_LANES changed" in box.refuse("handover", "web")
    box.write(ENV, kept, 0o600)
    assert "has taken over" in box.do("handover", "web")


def main_process(box: ManagedBox) -> str:
    return box.systemctl("show", "nodepass@web.service", "--property", "MainPID", "--value").strip()


def stop_and_delete(box: ManagedBox) -> None:
    box.do("restart", "web")
    box.do("stop", "web")
    assert re.search(r"web +inactive +enabled", box.do("list"))
    box.do("start", "web")
    assert "Say --yes" in box.refuse("delete", "web")
    assert box.has(ENV)
    box.do("delete", "web", "--yes")
    assert not box.has(ENV)
    assert not box.has(KEY)
    assert "web" not in box.do("list")
    assert box.systemctl("is-active", "nodepass@web.service", check=False).strip() == "inactive"


def uninstall(box: ManagedBox) -> None:
    box.do("create", "kept", "--url", SERVER, "--no-start")
    box.do("uninstall", "--yes")
    for path in ("/usr/local/bin/nodepass", "/usr/local/lib/nodepass", UNIT):
        assert not box.has(path)
    assert box.has("/etc/nodepass/kept.env")
    box.do("uninstall", "--yes", "--purge")
    assert not box.has("/etc/nodepass")


def read_environment(box: ManagedBox, manager: ModuleType) -> None:
    """Check that systemd reads the same from an environment file as the manager."""
    values = {f"V{number}": value for number, value in enumerate(VALUES)}
    hand = "V50=a\\ b  \nV51='single $x \\n' # no comment\nV52=\"a\\nb\"c\n; a comment\nV53=one \\\n two\n"
    text = manager.change_environment(hand, values)
    box.write("/srv/some.env", text)
    shown = box.run("systemd-run", "--wait", "--pipe", "--quiet", "-p", "EnvironmentFile=/srv/some.env", "env", "-0")
    seen = dict(part.partition("=")[::2] for part in shown.split("\0") if part.startswith("V"))
    assert seen == manager.parse_environment(text)


@pytest.fixture(scope="module")
def manager() -> ModuleType:
    """The script as a module."""
    loader = importlib.machinery.SourceFileLoader("nodepass_manager", str(MANAGER))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = writes
    return module


def test_units_call_the_program_where_its_prefix_is(
    manager: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manager, "UNITS", tmp_path)
    manager.install_units(tmp_path / "no release", Path("/opt/tunnel"))
    assert "\nExecStart=/opt/tunnel/bin/nodepass" in (tmp_path / "nodepass@.service").read_text()
    assert manager.PREFIX.as_posix() not in (tmp_path / "nodepass@.service").read_text()


VALUES = [
    "",
    "plain",
    "two words",
    'a "quoted" one',
    "it's",
    "back\\slash",
    "a\\$b`c`",
    "$HOME ${X} %i %%",
    "?a=1&b=2;#c",
    "é",
]


@pytest.mark.parametrize("value", VALUES)
def test_what_is_written_is_read_back(manager: ModuleType, value: str) -> None:
    text = manager.change_environment("# kept\nA=old\nOTHER=1\n", {"A": value})
    assert text.startswith("# kept\nOTHER=1\n")
    assert manager.parse_environment(text) == {"A": value, "OTHER": "1"}


@pytest.mark.parametrize("line", ["no assignment", "=value", "1A=x"])
def test_a_line_that_is_no_assignment_is_refused(manager: ModuleType, line: str) -> None:
    with pytest.raises(manager.Problem, match="not a line of an environment file"):
        manager.parse_environment(line)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", "a b", "ü", "a" * 65, "a@b", "a%i"])
def test_names_that_no_unit_can_have_are_refused(manager: ModuleType, name: str) -> None:
    with pytest.raises(manager.Problem, match="the name is not usable"):
        manager.instance(name, exists=None)


@pytest.mark.parametrize("answer", ["", "n", "no", "yess"])
def test_before_it_deletes_it_asks_and_only_a_yes_is_one(
    manager: ModuleType, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    monkeypatch.setattr(manager.sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: answer)
    with pytest.raises(manager.Problem, match="nothing was changed"):
        manager.confirm("Delete?", yes=False)
    monkeypatch.setattr("builtins.input", lambda _: " Y ")
    manager.confirm("Delete?", yes=False)


def test_what_was_typed_into_the_editor_is_not_lost_where_it_is_not_usable(
    manager: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, seen, commands = tmp_path / "web.env", [], []
    path.write_text("NODEPASS_URL=old\n")

    def refuse_bad(_: str, text: str) -> None:
        seen.append(text)
        if "bad" in text:
            raise manager.Problem("a bad one")

    texts = iter(["NODEPASS_URL=bad\n", "NODEPASS_URL=good\n"])
    monkeypatch.setattr(manager, "INSTANCES", tmp_path)
    monkeypatch.setattr(manager, "UNITS", tmp_path)
    monkeypatch.setattr(manager, "validate", refuse_bad)
    monkeypatch.setattr(manager, "open_editor", lambda _: next(texts))
    monkeypatch.setattr(manager, "run", lambda *command, **_: commands.append(command) or 0)
    monkeypatch.setattr(manager.sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: "")
    manager.edit(manager.make_parser().parse_args(["edit", "web"]))
    assert seen == ["NODEPASS_URL=bad\n", "NODEPASS_URL=good\n"]
    assert path.read_text() == "NODEPASS_URL=good\n"
    assert {command[0] for command in commands} <= {"systemctl"}
    assert "a bad one" in capsys.readouterr().out


def test_an_environment_file_of_another_editor_is_read_and_written_without_its_mark_and_line_ends(
    manager: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "web.env"
    path.write_bytes("NODEPASS_URL=client://a:1/b:2 \r\nUDP_LANES=2\r\n".encode("utf-8-sig"))
    for name, value in {"INSTANCES": tmp_path, "UNITS": tmp_path, "run": lambda *_, **__: 0}.items():
        monkeypatch.setattr(manager, name, value)
    monkeypatch.setattr(manager, "validate", lambda *_: None)
    manager.edit(manager.make_parser().parse_args(["edit", "web", "--set", "WIRE=2"]))
    assert path.read_bytes() == b'NODEPASS_URL=client://a:1/b:2 \nUDP_LANES=2\nWIRE="2"\n'
    assert manager.parse_environment(path.read_text())["NODEPASS_URL"] == "client://a:1/b:2"


@pytest.mark.parametrize(
    ("urls", "data_port", "wanted", "lines"),
    [
        ("server://:10101/:8080?tls=1", "", False, []),
        ("server://:10101/:8080?tls=1", "", True, ["Stream=10101", "Stream=8080", "Datagram=8080"]),
        ("server://:10101/:443", "tunnel", False, ["Stream=10101", "Stream=443", "Datagram=443"]),
        ("server://:443/:8080", "10102", False, ["Stream=443", "Stream=8080", "Datagram=8080", "Stream=10102"]),
        (
            "server://0.0.0.0:10101/[::1]:80",
            "20000-20099",
            False,
            ["Stream=0.0.0.0:10101", "Stream=[::1]:80", "Datagram=[::1]:80"],
        ),
        ("server://[::1]:1/:0", "0", False, ["Stream=[::1]:1"]),
        ("server://:10101/:443?udp=off&data_port=99", "10102", False, ["Stream=10101", "Stream=443", "Stream=99"]),
        ("server://:10101/:443?tcp=off", "", False, ["Stream=10101", "Datagram=443"]),
        ("client://example.com:443/localhost:80", "", True, []),
        ("client://:443/:80 server://:10101/:81", "", False, ["Stream=10101", "Stream=81", "Datagram=81"]),
    ],
)
def test_a_socket_unit_opens_what_the_urls_name_where_that_is_needed_or_wanted(
    manager: ModuleType, urls: str, data_port: str, wanted: bool, lines: list[str]
) -> None:
    variables = {"NODEPASS_URL": urls, "DATA_PORT": data_port}
    assert manager.listen_lines(variables, wanted) == [f"Listen{line}" for line in lines]


@pytest.mark.parametrize(
    ("status", "shown"),
    [
        ("", "-"),
        ("client none, pool 0 idle of 16, 0 sessions, 0 flows, security: none", "none"),
        ("server:1: 0 flows, security: key, tls 1; server:2: 0 flows, security: key, tls 1", "key, tls 1"),
        (
            "stopping: server:1: 0 flows, security: none; client:2: 0 flows, security: key, tls 2 (TLS 1.3)",
            "none; key, tls 2 (TLS 1.3)",
        ),
    ],
)
def test_the_list_shows_what_protects_the_tunnels_of_an_instance(manager: ModuleType, status: str, shown: str) -> None:
    assert manager.security_of(status) == shown


def test_a_check_reads_the_keys_where_the_unit_will_find_them(
    manager: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(manager, "CREDENTIALS", tmp_path)
    own, kept = "/run/nodepass/web/tunnel-keys", tmp_path / "nodepass.web.tunnel-keys"
    assert manager.with_keys("web", {}) == {}
    assert manager.with_keys("web", {"TUNNEL_KEYS_FILE": own}) == {"TUNNEL_KEYS_FILE": str(kept)}
    kept.write_text("- key")
    assert manager.with_keys("web", {}) == {"TUNNEL_KEYS_FILE": str(kept)}
    assert manager.with_keys("other", {}) == {}
    for given in ({"TUNNEL_KEY": "x"}, {"TUNNEL_KEY_FILE": "/srv/key"}):
        assert manager.with_keys("web", given) == given


def test_a_secret_of_no_instance_is_not_replaced(
    manager: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(manager, "CREDENTIALS", tmp_path / "store")
    file = tmp_path / "mine"
    file.write_text("secret")
    made = manager.copy_credential("web", "tunnel-key", file, "key-file")
    assert (made.read_text(), made.stat().st_mode & 0o777) == ("secret", 0o600)
    with pytest.raises(manager.Problem, match="exists already"):
        manager.copy_credential("web", "tunnel-key", file, "key-file")
    file.write_bytes(b"\xff")
    with pytest.raises(manager.Problem, match="cannot be read"):
        manager.copy_credential("other", "tunnel-key", file, "key-file")


@pytest.mark.parametrize("place", ["home", "elsewhere"])
def test_an_interpreter_in_a_home_directory_is_refused(
    manager: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    link = tmp_path / "python"
    link.symlink_to(sys.executable)
    prefix = Path(sys.base_prefix).resolve()
    monkeypatch.setattr(manager, "HOMES", (prefix if place == "home" else tmp_path / "home",))
    if place == "home":
        with pytest.raises(manager.Problem, match="in a home directory, which the units cannot access"):
            manager.refuse_home(str(link))
    else:
        manager.refuse_home(str(link))


@pytest.mark.parametrize(
    ("status", "shown"),
    [
        ("", "-"),
        ("client none, pool 0 idle of 16, security: none", "none"),
        ("not connected to the server, security: key, tls 1", "not connected to the server"),
        ("server:1: client 192.0.2.1:5 (wire v2), pool; client:2: server a:1, x", "192.0.2.1:5 (wire v2); a:1"),
    ],
)
def test_the_list_shows_the_peers_of_an_instance(manager: ModuleType, status: str, shown: str) -> None:
    assert manager.peers_of(status) == shown


@pytest.mark.parametrize(
    ("url", "other"),
    [
        ("server://192.0.2.1:10101/:8080?tls=1&name=web", "'client://192.0.2.1:10101/127.0.0.1:80?name=web'"),
        ("server://192.0.2.1:1/:2?tls=2&crt=/a&key=/b", "'client://192.0.2.1:1/127.0.0.1:80?tls=2'"),
        ("client://a:10101,b:10101/127.0.0.1:80?name=x", "'server://:10101/:8080?name=x'"),
    ],
)
def test_the_command_for_the_other_end_fits_this_one(
    manager: ModuleType, capsys: pytest.CaptureFixture[str], url: str, other: str
) -> None:
    manager.show_other_end("web", url, has_key=True)
    assert f"    nodepass-manager create web --url {other} --key-file -\n" in capsys.readouterr().out


def test_a_name_where_systemd_takes_addresses_only_is_refused(manager: ModuleType) -> None:
    variables = {"NODEPASS_URL": "server://localhost:10101/localhost:443"}
    with pytest.raises(manager.Problem, match="need an address instead of 'localhost'"):
        manager.listen_lines(variables, False)


def test_a_value_with_a_newline_is_refused(manager: ModuleType) -> None:
    with pytest.raises(manager.Problem, match="printable"):
        manager.change_environment("", {"A": "1\nTUNNEL_KEY=2"})


def manage(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(MANAGER), *arguments]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)


def arguments(manager: ModuleType, *given: str) -> argparse.Namespace:
    parsed: argparse.Namespace = manager.make_parser().parse_args(["install", *given])
    return parsed


@pytest.mark.programs
def test_a_release_is_installed_from_locked_dependencies(manager: ModuleType, wheels: Path, tmp_path: Path) -> None:
    extras = "metrics"
    wheel = next(wheels.glob("nodepass-*.whl"))
    manager.make_release(tmp_path / "1", arguments(manager, "--wheel", str(wheel), "--extras", extras))
    python = tmp_path / "1/bin/python"
    frozen = subprocess.run([python, "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout
    installed = {re.sub(r"[-_.]+", "-", line.lower()) for line in frozen.splitlines() if "==" in line}
    lock = manager.read_lock(wheel, *manager.locks(wheel, extras))
    assert installed <= {re.sub(r"[-_.]+", "-", line.partition(" ")[0]) for line in lock.splitlines()}
    assert any(line.startswith("prometheus") for line in installed)


@pytest.mark.programs
def test_a_dependency_with_another_hash_is_refused(
    manager: ModuleType, wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = next(wheels.glob("nodepass-*.whl"))
    lock = re.sub(r"(sha256:)....", r"\g<1>0000", manager.read_lock(wheel, "base.txt"))
    monkeypatch.setattr(manager, "read_lock", lambda *_: lock)
    with pytest.raises(manager.Problem, match="failed with status"):
        manager.make_release(tmp_path / "1", arguments(manager, "--wheel", str(wheel)))
    assert not (tmp_path / "1/bin/nodepass").exists()


def test_a_wheel_without_locked_dependencies_is_refused(manager: ModuleType, tmp_path: Path) -> None:
    for wheel in (tmp_path, tmp_path / "no.whl"):
        with pytest.raises(manager.Problem, match="use --find-links"):
            manager.read_lock(wheel, "base.txt")


def test_without_a_terminal_and_a_command_it_says_so() -> None:
    done = manage()
    assert done.returncode == 2
    assert "no command given" in done.stderr


def test_every_command_has_its_help() -> None:
    listed = manage("--help").stdout
    for command in COMMANDS:
        assert re.search(rf"^ +{command}$|^ +{command} ", listed, re.MULTILINE)
    assert "--key-file" in manage("create", "--help").stdout


def test_the_menu_offers_every_command_and_leaves() -> None:
    reading, writing = pty.openpty()
    with open(reading, "r+b", buffering=0) as terminal:
        menu = subprocess.Popen([sys.executable, str(MANAGER)], stdin=writing, stdout=writing, stderr=writing)
        os.close(writing)
        terminal.write(b"list\nnonsense\nlogs\nno such\n99\nlogs\n\x04q\n")
        said = b""
        with contextlib.suppress(OSError):  # the other end has closed
            while data := terminal.read(4096):
                said += data
        assert menu.wait(20) == 0
    text = said.decode()
    assert text.count("16  logs") == 6
    assert "aborted" in text
    for choice in ("nonsense", "99"):
        assert f"{choice!r} is none of these; allowed: 1 to 16" in text
    assert "NAME" in text
    assert "instance 'no such': the name is not usable" in text

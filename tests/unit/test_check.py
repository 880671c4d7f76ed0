"""`nodepass --check` of settings, keys, certificates and addresses, called in this process."""

from __future__ import annotations

import io
import logging
import os
import re
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from nodepass.config.proxy_variables import ProxyVariables
from nodepass.config.settings import Settings
from nodepass.daemon import access_output
from nodepass.daemon.key_file import Keys, generate
from nodepass.tools import check, check_ports
from nodepass.tools.report import Report
from tests.support.certificates import DAY, Authority, Certificate
from tests.support.checks import check_here, found, trouble
from tests.support.sockets import format_address, free_port
from tests.support.table import each_row


def test_the_urls_of_the_environment_are_checked_as_well() -> None:
    done = check_here(NODEPASS_URL="server://127.0.0.1:0/127.0.0.1:0 server://127.0.0.1:0/127.0.0.1:0?tls=0")
    assert done.code == 0
    assert len(re.findall("can be listened on", done.output)) == 8
    assert len(re.findall("^warn server:0: security: none: anyone who reaches the tunnel port", done.output, re.M)) == 2


@each_row(
    ("url", "keyed", "level", "said"),
    [
        ("server://127.0.0.1:0/127.0.0.1:0", True, "ok", "security: key, tls 1$"),
        ("server://127.0.0.1:0/127.0.0.1:0?tls=1", False, "warn", "security: no key, tls 1: protects only against"),
        ("server://127.0.0.1:0/127.0.0.1:0?tls=0", True, "warn", "security: key, tls 0: without TLS, a man"),
        ("client://127.0.0.1:9/127.0.0.1:9", False, "warn", "security: no key, tls as the server says: the server's"),
        ("client://127.0.0.1:9/127.0.0.1:9?tls=0", False, "ok", "security: no key, tls as the server says: the server"),
        ("client://127.0.0.1:9/127.0.0.1:9?tls=2", False, "ok", "security: no key, tls 2 at least$"),
    ],
)
def test_what_protects_a_tunnel_is_told(url: str, keyed: bool, level: str, said: str) -> None:
    assert found(check_here(url, **({"TUNNEL_KEY": generate()} if keyed else {})), level, said)


def test_settings_of_a_url_are_checked_and_a_protocol_that_is_off_is_not_tried() -> None:
    done = check_here("server://127.0.0.1:0/127.0.0.1:0?udp=off&data_port=tunnel", UDP="on", DATA_PORT="0")
    assert done.code == 0
    assert re.findall(r"(tunnel address|data port|target address \(\w+\)) \S+: can be", done.output) == [
        "tunnel address",
        "target address (tcp)",
    ]
    done = check_here("client://127.0.0.1:9/127.0.0.1:9?tcp=off")
    assert found(done, "ok", "target 127.0.0.1:9: UDP only; not tried")


@each_row(
    ("arguments", "env", "said"),
    [
        (("server://127.0.0.1:0/127.0.0.1:0?tls=1&udp=off",), {"TCP": "off"}, "TCP and UDP are both off"),
        (
            ("server://127.0.0.1:0/127.0.0.1:0?tls=1",),
            {"TCP": "off", "UDP": "off"},
            "the settings of server:0: TCP and UDP are",
        ),
        (("server://127.0.0.1:0/127.0.0.1:0?tunnel_key_file=/none",), {}, "tunnel_key_file=/none: cannot be read"),
        (("clien://a:1/b:2",), {}, "the scheme must be"),
        (("server://127.0.0.1:0/127.0.0.1:0?tls=3",), {}, "tls='3' is not usable"),
        (("server://127.0.0.1:0/127.0.0.1:0?tls=1",), {"SEMAPHORE_LIMIT": "many"}, "SEMAPHORE_LIMIT: 'many'"),
        (("server://127.0.0.1:0/127.0.0.1:0?tls=1",), {"TUNNEL_KEY": ""}, "TUNNEL_KEY: the key is empty"),
        (("server://127.0.0.1:0/127.0.0.1:0?tls=1",), {"TUNNEL_KEY_FILE": "/none"}, "TUNNEL_KEY_FILE=/none: cannot"),
        (("server://127.0.0.1:0/127.0.0.1:0?tls=1",), {"TUNNEL_KEYS_FILE": "/none"}, "TUNNEL_KEYS_FILE=/none: cannot"),
        (("server://127.0.0.1:0/127.0.0.1:0?tls=1&wire=1",), {}, "wire=1 is not usable for server:0"),
        (("server://127.0.0.1:0/127.0.0.1:0?tls=1",), {"WIRE": "1"}, "WIRE=1 is not usable for server:0"),
        (("server://127.0.0.1:0/127.0.0.1:0?tls=2&crt=/none&key=/none",), {}, "crt=/none: cannot be read"),
    ],
)
def test_bad_input_is_one_failure_and_status_2(arguments: tuple[str, ...], env: dict[str, str], said: str) -> None:
    done = check_here(*arguments, **env)
    assert done.code == 2
    assert found(done, "fail", re.escape(said))
    assert len(trouble(done)) == 1


@pytest.mark.parametrize(
    ("directory", "code", "level", "said"),
    [
        ("", 0, "warn", "STATE_DIRECTORY is not set; expected if the unit's StateDirectory= sets it"),
        ("/proc", 2, "fail", "/proc is not a directory in which this user may write"),
        ("/none", 2, "fail", "/none is not a directory in which this user may write"),
        ("here", 0, "ok", "counted in "),
    ],
)
def test_a_traffic_limit_needs_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: str, code: int, level: str, said: str
) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: path != "/proc")  # root may write everywhere
    url = "server://127.0.0.1:0/127.0.0.1:0?tls=1&traffic_limit=1GB/day"
    env = {"STATE_DIRECTORY": str(tmp_path) if directory == "here" else directory} if directory else {}
    done = check_here(url, **env)
    assert done.code == code
    assert found(done, level, re.escape(f"TRAFFIC_LIMIT=1GB/day: {said}"))
    assert not list(tmp_path.iterdir())


def test_every_bad_url_is_told_at_once_and_a_newline_forges_no_line() -> None:
    done = check_here("first://", "second\nok   server:1: all is well")
    assert done.code == 2
    assert [line[:4] for line in trouble(done)] == ["fail", "fail"]
    assert not found(done, "ok", "all is well")


def test_two_urls_that_want_the_same_port_fail() -> None:
    port = free_port()
    done = check_here(*[f"server://127.0.0.1:0/127.0.0.1:{port}?tls=1"] * 2)
    assert done.code == 1
    assert found(done, "fail", f"target address .tcp. 127.0.0.1:{port}: in use by another address of this command")


def test_urls_that_cannot_run_in_one_process_are_bad_input() -> None:
    done = check_here(*["server://127.0.0.1:10101/127.0.0.1:0?tls=1"] * 2)
    assert (done.code, len(trouble(done))) == (2, 1)
    assert found(done, "fail", "url: .*have the same tunnel address and no name; allowed: different values of name=")


@pytest.mark.parametrize("data_port", ["tunnel", "0", "fixed"])
def test_tunnels_that_share_a_port_open_it_once(data_port: str) -> None:
    port, fixed = free_port(), free_port()
    urls = [f"server://127.0.0.1:{port}/127.0.0.1:0?tls=1&name={name}" for name in ("web", "ssh")]
    done = check_here(*urls, DATA_PORT=data_port if data_port != "fixed" else str(fixed))
    assert (done.code, trouble(done)) == (0, [])
    assert found(done, "ok", f"server:{port}/ssh: tunnel address 127.0.0.1:{port}: shared with server:{port}/web")


def test_a_keys_file_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"web {generate()}\nssh {generate()}\n")
    file.chmod(0o600)
    done = check_here("server://127.0.0.1:0/127.0.0.1:0?name=web", TUNNEL_KEYS_FILE=str(file))
    assert (done.code, trouble(done)) == (0, [])
    assert found(done, "ok", f"key: TUNNEL_KEYS_FILE={file}: of 2 tunnels")


def test_a_key_file_of_a_url_is_checked_and_what_is_weak_about_it_is_a_warning_of_its_tunnel(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(generate())
    file.chmod(0o644)
    done = check_here(f"server://127.0.0.1:0/127.0.0.1:0?tunnel_key_file={file}")
    assert done.code == 0
    assert found(done, "warn", f"server:0: server:0: tunnel_key_file={file}: readable by group or others")


@pytest.fixture
def _log_as_before() -> Iterator[None]:
    logger = logging.getLogger("nodepass")
    before = logger.handlers, logger.propagate, logger.level
    yield
    logger.handlers, logger.propagate = before[0], before[1]
    logger.setLevel(before[2])


@pytest.mark.usefixtures("_log_as_before")
@pytest.mark.parametrize("holders", [[], [check_ports.Holder(1, ["/lib/systemd/systemd"])]])
def test_a_port_held_by_systemd_or_by_an_unknown_process_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, holders: list[check_ports.Holder]
) -> None:
    monkeypatch.setattr(check_ports, "_with_sockets", lambda _: holders)
    output = io.StringIO()
    with socket.create_server(("127.0.0.1", 0)) as holder:
        url = f"server://{format_address(holder.getsockname())}/127.0.0.1:0?tls=1"
        assert check.run([url], Settings, Keys, ProxyVariables(), {}, output) == 0
    who = "by systemd" if holders else "by a process that cannot be seen"
    assert re.search(rf"^warn .*tunnel address .*: in use {who}", output.getvalue(), re.M)


def test_an_address_of_another_machine_fails() -> None:
    done = check_here("server://192.0.2.1:0/127.0.0.1:0?tls=1")
    assert done.code == 1
    assert found(done, "fail", "cannot listen on tunnel address 192.0.2.1:0: .*assign")


@pytest.mark.parametrize(
    ("days", "code", "level", "said"),
    [
        (90, 0, "ok", r"matches its key, valid for example.com, 192.0.2.7, (89\.9|90\.0) days left"),
        (13, 0, "warn", r"matches its key, .*(12\.9|13\.0) days left"),
        (-3, 1, "fail", r"expired 3\.0 days ago, clients reject it"),
    ],
)
def test_a_certificate_is_judged_by_its_days(tmp_path: Path, days: int, code: int, level: str, said: str) -> None:
    leaf = Authority(tmp_path).issue("example.com", "192.0.2.7", end=timedelta(days=days))
    leaf.key.chmod(0o600)
    done = check_here(server_with(leaf))
    assert done.code == code
    assert found(done, level, f"crt={leaf.crt}: {said}")
    assert len(trouble(done)) == (level != "ok")


def test_a_certificate_that_is_not_valid_yet_fails(tmp_path: Path) -> None:
    done = check_here(server_with(Authority(tmp_path).issue("example.com", start=DAY)))
    assert done.code == 1
    assert found(done, "fail", "not valid yet")


def test_a_certificate_and_a_key_that_do_not_match_are_bad_input(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    done = check_here(server_with(Certificate(authority.issue().crt, authority.issue().key)))
    assert done.code == 2
    assert found(done, "fail", "do not match")


def test_keys_that_others_can_read_are_warned_of(tmp_path: Path) -> None:
    leaf = Authority(tmp_path).issue()
    leaf.key.chmod(0o644)
    secret = tmp_path / "secret"
    secret.write_text(text := generate())
    secret.chmod(0o644)
    done = check_here(server_with(leaf), TUNNEL_KEY_FILE=str(secret))
    assert done.code == 0
    assert found(done, "warn", f"key={leaf.key}: mode 0644, readable by others")
    assert found(done, "warn", f"key: TUNNEL_KEY_FILE={secret}: readable by group or others")
    assert found(done, "ok", f"key: TUNNEL_KEY_FILE={secret}: one for all tunnels")
    assert text not in done.output


def server_with(leaf: Certificate) -> str:
    """The URL of a server with this certificate."""
    return f"server://127.0.0.1:0/127.0.0.1:0?tls=2&crt={leaf.crt}&key={leaf.key}"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("environ", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colours_are_for_terminals(environ: dict[str, str], coloured: bool) -> None:
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        Report(stream, environ).fail("server:1", "no")
    assert ("\x1b[" in terminal.getvalue()) is coloured
    assert pipe.getvalue() == "fail server:1: no\n"


URL = "server://127.0.0.1:0/127.0.0.1:0?tls=1"


def test_the_address_for_metrics_is_listened_on_too() -> None:
    done = check_here(URL, METRICS_LISTEN="127.0.0.1:0")
    assert (done.code, trouble(done)) == (0, [])
    assert found(done, "ok", "metrics: METRICS_LISTEN 127.0.0.1:0: can be listened on")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = check_here(URL, METRICS_LISTEN=f":{port}")
    assert done.code == 1
    assert found(done, "fail", rf"metrics: METRICS_LISTEN localhost:{port}: in use by ")


@pytest.mark.parametrize(
    ("place", "code", "level", "said"),
    [
        ("-", 0, "ok", "can be written to"),
        ("{}/new.log", 0, "ok", "can be written to"),
        ("{}/old.log", 0, "ok", "can be written to"),
        ("{}", 1, "fail", "it is a directory"),
        ("{}/read-only.log", 1, "fail", "this user cannot write to it"),
        ("{}/read-only/access.log", 1, "fail", "this user cannot make files in {}/read-only"),
        ("{}/none/access.log", 1, "fail", "there is no directory {}/none"),
        ("/var/log/none/access.log", 0, "warn", "there is no directory /var/log/none; expected if the unit"),
        ("unix:{}/socket", 0, "warn", "there is no reader; lines wait for it"),
        ("unix:{}/old.log", 0, "ok", "can be written to"),
    ],
)
def test_an_access_log_is_tried_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, code: int, level: str, said: str
) -> None:
    """Root may write everywhere, so what the kernel says about that is played."""
    (tmp_path / "old.log").touch()
    (tmp_path / "read-only.log").touch()
    (tmp_path / "read-only").mkdir()
    monkeypatch.setattr(access_output.os, "access", lambda path, _: "read-only" not in path)
    before = sorted(tmp_path.rglob("*"))
    place, said = place.format(tmp_path), said.format(tmp_path)
    done = check_here("server://127.0.0.1:0/127.0.0.1:0", TUNNEL_KEY=generate(), ACCESS_LOG=place)
    assert done.code == code
    assert found(done, level, re.escape(f"settings: ACCESS_LOG={place}: {said}"))
    assert len(trouble(done)) == (level != "ok")
    assert sorted(tmp_path.rglob("*")) == before

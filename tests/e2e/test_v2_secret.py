"""Where the key comes from, and that it is never shown: not in a log, an error or the process list."""

from __future__ import annotations

import contextlib
import re
import resource
import signal
from pathlib import Path

import pytest

from nodepass.daemon.key_file import generate
from tests.support.command import call
from tests.support.log import Entry
from tests.support.process import Nodepass, run
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, OurServer, Tunnel
from tests.support.wire2.client import V2Client
from tests.support.wire2.client_side import ClientSide
from tests.support.wire2.proofs import stretch

SECRET = generate()
KEYED = {**CALM, "TUNNEL_KEY": SECRET}


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """The key in a file that only its owner can read, with the line end that an editor leaves."""
    path = tmp_path / "tunnel-key"
    path.write_text(SECRET + "\n")
    path.chmod(0o600)
    return path


def assert_takes_the_key(env: dict[str, str]) -> list[Entry]:
    """Check that a server with this environment has the key; what it warns of in its settings."""
    with OurServer(env={**CALM, **env}) as server, V2Client(server.tunnel_address, secret=SECRET) as client:
        client.wait_until_full()
        return server.find("config.warning", level="warn")


@pytest.mark.programs
def test_the_key_comes_from_the_environment() -> None:
    assert_takes_the_key({"TUNNEL_KEY": SECRET})


@pytest.mark.programs
def test_each_tunnel_has_the_key_of_its_line(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"other {generate()}\n- {SECRET}\n")
    path.chmod(0o600)
    assert not assert_takes_the_key({"TUNNEL_KEYS_FILE": str(path)})


def test_the_key_comes_from_a_file(key_file: Path) -> None:
    assert not assert_takes_the_key({"TUNNEL_KEY_FILE": str(key_file)})


def test_the_key_comes_from_systemd(key_file: Path) -> None:
    assert not assert_takes_the_key({"CREDENTIALS_DIRECTORY": str(key_file.parent)})


@pytest.mark.programs
def test_a_credentials_directory_without_our_credential_means_no_key(tmp_path: Path) -> None:
    env = {**CALM, "CREDENTIALS_DIRECTORY": str(tmp_path)}
    with OurServer(env=env) as server, V2Client(server.tunnel_address) as client:
        client.wait_until_full()


@pytest.mark.programs
def test_a_key_file_that_others_can_read_is_warned_of(key_file: Path) -> None:
    key_file.chmod(0o644)
    (warning,) = assert_takes_the_key({"TUNNEL_KEY_FILE": str(key_file)})
    assert warning["reason"] == "key_readable"
    assert str(key_file) in warning["warning"]
    assert SECRET not in warning.line


@pytest.mark.programs
def test_generate_key_prints_a_fresh_key_that_can_be_used(tmp_path: Path) -> None:
    keys = [run("--generate-key") for _ in range(2)]
    assert [done.code for done in keys] == [0, 0]
    assert keys[0].output != keys[1].output
    for done in keys:
        assert re.fullmatch(r"[A-Za-z0-9_-]{43}\n", done.output)
        assert not done.errors
    path = tmp_path / "key"
    path.write_text(keys[0].output)
    path.chmod(0o600)
    with OurServer(env={**CALM, "TUNNEL_KEY_FILE": str(path)}) as server:
        with V2Client(server.tunnel_address, secret=keys[0].output.strip()) as client:
            client.wait_until_full()
        assert not server.find("config.warning")


@pytest.mark.programs
def test_a_key_that_was_not_generated_is_warned_of_at_both_ends(stack: contextlib.ExitStack) -> None:
    env = {**CALM, "TUNNEL_KEY": "correct horse battery staple"}
    server = stack.enter_context(OurServer(env=env))
    client = stack.enter_context(OurClient(server.tunnel_address, ("127.0.0.1", 9), env=env))
    for end in (server, client):
        end.wait_for("config.warning", level="warn", reason="key_not_generated")
        assert not any("horse" in line for line in end.lines)


def test_the_key_is_no_flag() -> None:
    output = call("--help").output
    assert "TUNNEL_KEY" in output
    assert not re.search(r"--tunnel-key(?!s?-file)", output)


def command_line(process: Nodepass) -> bytes:
    return Path(f"/proc/{process.pid}/cmdline").read_bytes()


def secrets_of(side: ClientSide) -> list[str]:
    """Everything that must stay between the two ends."""
    agreed = side.agreement
    return [SECRET, stretch(SECRET).hex(), agreed.session_key().hex(), agreed.client_proof(), agreed.server_proof()]


def test_neither_log_nor_dump_nor_process_list_shows_a_secret(stack: contextlib.ExitStack) -> None:
    target = stack.enter_context(Target())
    allow_core_dumps(stack)
    server = stack.enter_context(OurServer(1, env=KEYED))
    other = generate()
    with OurClient(server.tunnel_address, ("127.0.0.1", 9), env={**KEYED, "TUNNEL_KEY": other}) as wrong:
        wrong.wait_for("server.rejected", reason="key_mismatch")
        assert not any(other in line for line in wrong.lines)
    with ClientSide(server.tunnel_address, secret=SECRET, demand=1) as peer:
        peer.connect()
        hidden = secrets_of(peer)
        peer.open_data(prove=lambda *_: bytes(32))
        server.wait_for("data.rejected", reason="protocol")
    server.wait_for("client.disconnected")
    ours = stack.enter_context(OurClient(server.tunnel_address, target.address, env=KEYED))
    ours.wait_until_connected()
    Tunnel(server, ours, target).assert_works()
    for process in (server, ours):
        mark = process.mark()
        process.send(signal.SIGUSR1)
        process.wait_for("process.greenlets", after=mark, line=re.compile(r"\+--- <"))
        process.settled_descriptors(0.2)
        shown = "\n".join(process.lines) + command_line(process).decode()
        assert not [secret for secret in hidden if secret in shown]
        assert resource.prlimit(process.pid, resource.RLIMIT_CORE) == (0, 0), "a core dump would have the key"


def allow_core_dumps(stack: contextlib.ExitStack) -> None:
    """Let the processes that start from now on dump core, unless they forbid it themselves."""
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    stack.callback(resource.setrlimit, resource.RLIMIT_CORE, (soft, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))

"""How the program is installed: what starts it again, and the hint of a missing package names its environment."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nodepass import installed

MISSING = ModuleNotFoundError("No module named 'prometheus_client'", name="prometheus_client.core")


@pytest.fixture(autouse=True)
def _without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(installed.PROGRAM, raising=False)


@pytest.fixture
def prefix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "nodepass" / "1"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nodepass" / "1" / "bin" / "python"))
    return tmp_path / "nodepass" / "1"


@pytest.mark.parametrize(
    ("sign", "hint"),
    [
        ("", "install it with: {prefix}/bin/python -m pip install prometheus-client"),
        ("pipx_metadata.json", "install it with: pipx inject nodepass prometheus-client"),
        ("uv-receipt.toml", "install it with: uv pip install --python {prefix}/bin/python prometheus-client"),
        (
            "share/nodepass/systemd/nodepass-manager",
            "install it with: nodepass-manager update --extras metrics,top --wheel FILE",
        ),
    ],
)
def test_the_hint_is_for_the_environment_that_the_program_runs_in(prefix: Path, sign: str, hint: str) -> None:
    if sign:
        (prefix / sign).parent.mkdir(parents=True, exist_ok=True)
        (prefix / sign).touch()
    assert installed.how_to_add(MISSING) == hint.format(prefix=prefix)


def test_a_checkout_without_its_environment_says_what_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    root = Path(__file__).resolve().parents[2]
    assert installed.how_to_add(MISSING) == f"run this first: make -C {root} venv"


@pytest.mark.parametrize(
    ("place", "remedy"), [("/opt/nodepass", "reinstall the package nodepass"), ("/var/cache/x", "remove /var/cache/x")]
)
def test_a_bundle_that_lacks_a_module_is_damaged(monkeypatch: pytest.MonkeyPatch, place: str, remedy: str) -> None:
    be_a_bundle(monkeypatch)
    monkeypatch.setattr(sys, "prefix", place)
    assert installed.how_to_add(MISSING) == f"this installation is incomplete: {remedy}, then start it again"


def be_a_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "flags", SimpleNamespace(isolated=1))
    monkeypatch.setenv(installed.PROGRAM, "/usr/bin/nodepass")


def test_a_bundle_starts_again_by_the_path_it_was_started_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/opt/nodepass/lib/python3.11/nodepass/__main__.pyc", "--wire", "2", "server://"])
    be_a_bundle(monkeypatch)
    assert installed.command() == ["/usr/bin/nodepass", "--wire", "2", "server://"]


def test_an_installed_script_starts_again_by_its_link_so_that_an_upgrade_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script, link = tmp_path / "release", tmp_path / "nodepass"
    script.touch(mode=0o755)
    link.symlink_to(script)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["./nodepass", "server://"])
    assert installed.command() == [str(link), "server://"]


def test_a_module_starts_again_with_its_interpreter_and_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(Path(installed.__file__).with_name("__main__.py")), "server://"])
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-X", "dev", "-m", "nodepass", "server://"])
    assert installed.command() == [sys.executable, "-X", "dev", "-m", "nodepass", "server://"]

"""The entry point, before it imports the program."""

from __future__ import annotations

import sys

import pytest

from nodepass.__main__ import main


def test_another_system_than_linux_gets_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["nodepass", "--version"])
    monkeypatch.setattr(sys, "platform", "darwin")
    assert main() == 1
    assert capsys.readouterr() == ("", "nodepass: this system is darwin; allowed: linux\n")

"""What the command line makes of wrong settings, called in this process; tests/e2e starts the program for a few."""

from __future__ import annotations

import pytest

from nodepass import cli
from tests.support.wrong import WRONG, WrongSetting

URL = "client://127.0.0.1:9/127.0.0.1:9"
WRONG_SETTINGS = [
    WrongSetting(name, value, by_flag)
    for name, values in WRONG.items()
    for value in values
    for by_flag in (False, True)
]


@pytest.mark.parametrize("wrong", WRONG_SETTINGS, ids=str)
def test_a_wrong_value_is_refused_in_one_line(
    wrong: WrongSetting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "Daemon", None)  # who accepts a wrong value fails, and does not run for ever
    for name, value in wrong.environment.items():
        monkeypatch.setenv(name, value)
    code = cli.main([*wrong.arguments, URL])
    assert not wrong.complaints(code, capsys.readouterr().err)

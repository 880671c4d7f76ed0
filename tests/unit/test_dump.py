"""The file that lists the greenlets: for the process's user only, and never through a link."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import gevent
import pytest

from nodepass.config.settings import Settings
from nodepass.config.urls import parse_url
from nodepass.daemon.access_output import AccessOutputs
from nodepass.daemon.daemon import Daemon
from nodepass.daemon.dump import NAME, save
from nodepass.daemon.key_file import Keys
from nodepass.daemon.systemd import ServiceManager
from nodepass.stats import Stats
from tests.support.process import REPOSITORY, scrubbed
from tests.unit.records import recorded


def dump(directory: str) -> list[tuple[str, dict[str, object]]]:
    """What a process logs at SIGUSR1, but for the greenlets."""
    urls = [parse_url("server://127.0.0.1:1/127.0.0.1:2?tls=0")]
    daemon = Daemon(
        urls, Settings(), Keys(), ServiceManager(runtime_directory=directory), Stats(), AccessOutputs(Stats(), {})
    )
    with recorded() as records:
        daemon._dump()
    return [(each.event, each.fields) for each in records if each.event != "process.greenlets"]


def test_the_file_has_the_greenlets_and_the_last_line_names_it(tmp_path: Path) -> None:
    running = gevent.spawn(gevent.sleep, 60)
    gevent.sleep(0)
    old = os.umask(0)
    try:
        for _ in range(2):  # the second replaces the first
            events = dump(str(tmp_path))
    finally:
        os.umask(old)
        running.kill()
    path = tmp_path / NAME
    assert [event for event, _ in events] == ["tunnel.report", "process.bugs"]
    assert events[1][1]["path"] == str(path)
    assert events[1][1]["greenlets"] == len(re.findall(r"\+--- <(?!.*; finished)", path.read_text()))
    assert "gevent/hub.py" in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", [NAME, f"{NAME}.new"])
def test_a_link_in_the_way_is_replaced_and_not_followed(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("kept")
    (tmp_path / name).symlink_to(victim)
    dump(str(tmp_path))
    assert victim.read_text() == "kept"
    assert "+--- <" in (tmp_path / NAME).read_text()
    assert not (tmp_path / NAME).is_symlink()


def test_a_directory_that_cannot_be_written_is_named_and_the_log_has_the_list(tmp_path: Path) -> None:
    events = dump(str(tmp_path / "missing"))
    assert [event for event, _ in events] == ["tunnel.report", "process.dump_failed", "process.bugs"]
    assert events[2][1]["path"] == ""


def test_a_dump_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(IsADirectoryError):
        save(["line"], str(tmp_path))
    assert os.listdir(tmp_path) == [NAME]


def test_a_name_outside_the_locales_encoding_is_no_error(tmp_path: Path) -> None:
    """Nor is one that no encoding has, from a file name in a traceback."""
    code = "import sys; from nodepass.daemon.dump import save; save(['\\xe4 \\udcff'], sys.argv[1])"
    env = scrubbed({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, cwd=REPOSITORY, check=True)
    assert (tmp_path / NAME).read_text(encoding="utf-8") == "ä \\udcff\n"

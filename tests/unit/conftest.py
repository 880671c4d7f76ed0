"""Fixtures of tests that run the program's parts inside this process.

gevent is imported by the fixtures alone: this module is also loaded by the process that only deals out the tests, which
with gevent in it may crash at its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from tests.support.certificates import Authority

if TYPE_CHECKING:
    from tests.unit.resolver import Resolver


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Whatever a test enters here is left at its end, the last first; a test that hangs fails."""
    import gevent

    with ExitStack() as stack, gevent.Timeout(20):
        yield stack


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A certificate authority, which a test may have its clients trust."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    """Answers for names when the test says so."""
    from tests.unit.resolver import Resolver

    return Resolver(monkeypatch)

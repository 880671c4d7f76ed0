"""For every test: what a test of `make programs` needs, and hypothesis without deadlines."""

from __future__ import annotations

import pytest
from hypothesis import settings

from tests.support import needs

settings.register_profile("patient", deadline=None)  # how long an example takes is the machine's business
settings.load_profile("patient")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose `programs` mark names something that this machine does not have."""
    names = tuple(name for mark in item.iter_markers("programs") for name in mark.args)
    if reason := needs.missing(names):
        pytest.skip(reason)

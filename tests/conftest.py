"""For every test: what a test of `make programs` needs, and hypothesis without limits on time."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

from tests.support import needs

# How long an example takes, or its making, is the machine's business.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose `programs` mark names something that this machine does not have."""
    names = tuple(name for mark in item.iter_markers("programs") for name in mark.args)
    if reason := needs.missing(names):
        pytest.skip(reason)

"""For every test: what a test of `make programs` needs, hypothesis without limits on time, and a quiet collector."""

from __future__ import annotations

import gc
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, settings

from tests.support import needs

# How long an example takes, or its making, is the machine's business.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect no garbage among thousands of tests, which all stay: 1.3 of 4.9 s of CPU time in each worker."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose `programs` mark names something that this machine does not have."""
    names = tuple(name for mark in item.iter_markers("programs") for name in mark.args)
    if reason := needs.missing(names):
        pytest.skip(reason)

"""The fixtures and the logs beside a failure are those of the end-to-end tests."""

from tests.e2e.conftest import authority, pytest_runtest_makereport, pytest_runtest_setup, stack

__all__ = ["authority", "pytest_runtest_makereport", "pytest_runtest_setup", "stack"]

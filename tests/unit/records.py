"""What a test's own code logs, as records, whatever another test has done with the log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Keeper(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[Any] = []  # a record has the attributes that `Log` gives it

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def recorded(level: int = logging.DEBUG) -> Iterator[list[Any]]:
    """The records of this level and above, as they are logged."""
    logger, keeper = logging.getLogger("nodepass"), _Keeper()
    before = logger.handlers, logger.propagate, logger.level
    logger.handlers, logger.propagate = [keeper], False
    logger.setLevel(level)
    try:
        yield keeper.records
    finally:
        logger.handlers, logger.propagate = before[:2]
        logger.setLevel(before[2])

"""What the tests' context managers have in common: one way to end. Knows nothing of what it ends."""

from __future__ import annotations

from types import TracebackType
from typing import TypeVar

S = TypeVar("S", bound="Closes")


class Closes:
    """A context manager that ends by `close`, whether or not its block failed. By itself it has nothing to begin."""

    def close(self) -> None:
        """End it."""
        raise NotImplementedError

    def __enter__(self: S) -> S:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

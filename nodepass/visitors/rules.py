"""ALLOW and DENY: which addresses a tunnel serves.

DENY wins; an ALLOW list refuses all others. Networks stand in the setting or in a file, one a line. `reload` replaces
both lists together or, where a file cannot be used, neither. What happens to a refused visitor is decided by `policy`.

`daemon` makes the rules of a tunnel once. They outlive the tunnel, so that after a crash no file is read, and one that
has become unusable does not keep the tunnel down.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from nodepass.config.files import FileState, as_text, state_of
from nodepass.config.hostport import Network, parse_network
from nodepass.config.kinds import Rule
from nodepass.config.settings import Settings
from nodepass.errors import ConfigError, reason
from nodepass.visitors.network_set import NetworkSet

LARGEST = 64 << 20  # bytes of a file: a million networks and their comments
ALLOWED = "an address or a network such as 192.0.2.0/24 or 2001:db8::/32"


class Rules:
    """The rules of one tunnel."""

    def __init__(self, settings: Settings, place: str) -> None:
        """`place`: the tunnel, for errors. Reads the files. Raises ConfigError."""
        self._settings = settings
        self._place = place
        self.unusable: list[FileState] | None = None  # the files as they were, where the last reload could not use them
        self._allow, self._deny = self._load()

    @property
    def has_file(self) -> bool:
        """Whether a list stands in a file."""
        return bool(self._files)

    @property
    def file_states(self) -> list[FileState]:
        """Others where a file has changed in any way."""
        return [state_of(file) for file in self._files]

    @property
    def _files(self) -> list[str]:
        return [rule.file for rule in (self._settings.allow, self._settings.deny) if rule.file]

    def find_refusal(self, address: tuple[int, int]) -> str:
        """Why an address, as `hostport.parse_ip` returns it, is refused: denied, not_allowed, or ""."""
        if self._deny and address in self._deny:
            return "denied"
        return "not_allowed" if self._allow and address not in self._allow else ""

    def reload(self) -> ConfigError | None:
        """Read the files again, or return why the rules stay as they were.

        A list of 100,000 takes a quarter of a second, so this is called in a thread, where gevent prints exceptions.
        """
        states = self.file_states
        try:
            self._allow, self._deny = self._load()
        except ConfigError as error:
            self.unusable = states
            return error
        self.unusable = None
        return None

    def _load(self) -> tuple[NetworkSet | None, NetworkSet | None]:
        settings = self._settings
        return self._load_one("ALLOW", settings.allow), self._load_one("DENY", settings.deny)

    def _load_one(self, name: str, rule: Rule) -> NetworkSet | None:
        if not rule:
            return None
        return NetworkSet(_read(rule.file, f"{self._place}: {name}=@{rule.file}") if rule.file else rule.networks)


def _read(file: str, place: str) -> Iterator[Network]:
    """The networks of a file. A `#` begins a comment. Raises ConfigError."""
    for number, line in enumerate(_read_text(file, place).splitlines(), 1):
        if text := line.partition("#")[0].strip():
            try:
                yield parse_network(text)
            except ValueError as error:
                words = f"{text[:60]!r} is not usable: {error}; allowed: {ALLOWED}"
                raise ConfigError(f"{place}, line {number}: {words}") from None


def _open_now(file: str, flags: int) -> int:
    """Open a file; of a FIFO this does not wait for the writer."""
    return os.open(file, flags | os.O_NONBLOCK)


def _read_text(file: str, place: str) -> str:
    try:
        with open(file, "rb", opener=_open_now) as opened:
            status = os.fstat(opened.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"{place}: not a regular file")
            content = opened.read(min(status.st_size, LARGEST) + 1)
    except OSError as error:
        raise ConfigError(f"{place}: cannot be read: {reason(error)}") from None
    return as_text(content, place, LARGEST)

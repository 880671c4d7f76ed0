"""Settings with values that are not usable, and how the program has to take them."""

from __future__ import annotations

from dataclasses import dataclass

WRONG_COUNTS = ("", "many", "-1", "0", "99999999999999999999")
WRONG_DURATIONS = ("", "soon", "5", "-5s", "99999999999h")
WRONG_ADDRESSES = (
    "",
    "on",
    "localhost",
    "9464",
    "127.0.0.1:65536",
    "::1:9464",
    "[1]:9464",
    "unix:name",
    "unix:/" + 107 * "p",
)
WRONG_PORTS = ("", "any", "-1", "65536", "20099-20000", "20000-", "1-2-3")

WRONG: dict[str, tuple[str, ...]] = {
    "SEMAPHORE_LIMIT": WRONG_COUNTS,
    "MIN_POOL_CAPACITY": WRONG_COUNTS,
    "MAX_POOL_CAPACITY": WRONG_COUNTS,
    "UDP_DATA_BUF_SIZE": (*WRONG_COUNTS, "65536"),
    "UDP_READ_TIMEOUT": WRONG_DURATIONS,
    "REPORT_INTERVAL": (*WRONG_DURATIONS, "0s"),
    "RELOAD_INTERVAL": (*WRONG_DURATIONS, "0s"),
    "SERVICE_COOLDOWN": WRONG_DURATIONS,
    "SHUTDOWN_TIMEOUT": WRONG_DURATIONS,
    "HANDSHAKE_TIMEOUT": (*WRONG_DURATIONS, "0s"),
    "POOL_GET_TIMEOUT": WRONG_DURATIONS,
    "KEEPALIVE": (*WRONG_DURATIONS, "0s"),
    "IDLE_TIMEOUT": WRONG_DURATIONS,
    "FIRST_BYTE_TIMEOUT": WRONG_DURATIONS,
    "DATA_PORT": WRONG_PORTS,
    "METRICS_LISTEN": WRONG_ADDRESSES,
    "WIRE": ("", "0", "3", "v2"),
}


@dataclass(frozen=True)
class WrongSetting:
    """A setting with a wrong value, given by its variable or by its flag."""

    name: str
    value: str
    by_flag: bool

    @property
    def source(self) -> str:
        """How the user wrote it, and how the line must name it."""
        return "--" + self.name.lower().replace("_", "-") if self.by_flag else self.name

    @property
    def arguments(self) -> list[str]:
        """What is said of it on the command line."""
        return [f"{self.source}={self.value}"] if self.by_flag else []

    @property
    def environment(self) -> dict[str, str]:
        """What is said of it in the environment."""
        return {} if self.by_flag else {self.name: self.value}

    def complaints(self, code: object, errors: str) -> list[str]:
        """What is wrong with how the program took it, by its exit status and what it wrote."""
        found = [
            (code != 2, f"exit {code}"),
            (errors.count("\n") != 1 or not errors.endswith("\n"), "not one line"),
            ("Traceback" in errors, "a traceback"),
            (self.source not in errors, "does not name the source"),
            (self.value not in errors, "does not name the value"),
        ]
        return [f"{self}: {what}: {errors!r}" for wrong, what in found if wrong]

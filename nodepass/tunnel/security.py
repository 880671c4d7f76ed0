"""What protects a tunnel, in words: one vocabulary for the log, --check, the status, top, the metrics and the manager.

Pure functions of what the URL and the keys say, and, while the other end is connected, of the connection; `SecurityLog`
writes them to the log. A tunnel's `Security` is part of its `View`; whatever shows it calls `summarize`, `describe` or
`abbreviate`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

from nodepass.config.urls import ClientURL, ServerURL
from nodepass.log import Log

NONE = "none"
_KEY_ALONE = "without TLS, a man in the middle can read, alter and take over data connections"


@dataclass(frozen=True)
class Security:
    """What protects a tunnel, as one of its ends knows it."""

    role: str  # server or client
    name: str  # of the tunnel, "" without one
    has_key: bool
    demand: int  # the least TLS mode that this end accepts: a server's is its own
    tls: int | None  # the mode in use; None: a client that does not know its server's yet
    is_chosen: bool  # the URL says so, or it follows from the key: an operator need not be warned
    tls_version: str = ""  # of the control connection, TLSv1.3; "" in the clear or while not connected
    group: str = ""  # of its key exchange, X25519MLKEM768; "" where OpenSSL's binding cannot tell
    wire: int = 0  # 0 while not connected


class Qualifies(Protocol):
    """A control connection, which knows more of what protects its tunnel."""

    def qualify(self, security: Security) -> Security:
        """The same with what this connection makes known."""


def security_of(url: ServerURL | ClientURL, has_key: bool) -> Security:
    """What the URL, with its defaults, and the keys say of a tunnel that is not connected yet."""
    if isinstance(url, ServerURL):
        return Security("server", url.tunnel_name, has_key, url.tls, url.tls, has_key or url.is_tls_given)
    return Security("client", url.tunnel_name, has_key, url.demand, None, url.tls is not None)


def summarize(security: Security) -> str:
    """What there is: `key "web", tls 1 (TLS 1.3, X25519MLKEM768)`, or `none`."""
    if not security.has_key and security.tls == 0:
        return NONE
    name = f' "{security.name}"' if security.name else ""
    return f"{f'key{name}' if security.has_key else 'no key'}, {_tls(security)}"


def describe(security: Security) -> str:
    """The same, and behind a colon what it does not protect against."""
    weakness = find_weakness(security)
    return summarize(security) + (f": {weakness}" if weakness else "")


def find_weakness(security: Security) -> str:
    """What an attacker can do all the same; "" with a key and TLS, or with a verified server."""
    if security.role == "server":
        return _server_weakness(security)
    return _client_weakness(security)


def deserves_warning(security: Security) -> bool:
    """Whether the log warns of the weakness: one that was not chosen, or a key that does less than it seems to."""
    return bool(find_weakness(security)) and (security.has_key or not security.is_chosen)


def abbreviate(has_key: bool, tls: int | None) -> str:
    """A word or two for a table: `key tls1`, `tls2`, `key`, `none`, or `?` while the mode is not known."""
    mode = "?" if tls is None else f"tls{tls}" if tls else ""
    return " ".join(filter(None, ("key" if has_key else "", mode))) or NONE


class SecurityLog:
    """Says in a tunnel's log what protects it: at the start, and when a connection makes it known more exactly."""

    def __init__(self, security: Security, log: Log) -> None:
        self._security = security
        self._log = log
        self._said: set[str] = set()

    def of(self, control: Qualifies | None) -> Security:
        """What protects the tunnel, while it has this connection or none."""
        return control.qualify(self._security) if control else self._security

    def report(self, control: Qualifies | None) -> None:
        """Log that, unless the same has been logged before."""
        security = self.of(control)
        text = describe(security)
        if text in self._said:
            return
        self._said.add(text)
        self._log.log(
            logging.WARNING if deserves_warning(security) else logging.INFO,
            "tunnel.security",
            "security: %(security)s",
            security=text,
            name=security.name,
            key=security.has_key,
            tls=security.tls,
            tls_version=security.tls_version,
            group=security.group,
        )


def _tls(security: Security) -> str:
    if security.tls is None:
        return f"tls {security.demand} at least" if security.demand else "tls as the server says"
    details = ", ".join(filter(None, (security.tls_version.replace("TLSv", "TLS "), security.group)))
    if security.tls and security.wire == 1:
        details = "data connections only, wire v1"
    return f"tls {security.tls}" + (f" ({details})" if details else "")


def _server_weakness(security: Security) -> str:
    if security.has_key:
        return "" if security.tls else _KEY_ALONE
    open_to_all = "anyone who reaches the tunnel port can become the client"
    if not security.tls:
        return open_to_all
    if security.tls == 1:
        return f"protects only against passive eavesdropping, and {open_to_all}"
    return f"only clients with tls=2 in their URL are safe from a man in the middle, and {open_to_all}"


def _client_weakness(security: Security) -> str:
    if security.has_key:  # the mode is in the proof, so that one above 0 cannot have been changed
        return "" if security.tls or security.demand else _KEY_ALONE
    passive = "protects only against passive eavesdropping"
    if security.tls == 0:
        return "anyone on the path can be the server"
    if security.demand == 2:
        return _v1_weakness(security)
    if security.tls == 2:
        return f"the server's choice, so it {passive}; tls=2 in the client's URL insists on it"
    if security.demand == 1:
        return f"{passive}, and anyone on the path can be the server"
    return f"the server's choice, so it {passive} at most, and anyone on the path can be the server"


def _v1_weakness(security: Security) -> str:
    """Wire v1 has signals in the clear, whatever the data connections are."""
    if security.wire != 1:
        return ""
    return "signals are in the clear, so a man in the middle can cut sessions off and begin others"

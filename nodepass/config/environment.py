"""The environment variables: which of them are set, which are Kubernetes', and which look like a typo of a setting.

Nothing here says what a value means: that is the table in `config.settings`, and `key_file` for the keys. Called by
`cli` once, before anything else reads the environment, and by `check`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, MutableMapping

from nodepass.config.files import find_ca_trouble
from nodepass.config.settings import rows
from nodepass.errors import ConfigError, Notice

KEYS = ("TUNNEL_KEY", "TUNNEL_KEY_FILE", "TUNNEL_KEYS_FILE")
_SETTINGS = tuple(name.upper() for name in rows())
# An empty value means that it is not set, as from a template that has no value for it. Not KEYS: a key that has gone
# missing must not open the tunnel.
_MAY_BE_EMPTY = (*_SETTINGS, "NODEPASS_URL", "SSL_CERT_FILE", "SSL_CERT_DIR", "NO_COLOR")

_PREFIX = "NODEPASS_"  # others put their program's name before each variable
_LETTERS = 8  # of a name that others would hardly come near by chance
_LONG = 14  # characters of a name for which two slips are a typo, not one
# Of a service link, which Kubernetes sets for each service: FOO_SERVICE_HOST, FOO_PORT=tcp://…, FOO_PORT_80_TCP_ADDR.
_LINK = re.compile(r".+_SERVICE_(HOST|PORT(_.+)?)|.+_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?")
_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://")


def tidy(environ: MutableMapping[str, str]) -> None:
    """Remove the variables that are empty or blank and therefore not set, and the blanks around the others' values.

    `docker run --env-file` with a file from Windows leaves a carriage return at the end of each.
    """
    for name in _MAY_BE_EMPTY:
        if name not in environ:
            continue
        if value := environ[name].strip():
            environ[name] = value
        else:
            del environ[name]
    for name in (each for each in KEYS if each in environ):
        environ[name] = environ[name].strip()


def refuse_service_link(name: str, value: str, flag: str) -> None:
    """Raise ConfigError where a setting's variable was set by Kubernetes for a service that happens to fit its name."""
    if _is_link(name, value):
        service = name.removesuffix("_PORT").lower().replace("_", "-")
        raise ConfigError(
            f"{name}: {value!r} is not usable: Kubernetes has set it for a service named {service!r}; allowed:"
            f" enableServiceLinks: false in the pod, another name of the service, or the flag {flag}"
        )


def find_typos(environ: Mapping[str, str]) -> Iterator[Notice]:
    """The variables whose names nearly are those of this program, one notice each."""
    known = (*_SETTINGS, *KEYS, "NODEPASS_URL")
    for name in sorted(environ):
        if name in known or _is_link(name, environ[name]):
            continue
        near = {each: slips for each in known if (slips := _count_slips(name.upper(), each)) is not None}
        if near:
            meant = min(near, key=near.__getitem__)
            words = f"the variable {name} is not one of nodepass; did you mean {meant}?"
            yield Notice("unknown_variable", words)


def find_unusable_cas(environ: Mapping[str, str]) -> Iterator[Notice]:
    """A notice where SSL_CERT_FILE, which clients take CAs from, has none."""
    if trouble := find_ca_trouble(environ):
        yield Notice("no_cas", f"{trouble}; no server's certificate is trusted")


def _is_link(name: str, value: str) -> bool:
    return bool(_LINK.fullmatch(name) or (name.endswith("_PORT") and _LINK_VALUE.match(value)))


def _count_slips(name: str, known: str) -> int | None:
    """The slips of the pen between two names, or None where those are no typo."""
    if name == f"{_PREFIX}{known}":
        return 0
    if sum(map(str.isalpha, known)) < _LETTERS:
        return None
    limit = 2 if len(known) >= _LONG else 1
    slips = min(_distance(each, known, limit) for each in {name, name.removeprefix(_PREFIX)})
    return slips if slips <= limit else None


def _distance(one: str, other: str, limit: int) -> int:
    """How many characters to insert, drop, replace or swap with the next, to make one of the other; as far as limit."""
    if abs(len(one) - len(other)) > limit:  # most of an environment
        return limit + 1
    before, row = list[int](), list(range(len(other) + 1))
    for i, mine in enumerate(one, 1):
        older, before, row = before, row, [i]
        for j, theirs in enumerate(other, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (mine != theirs))
            if i > 1 and j > 1 and (mine, theirs) == (other[j - 2], one[i - 2]):
                cost = min(cost, older[j - 2] + 1)
            row.append(cost)
    return row[-1]

"""What users type: URLs, durations, counts, ports."""

from __future__ import annotations

import math
from urllib.parse import quote

from nodepass.config.kinds import AccessPlace, Listen, Ports, Quota, Rule, format_duration, parse_duration
from nodepass.config.settings import rows
from nodepass.config.urls import Address, ClientURL, Place, ServerURL, parse_url
from nodepass.errors import ConfigError
from tests.fuzz.scripted import assert_plain
from tests.fuzz.scripts import Script


def check_url(data: bytes) -> None:
    """A URL is refused in one line, or describes a tunnel that can be written as a URL again."""
    text = data.decode("utf-8", "surrogateescape")  # as Python has the command line
    try:
        url = parse_url(text)
    except ConfigError as error:
        assert_plain(error, 400 + 30 * len(text))
        return
    for address in (url.tunnel, *(each for each in url.targets if isinstance(each, Address))):
        assert 0 <= address.port <= 65535
        assert "\0" not in address.host
    if isinstance(url, ServerURL):
        assert url.tls in (0, 1, 2)
        assert (url.tls == 2) == bool(url.crt) == bool(url.key)
    try:
        again = parse_url(_written(url))
    except UnicodeEncodeError:
        return  # what is no UTF-8 can be typed as it is, and not with per cent signs
    assert {**vars(again), "warnings": ()} == {**vars(url), "warnings": ()}


def _written(url: ServerURL | ClientURL) -> str:
    given: dict[str, str | None] = {
        **dict(url.overrides),
        "log": url.log,
        "name": url.tunnel_name,
        "tunnel_key_file": url.tunnel_key_file,
    }
    if isinstance(url, ServerURL):
        scheme, tls = "server", url.tls if url.is_tls_given else None
        given.update(crt=url.crt, key=url.key)
    else:
        scheme, tls = "client", url.tls
    given["tls"] = None if tls is None else str(tls)
    query = "&".join(f"{name}={quote(value, '')}" for name, value in given.items() if value)
    return f"{scheme}://{_address(url.tunnel)}/{','.join(map(_place, url.targets))}?{query}"


def _place(place: Place) -> str:
    return _address(place) if isinstance(place, Address) else str(place)


def _address(address: Address) -> str:
    if ":" in address.host:
        return f"[{address.host.replace('%', '%25')}]:{address.port}"
    return f"{quote(address.host, '')}:{address.port}"


def check_setting(data: bytes) -> None:
    """A setting's text is refused as documented, by ValueError, or is a value within its bounds."""
    script = Script(data)
    table = list(rows().values())
    row = table[script.number() % len(table)]
    text = script.rest().decode("utf-8", "surrogateescape")
    try:
        value = row.kind.parse(text)
    except ValueError:
        return
    if isinstance(value, Ports):
        assert 0 <= value.first <= value.last <= 65535
    elif value is None or isinstance(value, Listen):
        assert value is None or value.path or 0 <= value.port <= 65535
    elif isinstance(value, Rule):
        assert not (value.networks and value.file)
        assert all(0 <= first <= last < 2 ** {4: 32, 6: 128}[version] for version, first, last in value.networks)
    elif isinstance(value, Quota):
        assert 0 <= value.most <= 1_000_000
        assert all(0 <= length <= 128 for length in value.prefixes)
    elif isinstance(value, AccessPlace):
        assert str(value) == text
    elif isinstance(value, str):
        assert value == text
        assert value in row.kind.allowed
    else:
        _check_number(value)


def _check_number(value: float) -> None:
    assert math.isfinite(value)
    assert value >= 0
    if isinstance(value, float):
        assert math.isclose(parse_duration(format_duration(value)), value, abs_tol=0.001, rel_tol=1e-5)

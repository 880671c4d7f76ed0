"""URLs and what they describe."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodepass.config.kinds import Ports
from nodepass.config.settings import Scope, Settings, rows
from nodepass.config.urls import Address, ClientURL, ServerURL, UnixPath, parse_url, with_defaults
from nodepass.errors import ConfigError
from tests.support.table import each_row


def test_a_server_url_says_everything() -> None:
    url = parse_url("server://0.0.0.0:10101/127.0.0.1:8080?log=debug&tls=2&crt=/a+b%20c.crt&key=k.pem&name=web&wire=2")
    tunnel, target = Address("0.0.0.0", 10101), Address("127.0.0.1", 8080)
    files = ("/a+b c.crt", "k.pem")
    assert url == ServerURL(
        tunnel, target, "debug", 2, *files, is_tls_given=True, tunnel_name="web", overrides=(("wire", "2"),)
    )
    assert url.name == "server:10101/web"


def test_a_client_url_has_defaults() -> None:
    url = parse_url("client://example.com:1/:65535")
    assert url == ClientURL(Address("example.com", 1), Address("", 65535), tls=None, tunnel_name="")
    assert url.name == "client:1"


def test_a_client_url_says_everything() -> None:
    url = parse_url("client://example.com:1/:65535?tls=2&wire=1&name=a.B_0-9&log=warn")
    tunnel, target = Address("example.com", 1), Address("", 65535)
    assert url == ClientURL(tunnel, target, "warn", tls=2, tunnel_name="a.B_0-9", overrides=(("wire", "1"),))
    assert url.name == "client:1/a.B_0-9"


def resolve(text: str, has_key: bool = False, wire: str = "auto") -> ServerURL | ClientURL:
    return with_defaults(parse_url(text), has_key, Settings(wire=wire))


@pytest.mark.parametrize(
    ("given", "without_key", "with_key"), [("", 0, 1), ("?tls=0", 0, 0), ("?tls=1", 1, 1)], ids=["nothing", "0", "1"]
)
def test_a_server_with_a_key_uses_tls_unless_its_url_says_otherwise(
    given: str, without_key: int, with_key: int
) -> None:
    assert [resolve(f"server://:1/:2{given}", has_key).tls for has_key in (False, True)] == [without_key, with_key]


@each_row(
    ("given", "without_key", "with_key", "quiet"),
    [("", 0, 1, False), ("?tls=0", 0, 0, True), ("?tls=1", 1, 1, False), ("?tls=2", 2, 2, False)],
)
def test_a_client_demands_what_its_url_says_and_tls_where_it_has_a_key(
    given: str, without_key: int, with_key: int, quiet: bool
) -> None:
    for has_key, demand in ((False, without_key), (True, with_key)):
        url = resolve(f"client://:1/:2{given}", has_key)
        assert isinstance(url, ClientURL)
        assert (url.demand, url.adopts_quietly) == (demand, quiet)


@each_row(
    ("kind", "given", "setting", "has_key", "expected"),
    [
        ("client", "", "auto", False, "auto"),
        ("client", "", "1", False, "1"),
        ("client", "?wire=2", "1", False, "2"),
        ("client", "?wire=auto", "2", False, "auto"),
        ("client", "", "auto", True, "2"),
        ("client", "?wire=auto", "auto", True, "2"),
        ("server", "", "auto", False, "auto"),
        ("server", "", "2", False, "2"),
        ("server", "?wire=auto", "1", False, "auto"),
        ("server", "", "auto", True, "2"),
    ],
)
def test_the_wire_is_that_of_the_url_then_of_the_setting_and_2_with_a_key(
    kind: str, given: str, setting: str, has_key: bool, expected: str
) -> None:
    assert resolve(f"{kind}://:1/:2{given}", has_key, setting).wire == expected


@each_row(
    ("text", "has_key", "wire"),
    [
        ("server://:1/:2", False, "1"),
        ("server://:1/:2?wire=1", False, "auto"),
        ("server://:1/:2", True, "1"),
        ("client://:1/:2", True, "1"),
        ("client://:1/:2?wire=1", True, "auto"),
    ],
)
def test_wire_1_is_for_clients_without_a_key(text: str, has_key: bool, wire: str) -> None:
    with pytest.raises(ConfigError, match=r"for (server|client):1.*; allowed: auto or 2"):
        resolve(text, has_key, wire)


@each_row("name", ["", "web", "a.B_0-9", 64 * "w", "--"])
def test_a_tunnel_has_a_name_or_none(name: str) -> None:
    for kind in ("server", "client"):
        assert parse_url(f"{kind}://:1/:2?name={name}").tunnel_name == name


@each_row(
    ("text", "host"), [("[::1]", "::1"), ("", ""), ("a.example", "a.example"), ("[fe80::1%25eth0]", "fe80::1%eth0")]
)
def test_hosts_may_be_ipv6_names_or_nothing(text: str, host: str) -> None:
    url = parse_url(f"server://{text}:1/{text}:2?tls=0")
    assert (url.tunnel, url.target) == (Address(host, 1), Address(host, 2))


@each_row(
    ("text", "word"),
    [
        ("", "scheme"),
        ("http://a:1/b:2", "scheme"),
        ("server:/a:1/b:2", "scheme"),
        ("server://a/b:2", "tunnel address"),
        ("server://a:1", "target address"),
        ("server://a:1/b", "target address"),
        ("server://a:70000/b:2", "tunnel address"),
        ("client://a:0/b:2", "tunnel address"),
        ("client://a:1/b:0", "target address"),
        ("server://::1:1/b:2", "tunnel address"),
        ("server://a:1/b:2/c", "target address"),
        ("server://[x:1/b:2", "URL"),
        ("server://a:1/b:2#f", "fragment"),
        ("server://a:1/b:2?log=loud", "debug, info"),
        ("server://a:1/b:2?tsl=1", "did you mean 'tls'"),
        ("server://a:1/b:2?Min-Pool-Capcity=1", "did you mean 'min_pool_capacity'"),
        ("server://a:1/b:2?udp_lanes=2&udp_lanes=2", "'udp_lanes' is given twice"),
        ("server://a:1/b:2?tunnel_keys_file=k", "tunnel_keys_file is for the whole process"),
        ("server://a:1/b:2?tunnel_key_file=", "allowed: a file"),
        ("server://a:1/b:2?tls=3", "0, 1, 2"),
        ("server://a:1/b:2?tls=2&key=k", "crt=FILE"),
        ("server://a:1/b:2?tls=2&crt=c", "key=FILE"),
        ("server://a:1/b:2?tls=1&crt=c", "tls=2 only"),
        ("server://a:1/b:2?tls=1&tls=1", "twice"),
        ("client://a:1/b:2?crt=c", "crt has no meaning on a client; allowed: on a server"),
        ("client://a:1/b:2?tls=3", "0, 1, 2"),
        ("client://a:1/b:2?wire=3", "auto or 1 or 2"),
        ("server://a:1/b:2?name=a%20b", "at most 64 of A-Z"),
        ("server://a:1/b:2?name=%C3%A4", "at most 64 of A-Z"),
        ("client://a:1/b:2?name=-", "not - alone"),
        (f"client://a:1/b:2?name={65 * 'w'}", "at most 64"),
    ],
)
def test_a_bad_url_is_refused_with_a_word_of_what_is_wrong(text: str, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_url(text)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["server://hunter2@a:1/b:2", "server://a:1/hunter2@b:2", "client://a:1/u:hunter2@b:2"])
def test_a_user_part_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="user part") as caught:
        parse_url(url)
    assert "hunter2" not in str(caught.value)


@each_row(
    "url",
    [
        "http://hunter2@a:1/b:2",
        "server:/hunter2@a:1/b:2",
        "client://:1/:2?key=hunter2",
        "server://:1/:2?key=hunter2",
        "server://:1/:2#tunnel_key=hunter2",
        *(
            f"server://:1/:2?{name}=hunter2"
            for name in ("tunnel%5Fkey", "tunnel.key", "amp;tunnel_key", "a=b;tunnel_key")
        ),
        *(f"server://:1/:2?log=loud&{name}=hunter2" for name in ("password", "secret", "Token", "psk", "NODEPASS_KEY")),
    ],
)
def test_no_error_repeats_what_was_meant_as_a_secret(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_url(url)
    assert "hunter2" not in str(caught.value)


# Not any character of Unicode: its tables take seconds to make.
@settings(max_examples=100)
@given(st.text("/:?&=#@[]%.,;+-_*~ab01\u00e9\u6f22\U0001f600\ud800\0\t\n ", max_size=60))
def test_any_text_is_a_url_or_a_clear_refusal(text: str) -> None:
    for url in (text, f"server://{text}", f"client://a:1/{text}", f"server://a:1/b:2?{text}"):
        with contextlib.suppress(ConfigError):
            parse_url(url)


def is_of_tunnels(name: str, scheme: str) -> bool:
    row = rows()[name]
    return row.scope is not Scope.PROCESS and row.role in ("", scheme)


@pytest.mark.parametrize("scheme", ["server", "client"])
def test_every_setting_stands_in_the_urls_it_has_a_meaning_for_and_in_no_other(scheme: str) -> None:
    for name, row in rows().items():
        text = f"{scheme}://:1/:2?{name}={row.default}"
        if is_of_tunnels(name, scheme):
            assert parse_url(text).overrides == ((name, row.default),)
            said = refusal(f"{scheme}://:1/:2?{name}=nonsense")
            assert re.match(rf"URL .*{name}='nonsense' is not usable; allowed: .", said), (name, said)
            assert said.endswith(row.kind.allowed)
            continue
        is_process_wide = row.scope is Scope.PROCESS
        why = "for the whole process" if is_process_wide else f"no meaning on a {scheme}; allowed: on a {row.role}"
        said = refusal(text)
        assert f"URL {text!r}: {name}" in said, (name, said)
        assert why in said, (name, said)


def refusal(url: str) -> str:
    """The error of a URL; none where it is taken."""
    try:
        parse_url(url)
    except ConfigError as error:
        return str(error)
    return ""


def test_settings_of_the_whole_process_are_these() -> None:
    assert {name for name, row in rows().items() if row.scope is Scope.PROCESS} == {
        "start_timeout",
        "shutdown_timeout",
        "shutdown_delay",
        "drain_timeout",
        "log_format",
        "metrics_listen",
    }


def test_a_setting_in_a_url_wins_and_is_for_its_tunnel_only() -> None:
    common = Settings(min_pool_capacity=3, udp_lanes=2)
    one, other = (parse_url(f"server://:1/:2{query}") for query in ("?min_pool_capacity=7&data_port=20000-20099", ""))
    assert one.settings(common) == Settings(min_pool_capacity=7, udp_lanes=2, data_port=Ports(20000, 20099))
    assert other.settings(common) == common


def test_settings_of_the_process_that_do_not_go_together_are_refused_unless_the_url_makes_them_fit() -> None:
    common = Settings.from_texts({"min_pool_capacity": ("--min", "2000"), "tcp": ("", "off"), "udp": ("", "off")})
    with_defaults(parse_url("server://:1/:2?max_pool_capacity=3000&tcp=on"), False, common)
    for fitting, words in (("tcp=on", "MIN_POOL_CAPACITY 2000 is above"), ("min_pool_capacity=2", "are both off")):
        with pytest.raises(ConfigError, match=f"^the settings of server:1: .*{words}"):
            with_defaults(parse_url(f"server://:1/:2?{fitting}"), False, common)


def test_settings_that_do_not_go_together_are_refused_where_a_url_causes_that() -> None:
    words = "the settings of server:1/a: MIN_POOL_CAPACITY 2000 is above MAX_POOL_CAPACITY 1024; allowed: at most"
    with pytest.raises(ConfigError, match=words):
        with_defaults(parse_url("server://:1/:2?name=a&min_pool_capacity=2000"), False, Settings())
    with_defaults(parse_url("server://:1/:2?min_pool_capacity=2000&max_pool_capacity=2000"), False, Settings())


@each_row("parameter", ["tunnel_key", "TUNNEL_KEY", "tunnel-key", "tunnelkey"])
@each_row("before", ["server://:1/:2?", "client://nowhere?log=loud&", "secret://@#?"])
def test_a_key_in_a_url_is_refused_and_never_repeated(parameter: str, before: str) -> None:
    with pytest.raises(ConfigError, match=r"every user of the machine.*allowed: tunnel_key_file=FILE") as caught:
        parse_url(f"{before}{parameter}=hunter2")
    assert "hunter2" not in str(caught.value)


def test_a_key_file_stands_in_a_url() -> None:
    assert parse_url("client://:1/:2?tunnel_key_file=/a%20b").tunnel_key_file == "/a b"


# Servers


def test_a_client_has_several_servers_and_a_server_has_one_tunnel_address() -> None:
    url = parse_url("client://A.example:1,[::1]:2,:3,10.1:4/:80,:81?name=web")
    assert url.tunnels == (Address("a.example", 1), Address("::1", 2), Address("", 3), Address("10.0.0.1", 4))
    assert url.tunnel_text == "a.example:1,[::1]:2,:3,10.0.0.1:4"
    assert (url.tunnel, url.name, len(url.targets)) == (Address("a.example", 1), "client:1/web", 2)
    assert parse_url(f"client://{url.tunnel_text}/:80,:81?name=web") == url
    assert parse_url("client://[::1]:1,[::1]:2/:80").tunnels == (Address("::1", 1), Address("::1", 2))
    assert parse_url("server://h:1/:2").tunnels == (Address("h", 1),)


@each_row(
    ("text", "why"),
    [
        ("client://a:1,b/:80", "the tunnel address 'b' is not usable: the port must be a number"),
        ("client://a:1,/:80", "the tunnel address '' is not usable"),
        ("client://,a:1/:80", "the tunnel address '' is not usable"),
        ("client://a:1,b:0/:80", "the port must be a number from 1"),
        ("client://a:1,A:1/:80", "the server a:1 is given twice"),
        ("client://a:1,me:hunter2@b:1/:80", "a user part is not allowed"),
        (
            "client://" + ",".join(f":{port}" for port in range(1, 18)) + "/:80",
            "it has 17 servers; allowed: at most 16",
        ),
        ("server://a:1,b:2/:80", "a server listens on one tunnel address, and 'a:1,b:2' has 2"),
        ("server://a:1/:80?servers=all", "servers has no meaning on a server"),
    ],
)
def test_servers_that_cannot_be_are_refused_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)) as caught:
        parse_url(text)
    assert "hunter2" not in str(caught.value)


# Targets


def test_a_client_has_several_targets_unix_sockets_among_them_and_a_server_has_one() -> None:
    url = parse_url("client://h:1/10.0.0.1:80,[::1]:81,:82,unix:/run/a%2Cb%20%25.sock?spread=round")
    assert url.targets == (Address("10.0.0.1", 80), Address("::1", 81), Address("", 82), UnixPath("/run/a,b %.sock"))
    assert url.target_text == "10.0.0.1:80,[::1]:81,:82,unix:/run/a%2Cb%20%25.sock"
    assert parse_url(f"client://h:1/{url.target_text}?spread=round") == url
    assert parse_url("server://h:1/unix:/run/app.sock").targets == (UnixPath("/run/app.sock"),)


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=25))
def test_every_path_can_be_written(path: str) -> None:
    place = UnixPath(f"/{path.rstrip('/')}x")
    assert not set(str(place)) & set(" ,?#@")
    assert parse_url(f"client://:1/{place},:2").targets == (place, Address("", 2))


@each_row(
    ("text", "why"),
    [
        ("client://h:1/a:1,b", "the target address 'b' is not usable: the port must be a number"),
        ("client://h:1/a:1,", "the target address '' is not usable"),
        ("client://h:1/a:1,A:1", "the target a:1 is given twice"),
        ("client://h:1/unix:app.sock", "allowed: unix:/PATH, an absolute path of at most 107 bytes"),
        ("client://h:1/unix:/run/", "the target address 'unix:/run/' is not usable"),
        ("client://h:1/:80,unix:/run/a@b", "a comma is %2C and an @ is %40"),
        ("client://h:1/unix:/run/a,me:hunter2@b:80", "a user part is not allowed"),
        ("client://h:1/app.sock", "or :PORT with a port from 1 to 65535, or unix:/PATH"),
        ("client://h:1/unix:/a%00", "the target address 'unix:/a%00' is not usable"),
        ("client://h:1/unix:/" + 107 * "a", "of at most 107 bytes"),
        ("client://h:1/" + ",".join(f":{port}" for port in range(1, 66)), "it has 65 targets; allowed: at most 64"),
        ("server://h:1/a:1,b:2", "a server listens on one target address"),
    ],
)
def test_targets_that_cannot_be_are_refused_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)):
        parse_url(text)


@each_row(
    ("text", "allowed"),
    [
        ("client://h:1/unix:/a", "udp=off, or a HOST:PORT among the targets"),
        ("server://h:1/unix:/a", "udp=off"),
        ("client://h:1/unix:/a?udp=off", ""),
        ("server://h:1/unix:/a?udp=off", ""),
        ("client://h:1/unix:/a,b:2", ""),
    ],
)
def test_udp_needs_a_target_that_is_no_unix_socket(text: str, allowed: str) -> None:
    if not allowed:
        resolve(text)
        return
    with pytest.raises(ConfigError, match=f"a Unix socket carries no datagrams; allowed: {allowed}$"):
        resolve(text)

"""Which proxy a client's server is reached through, and where its user and password may stand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nodepass.config.outbound import Credentials, Login, Proxy, ProxyChoice, Source, parse_proxy, parse_source
from nodepass.config.proxy_variables import ProxyVariables, find_exposed, with_passages
from nodepass.config.settings import Settings
from nodepass.config.urls import ClientURL, parse_url
from nodepass.errors import ConfigError

USER, PASSWORD = "joe", "open:sesame"
PAIR = "joe:open%3Asesame"
SERVER = "server.example.com"


def client(server: str = SERVER, **parameters: str) -> ClientURL:
    query = "&".join(f"{name}={value}" for name, value in parameters.items())
    url = parse_url(f"client://{server}:10101/:80?{query}")
    assert isinstance(url, ClientURL)
    return url


def found(environ: dict[str, str], server: str = SERVER, proxy: str = "env") -> str:
    """The proxy for a server, "" without; the user and password in front of it."""
    settings = Settings(tunnel_proxy=parse_proxy(proxy))
    url = with_passages(client(server), settings, ProxyVariables.take(environ))
    [passage] = getattr(url, "passages", {}).values() or [None]
    if not passage:
        return ""
    login = passage.login.credentials()
    return f"{login.user}:{login.password}@{passage.proxy}" if login else str(passage.proxy)


@pytest.mark.parametrize(
    ("text", "proxy"),
    [
        ("http://proxy:3128", Proxy("http", "proxy", 3128)),
        ("HTTPS://Proxy.Example:443/", Proxy("https", "proxy.example", 443)),
        ("socks5h://[2001:db8::1]:1080", Proxy("socks5h", "2001:db8::1", 1080)),
    ],
)
def test_a_proxy_is_a_scheme_a_host_and_a_port(text: str, proxy: Proxy) -> None:
    assert parse_proxy(text) == ProxyChoice(proxy)
    assert parse_proxy(str(proxy)) == ProxyChoice(proxy)


@pytest.mark.parametrize(
    "text",
    ["", "proxy:3128", "http://proxy", "http://:3128", "http://u@p:1", "socks5://p:1", "http://p:1/x", "http://p:0"],
)
def test_what_is_no_proxy_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # the text is not shown
        parse_proxy(text)


@pytest.mark.parametrize(
    "text", [f"http://{PAIR}@proxy:3128", f"{PAIR}@proxy:3128", f"http://{USER}:a/b?c{PASSWORD}@proxy:3128"]
)
def test_a_user_in_a_flag_or_url_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Settings.from_texts({"tunnel_proxy": ("--tunnel-proxy", text)})
    with pytest.raises(ConfigError) as also:
        client(tunnel_proxy=text)
    for error in (refused, also):
        assert "TUNNEL_PROXY_AUTH_FILE" in str(error.value)
        assert not [word for word in (USER, "sesame") if word in str(error.value)]


def test_the_variables_of_other_programs_count_in_their_usual_order() -> None:
    both = {"HTTPS_PROXY": "http://one:1", "ALL_PROXY": "socks5h://two:2"}
    assert found(both) == "http://one:1"
    assert found({**both, "https_proxy": "https://three"}) == "https://three:443"
    assert found({"ALL_PROXY": "socks5://two"}) == "socks5h://two:1080"
    assert found({"all_proxy": "proxy:3128"}) == "http://proxy:3128"
    assert found({"HTTPS_PROXY": "http://[::1]/"}) == "http://[::1]:80"
    assert found({"HTTP_PROXY": "http://one:1", "HTTPS_PROXY": " "}) == ""


@pytest.mark.parametrize(
    ("rules", "server", "is_exempt"),
    [
        ("*", SERVER, True),
        ("example.com", SERVER, True),
        (".example.com", SERVER, True),
        ("*.Example.com", SERVER, True),
        ("other.org, example.com.", SERVER, True),
        ("le.com", SERVER, False),
        ("server.example.com:10101", SERVER, True),
        ("server.example.com:443", SERVER, False),
        ("192.0.2.0/24", "192.0.2.7", True),
        ("192.0.2.7", "192.0.2.7", True),
        ("192.0.2.7:10101", "192.0.2.7", True),
        ("2.7", "192.0.2.7", False),
        ("192.0.2.0/24", "198.51.100.7", False),
        ("2001:db8::/32", "[2001:db8::1]", True),
        ("[2001:db8::1]", "[2001:db8::1]", True),
        ("bad rule,,/", SERVER, False),
        ("", "127.0.0.1", True),
        ("", "localhost", True),
        ("", "", True),
        ("", SERVER, False),
    ],
)
def test_no_proxy_and_this_machine_are_reached_directly(rules: str, server: str, is_exempt: bool) -> None:
    assert found({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": rules}, server) == (
        "" if is_exempt else "http://proxy:3128"
    )


def test_a_proxy_of_a_setting_is_used_for_every_server() -> None:
    assert found({"NO_PROXY": "*"}, "localhost", "http://proxy:3128") == "http://proxy:3128"
    assert found({"HTTPS_PROXY": "http://proxy:3128"}, proxy="off") == ""


def test_a_user_and_password_of_the_environment_are_for_their_proxy_only() -> None:
    environ = {"TUNNEL_PROXY": f"http://{PAIR}@proxy:3128"}
    variables = ProxyVariables.take(environ)
    assert environ == {"TUNNEL_PROXY": "http://proxy:3128"}
    assert "sesame" not in repr(variables)
    fresh = {"TUNNEL_PROXY": f"http://{PAIR}@proxy:3128"}
    assert found(dict(fresh), proxy="http://proxy:3128") == f"{USER}:{PASSWORD}@http://proxy:3128"
    assert found(dict(fresh), proxy="http://other:3128") == "http://other:3128"
    shouting = {"TUNNEL_PROXY": f"HTTP://{PAIR}@Proxy:3128/"}
    assert found(shouting, proxy="http://proxy:3128") == f"{USER}:{PASSWORD}@http://proxy:3128"
    assert found({"HTTPS_PROXY": f"https://{PAIR}@proxy"}) == f"{USER}:{PASSWORD}@https://proxy:443"


@pytest.mark.parametrize(
    "text",
    [
        f"gopher://{PAIR}@proxy:70",
        f"http://{PAIR}@proxy:x",
        f"http://a%3Ab:{PASSWORD}@p",
        f"http://jo\udcff:{PASSWORD}@proxy",  # a byte that is not UTF-8, as Python has it
    ],
)
def test_an_unusable_variable_is_refused_without_what_is_secret_in_it(text: str) -> None:
    with pytest.raises(ConfigError, match="HTTPS_PROXY: ") as refused:
        found({"HTTPS_PROXY": text})
    assert "sesame" not in str(refused.value)
    assert found({"HTTPS_PROXY": text}, proxy="off") == "", "what is not used does no harm"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "proxy"
    path.write_text(f"{USER}:{PASSWORD}\n")
    path.chmod(0o600)
    return path


def test_the_file_counts_before_the_environment_and_is_read_again(file: Path) -> None:
    settings = Settings(tunnel_proxy=ProxyChoice(is_environment=True), tunnel_proxy_auth_file=str(file))
    variables = ProxyVariables.take({"HTTPS_PROXY": "http://other:word@proxy:3128"})
    url = with_passages(client(), settings, variables)
    assert isinstance(url, ClientURL)
    [passage] = url.passages.values()
    assert passage.login.credentials() == Credentials(USER, PASSWORD)
    assert list(find_exposed([url])) == []
    file.write_text("joe:changed")
    assert passage.login.credentials() == Credentials(USER, "changed")
    file.chmod(0o640)
    passage.login.credentials()
    [notice] = find_exposed([url])
    assert "chmod 600" in notice.words
    assert "sesame" not in repr(url)
    assert "changed" not in repr(url)


@pytest.mark.parametrize("content", ["", "joe", ":word", "joe:wo\x00rd", "joe:one\nann:two\n", f"joe:{'x' * 256}"])
def test_a_file_without_a_user_and_password_is_refused_and_not_repeated(file: Path, content: str) -> None:
    file.write_text(content)
    with pytest.raises(ConfigError, match=f"TUNNEL_PROXY_AUTH_FILE={file}: ") as refused:
        Login(str(file)).credentials()
    assert "joe" not in str(refused.value)


def test_a_file_that_others_can_change_is_refused(file: Path) -> None:
    file.chmod(0o622)
    with pytest.raises(ConfigError, match="others can change it"):
        Login(str(file)).credentials()


def test_a_proxy_and_all_addresses_of_a_name_exclude_each_other() -> None:
    settings = replace(Settings(), servers="all", tunnel_proxy=parse_proxy("env"))
    with pytest.raises(ConfigError, match="SERVERS=all and TUNNEL_PROXY=env are set together"):
        settings.for_tunnel((), "x")


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("off", Source()),
        ("192.0.2.7", Source("192.0.2.7")),
        ("::ffff:192.0.2.7", Source("192.0.2.7")),
        ("2001:DB8::1", Source("2001:db8::1")),
        ("dev:wg0", Source(interface="wg0")),
    ],
)
def test_a_source_is_an_address_or_an_interface(text: str, source: Source) -> None:
    assert parse_source(text) == source
    assert parse_source(str(source)) == source


@pytest.mark.parametrize(
    "text", ["eth0", "dev:", "dev:a b", "dev:..", f"dev:{'x' * 16}", "0.0.0.0", "::", "fe80::1%eth0"]
)
def test_what_is_no_source_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # the text is not shown
        parse_source(text)

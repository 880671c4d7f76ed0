"""Variables that are empty, set by Kubernetes, or misspelt."""

from __future__ import annotations

import pytest

from nodepass.config.environment import KEYS, find_typos, tidy
from nodepass.config.settings import rows
from tests.support.checks import check_here, found
from tests.support.command import Accepted, call, refusals
from tests.support.table import each_row

CLIENT = "client://127.0.0.1:9/127.0.0.1:9?tls=0"
LINKS = {  # of services called data, date, log-format and nodepass
    "DATA_SERVICE_HOST": "10.0.0.1",
    "DATA_SERVICE_PORT": "80",
    "DATA_SERVICE_PORT_HTTP": "80",
    "DATA_PORT_80_TCP": "tcp://10.0.0.1:80",
    "DATA_PORT_80_TCP_PROTO": "tcp",
    "DATA_PORT_80_TCP_PORT": "80",
    "DATA_PORT_80_TCP_ADDR": "10.0.0.1",
    "DATE_PORT": "tcp://10.0.0.2:53",
    "DATE_PORT_53_UDP_ADDR": "10.0.0.2",
    "LOG_FORMAT_PORT": "tcp://10.0.0.3:1",
    "NODEPASS_PORT": "udp://10.0.0.4:1",
    "NODEPASS_DATA_PORT": "tcp://10.0.0.5:1",
}


def test_an_empty_or_blank_variable_is_not_set() -> None:
    for name in (*rows(), "nodepass_url", "ssl_cert_file", "ssl_cert_dir", "no_color"):
        for blank in ("", " ", "\r\n"):
            environ = {name.upper(): blank, "OTHER": ""}
            tidy(environ)
            assert environ == {"OTHER": ""}


def test_the_blanks_around_a_value_are_no_part_of_it() -> None:
    for name in (*rows(), "nodepass_url", "ssl_cert_file", *map(str.lower, KEYS)):
        environ = {name.upper(): " x\r\n", "OTHER": " y\r"}
        tidy(environ)
        assert environ == {name.upper(): "x", "OTHER": " y\r"}


def test_settings_from_a_template_without_values_are_those_of_no_variables() -> None:
    with pytest.raises(Accepted):
        call(CLIENT, env={name.upper(): "" for name in rows()})
    assert "NODEPASS_URL is not set" in call(env={"NODEPASS_URL": ""}).errors


def test_an_empty_flag_stays_an_error() -> None:
    assert not refusals(call("--udp-lanes=", CLIENT), "--udp-lanes", "''", "allowed")


@each_row("variable", KEYS)
@each_row("value", ["", " \t"])
def test_an_empty_key_is_refused_and_never_taken_for_no_key(variable: str, value: str) -> None:
    assert not refusals(call(CLIENT, env={variable: value}), f"{variable}: the ", "is empty; allowed: ")


@each_row(
    ("written", "meant"),
    [
        ("MIN_POOL_CAPCITY", "MIN_POOL_CAPACITY"),
        ("MAX_POOL_CAPASITYY", "MAX_POOL_CAPACITY"),
        ("SEMAPHORE_LIMITS", "SEMAPHORE_LIMIT"),
        ("DATA_PROT", "DATA_PORT"),
        ("DATAPORT", "DATA_PORT"),
        ("DATA_PORTS", "DATA_PORT"),
        ("data_port", "DATA_PORT"),
        ("LOGFORMAT", "LOG_FORMAT"),
        ("TUNNEL_KEYS", "TUNNEL_KEY"),
        ("TUNNEL_KEYFILE", "TUNNEL_KEY_FILE"),
        ("TUNNEL_KEYS_FIL", "TUNNEL_KEYS_FILE"),
        ("NODEPASS_URLS", "NODEPASS_URL"),
        ("NODEPASS_DATA_PORT", "DATA_PORT"),
        ("NODEPASS_UDP", "UDP"),
        ("NODEPASS_MIN_POOL_CAPACTIY", "MIN_POOL_CAPACITY"),
    ],
)
def test_a_variable_that_is_nearly_a_setting_is_asked_about_once(written: str, meant: str) -> None:
    (notice,) = find_typos({written: "1", "PATH": "/bin"})
    assert notice.reason == "unknown_variable"
    assert notice.words == f"the variable {written} is not one of nodepass; did you mean {meant}?"


def test_no_other_variable_is_asked_about() -> None:
    known = [*(name.upper() for name in rows()), *KEYS, "NODEPASS_URL"]
    others = ["TLS", "UDPS", "TCPS", "WIRES", "DATA_PATH", "DATA_HOST", "DATABASE_PORT", "META_PORT", "LOG_LEVEL"]
    system = ["NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "SSL_CERT_FILE", "SSL_CERT_DIR", "CREDENTIALS_DIRECTORY"]
    assert not list(find_typos(dict.fromkeys([*known, *others, *system], "1")))


def test_service_links_of_kubernetes_are_no_typos() -> None:
    assert not list(find_typos(LINKS))
    assert list(find_typos({"DATE_PORT": "8080"}))


def test_a_service_link_that_has_a_settings_name_is_refused_with_what_it_is() -> None:
    env = {"DATA_PORT": "tcp://10.0.0.1:80"}
    parts = ("DATA_PORT", "Kubernetes", "a service named 'data'", "enableServiceLinks: false", "--data-port")
    assert not refusals(call(CLIENT, env=env), *parts)
    with pytest.raises(Accepted):
        call("--data-port=tunnel", CLIENT, env=env)


def test_the_check_asks_about_a_misspelt_variable() -> None:
    assert found(check_here(CLIENT, MIN_POOL_CAPCITY="3"), "warn", "settings: .* did you mean MIN_POOL_CAPACITY")


@pytest.mark.parametrize(
    ("written", "meant"),
    [("--min-pool-capazity=16", "--min-pool-capacity"), ("--udp_lanes", "--udp-lanes"), ("--chek", "--check")],
)
def test_an_unknown_flag_is_answered_with_what_was_meant(written: str, meant: str) -> None:
    assert not refusals(call(written, CLIENT), written, f"did you mean {meant}?")

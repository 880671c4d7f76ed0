"""The dashboard, the alerts and the document speak of metrics that are there, checked against a real scrape."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nodepass.metrics.families import FAMILIES
from nodepass.stats import CONTROL_FAILURES, DATA_FAILURES, TCP_OUTCOMES, TROUBLE, UDP_DROPS, UDP_OUTCOMES
from tests.support.certificates import Authority
from tests.support.scrape import WATCHED, Sample, get, metrics_of, parse, value
from tests.support.sockets import until
from tests.support.target import Target
from tests.support.tunnel import OurClient, OurServer, Tunnel

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "contrib" / "grafana" / "nodepass.json"
PROMETHEUS = ROOT / "contrib" / "prometheus"
DOCUMENT = ROOT / "docs" / "metrics.md"
TARGET_LABELS = {"instance", "job"}
"""Labels that Prometheus adds to what it scrapes."""

METERED = "rate_up=100M&rate_down=100M&traffic_limit=1TB/day"

promtool = pytest.mark.programs("promtool")


@pytest.fixture(scope="module")
def texts(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """A scrape of either end of a tunnel that has been used."""
    metered = {**WATCHED, "STATE_DIRECTORY": str(tmp_path_factory.mktemp("state"))}
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(Target())
        server = stack.enter_context(OurServer(1, authority.local, query=METERED, env=metered))
        client = stack.enter_context(OurClient(server.tunnel_address, target.address, env=WATCHED))
        client.wait_until_connected()
        tunnel = Tunnel(server, client, target)
        tunnel.assert_works()
        tunnel.exchange(b"question", b"the answer")
        until(lambda: "nodepass_round_trip_seconds{" in get(metrics_of(server)).body, what="a round trip")
        until(lambda: value(metrics_of(server), "nodepass_first_byte_seconds_count") == 1, what="a session")
        yield [get(metrics_of(run)).body for run in (server, client)]


@pytest.fixture(scope="module")
def samples(texts: list[str]) -> dict[str, list[Sample]]:
    """The samples of both ends, by name."""
    by_name = defaultdict(list)
    for text in texts:
        for sample in parse(text):
            by_name[sample.name].append(sample)
    return dict(by_name)


def dashboard_queries() -> list[str]:
    """What the dashboard asks Prometheus for, with its variables filled in."""

    def walk(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if isinstance(node.get("expr"), str):
                yield node["expr"]
            for child in node.values():
                yield from walk(child)
        elif isinstance(node, list):
            for child in node:
                yield from walk(child)

    found = list(walk(json.loads(DASHBOARD.read_text())))
    return [re.sub(r"\$(instance|tunnel)\b", ".*", each).replace("$__rate_interval", "5m") for each in found]


def alert_queries() -> list[str]:
    """The expressions of the alerts, as promtool prints none: read line by line."""
    text = (PROMETHEUS / "nodepass.rules.yml").read_text()
    blocks = re.findall(r"^ +expr: (.*(?:\n {10,}.*)*)", text, re.MULTILINE)
    return [re.sub(r"^>-\s*", "", block).replace("\n", " ") for block in blocks]


QUERIES = [*dashboard_queries(), *alert_queries()]


def test_there_are_queries_in_both_files() -> None:
    assert len(dashboard_queries()) > 30
    assert len(alert_queries()) == (PROMETHEUS / "nodepass.rules.yml").read_text().count("alert: ")


def test_every_query_names_metrics_labels_and_values_that_are_there(samples: dict[str, list[Sample]]) -> None:
    assert {query: found for query in QUERIES if (found := unknown(query, samples))} == {}


def unknown(query: str, samples: dict[str, list[Sample]]) -> set[str]:
    """What a query names that no sample has."""
    names = set(re.findall(r"\b(?:nodepass|process)_\w+", query))
    if not names:
        return {"no metric of ours"}
    if absent := names - samples.keys():
        return absent
    known = TARGET_LABELS.union(*(each.labels for name in names for each in samples[name]))
    grouped = {
        word for group in re.findall(r"\b(?:by|on|group_left) \(([^)]*)\)", query) for word in re.findall(r"\w+", group)
    }
    return (grouped - known) | {
        f'{label}="{part}"'
        for name, selector in re.findall(r"(\w+)\{([^}]*)\}", query)
        for label, pattern in re.findall(r'(\w+)=~?"([^"]*)"', selector)
        for part in pattern.split("|")
        if label not in TARGET_LABELS
        if not any(re.fullmatch(part, each.labels.get(label, "")) for each in samples[name])
    }


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("1 + 1", {"no metric of ours"}),
        ("nodepass_redy", {"nodepass_redy"}),
        ("sum by (tunel) (nodepass_ready)", {"tunel"}),
        ('nodepass_sessions_total{protocol="sctp"}', {'protocol="sctp"'}),
        ('nodepass_ready{instance="a"}', set()),
    ],
)
def test_a_query_with_a_typo_is_found(samples: dict[str, list[Sample]], query: str, found: set[str]) -> None:
    assert unknown(query, samples) == found


def test_every_metric_has_samples_after_a_little_use(samples: dict[str, list[Sample]]) -> None:
    shown = {re.sub(r"_(bucket|count|sum)$", "", name) for name in samples}
    assert {family.name for family in FAMILIES} <= shown


def test_the_dashboard_can_be_imported() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    boxes = [panel["gridPos"] for panel in panels]
    assert all(box["x"] + box["w"] <= 24 for box in boxes)
    cells = [(x, y) for b in boxes for x in range(b["x"], b["x"] + b["w"]) for y in range(b["y"], b["y"] + b["h"])]
    assert len(set(cells)) == len(cells)  # no panel lies on another
    for panel in panels:
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == "${datasource}"  # whoever imports it chooses


def check(*arguments: str, text: str = "") -> None:
    """Run promtool; its own words where it is not content."""
    done = subprocess.run(["promtool", *arguments], input=text, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr, done.stderr


@promtool
def test_promtool_finds_nothing_wrong_with_a_scrape(texts: list[str]) -> None:
    for text in texts:
        check("check", "metrics", text=text)


@promtool
def test_promtool_accepts_the_alerts_and_their_tests_pass() -> None:
    check("check", "rules", str(PROMETHEUS / "nodepass.rules.yml"))
    check("check", "config", str(PROMETHEUS / "prometheus.yml"))
    check("test", "rules", str(PROMETHEUS / "nodepass.rules.test.yml"))


@promtool
def test_promtool_can_parse_what_the_dashboard_asks_for(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(dashboard_queries())]
    path = tmp_path / "dashboard.json"  # JSON is YAML
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    check("check", "rules", str(path))


def test_every_alert_has_a_test_in_which_it_fires() -> None:
    alerts = set(re.findall(r"alert: (\w+)", (PROMETHEUS / "nodepass.rules.yml").read_text()))
    tests = (PROMETHEUS / "nodepass.rules.test.yml").read_text()
    fired = set(re.findall(r"alertname: (\w+)\n +exp_alerts:", tests))
    assert alerts == fired


def test_the_document_explains_every_metric_with_its_labels() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", DOCUMENT.read_text(), re.MULTILINE))
    explained = {family.name: set(re.findall(r"`(\w+)`", rows.get(family.name, "no row"))) for family in FAMILIES}
    assert explained == {family.name: set(family.labels) for family in FAMILIES}
    assert explained.keys() <= rows.keys()


def test_the_document_explains_every_value_of_a_label() -> None:
    words = {*TCP_OUTCOMES, *UDP_OUTCOMES, *CONTROL_FAILURES, *DATA_FAILURES, *UDP_DROPS, *TROUBLE}
    assert words <= set(re.findall(r"^\| `(\w+)` \|", DOCUMENT.read_text(), re.MULTILINE))


def test_the_document_explains_every_alert() -> None:
    for alert in re.findall(r"alert: (\w+)", (PROMETHEUS / "nodepass.rules.yml").read_text()):
        assert f"`{alert}`" in DOCUMENT.read_text()


def test_trouble_is_named_before_it_happens() -> None:
    source = "".join(path.read_text() for path in (ROOT / "nodepass").rglob("*.py"))
    kinds = set(re.findall(r'\btrouble\["(\w+)"\]', source)) | set(re.findall(r'\._count\("(\w+)"', source))
    assert kinds == set(TROUBLE)

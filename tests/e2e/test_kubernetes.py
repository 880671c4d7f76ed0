"""contrib/kubernetes: what Kubernetes accepts, and what the program accepts of it. No cluster is needed, nor tried."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from nodepass.cli import make_parser, read_settings
from nodepass.config.environment import find_typos
from nodepass.config.settings import Settings
from nodepass.config.urls import ServerURL, parse_url
from tests.support.machines import Lan, Machine
from tests.support.process import REPOSITORY, Nodepass
from tests.support.programs import installed
from tests.support.sockets import PATIENCE, Address, until
from tests.support.target import Target
from tests.support.tunnel import assert_connected
from tests.support.v2_tunnel import SECRET

FOLDER = REPOSITORY / "contrib" / "kubernetes"
README = (FOLDER / "README.md").read_text()
BASES = ("client", "server")
OLDEST = "1.28"
"""What the README asks for."""

BALANCER = "192.0.2.1"
"""In the network that ACCEPT_PROXY of the manifests has."""

Object = dict[str, Any]


def objects(base: str) -> list[Object]:
    """What a base consists of."""
    folder = FOLDER / base
    files = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    return [each for file in files for each in yaml.safe_load_all((folder / file).read_text())]


def workload(base: str) -> Object:
    """The Deployment or StatefulSet of a base."""
    (found,) = (each["spec"] for each in objects(base) if each["kind"] in ("Deployment", "StatefulSet"))
    assert isinstance(found, dict)
    return found


def pod(base: str) -> Object:
    """The pods of a base."""
    found = workload(base)["template"]["spec"]
    assert isinstance(found, dict)
    return found


def container(base: str) -> Object:
    """The one container of its pods."""
    (found,) = pod(base)["containers"]
    assert isinstance(found, dict)
    return found


def environment(base: str) -> dict[str, str]:
    """Its variables."""
    return {each["name"]: each["value"] for each in container(base)["env"]}


def ports(base: str) -> dict[str, int]:
    """The names of its ports."""
    return {each["name"]: each["containerPort"] for each in container(base)["ports"]}


def services() -> dict[str, Object]:
    return {each["metadata"]["name"]: each["spec"] for each in objects("server") if each["kind"] == "Service"}


def settings(base: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What the program makes of the variables."""
    for name, value in environment(base).items():
        monkeypatch.setenv(name, value)
    parser = make_parser()
    return read_settings(parser, parser.parse_strictly([]))


@pytest.mark.parametrize("base", BASES)
def test_the_program_takes_the_variables_and_a_pod_has_the_time_that_they_ask_for(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = settings(base, monkeypatch)
    assert not list(find_typos(environment(base)))
    url = parse_url(environment(base)["NODEPASS_URL"])
    assert isinstance(url, ServerURL) == (base == "server")
    sleep = container(base).get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
    assert sleep[0] == "sleep"
    needed = float(sleep[1]) + read.shutdown_delay + read.shutdown_timeout
    assert pod(base)["terminationGracePeriodSeconds"] >= needed + 5


@pytest.mark.parametrize("base", BASES)
def test_a_pod_has_no_privileges_no_service_links_and_the_key_in_a_file(base: str) -> None:
    spec, only = pod(base), container(base)
    assert spec["enableServiceLinks"] is False
    assert spec["automountServiceAccountToken"] is False
    user, _, group = re.findall(r"^USER (\d+)(:)(\d+)$", (REPOSITORY / "Dockerfile").read_text(), re.MULTILINE)[0]
    context = spec["securityContext"]
    assert context["runAsNonRoot"] is True
    assert [context[name] for name in ("runAsUser", "runAsGroup", "fsGroup")] == [int(user), int(group), int(group)]
    assert only["securityContext"]["readOnlyRootFilesystem"] is True
    assert only["securityContext"]["allowPrivilegeEscalation"] is False
    assert only["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    (mount,), (volume,) = only["volumeMounts"], spec["volumes"]
    assert mount["name"] == volume["name"]
    assert f"secret generic {volume['secret']['secretName']} --from-file=tunnel-key" in README
    assert environment(base)["TUNNEL_KEY_FILE"] == f"{mount['mountPath']}/tunnel-key"


@pytest.mark.parametrize("base", BASES)
def test_probes_and_services_lead_to_ports_that_the_program_listens_on(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = ports(base)
    listen = settings(base, monkeypatch).metrics_listen
    assert listen
    assert (listen.host, listen.port) == ("0.0.0.0", named.pop("metrics"))
    for probe, path in (("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")):
        assert container(base)[probe]["httpGet"] == {"path": path, "port": "metrics"}
    url = parse_url(environment(base)["NODEPASS_URL"])
    if isinstance(url, ServerURL):
        assert named == {"tunnel": url.tunnel.port, "visitors": url.target.port}
        assert services()["nodepass-server"]["ports"] == [{"name": "tunnel", "port": url.tunnel.port}]
        targets = {port["targetPort"] for each in services().values() for port in each["ports"] if "targetPort" in port}
        assert targets == set(named)


def test_every_server_can_be_reached_by_clients_before_it_is_ready() -> None:
    spec, found = workload("server"), services()
    assert spec["serviceName"] == "nodepass-server"
    assert spec["podManagementPolicy"] == "Parallel"
    names = [f"nodepass-server-{number}" for number in range(spec["replicas"])]
    assert sorted(found) == sorted(["nodepass-server", "nodepass-visitors", *names])
    assert {name for name, each in found.items() if each.get("publishNotReadyAddresses")} == {"nodepass-server", *names}
    for name in names:
        assert found[name]["selector"] == {"statefulset.kubernetes.io/pod-name": name}
    for name in ("nodepass-server", "nodepass-visitors"):
        assert found[name]["selector"] == spec["template"]["metadata"]["labels"]
    for name in ("nodepass-visitors", *names):
        assert (found[name]["type"], found[name]["externalTrafficPolicy"]) == ("LoadBalancer", "Local")


def test_there_is_a_place_for_each_client_and_none_for_another() -> None:
    spec = workload("client")
    assert int(environment("server")["CLIENTS"]) == spec["replicas"] > 1
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


@pytest.mark.programs("kubernetes-validate")
@pytest.mark.parametrize("base", BASES)
def test_kubernetes_takes_every_object_of_a_base(base: str) -> None:
    import kubernetes_validate

    for version in (OLDEST, kubernetes_validate.latest_version()):
        for each in objects(base):
            kubernetes_validate.validate(each, version, strict=True)


def build(folder: Path) -> list[Object]:
    """What kustomize makes of a folder."""
    command = [installed("kubectl"), "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return list(yaml.safe_load_all(done.stdout))


def by_name(found: list[Object]) -> dict[tuple[str, str], Object]:
    return {(each["kind"], each["metadata"]["name"]): each for each in found}


@pytest.mark.programs("kubectl")
def test_kustomize_builds_the_bases_and_the_overlays_of_the_readme(tmp_path: Path) -> None:
    overlays = re.findall(r"```yaml\n(.+?)```", README, re.DOTALL)
    assert len(overlays) == len(BASES)
    for base, text in zip(BASES, overlays, strict=True):
        assert by_name(build(FOLDER / base)) == by_name(objects(base))
        folder = tmp_path / base
        folder.mkdir()
        (folder / "base").symlink_to(FOLDER / base)
        assert f"../nodepass/contrib/kubernetes/{base}]" in text
        (folder / "kustomization.yaml").write_text(text.replace(f"../nodepass/contrib/kubernetes/{base}", "base"))
        for (kind, name), each in by_name(build(folder)).items():
            if kind in ("Deployment", "StatefulSet"):
                (only,) = each["spec"]["template"]["spec"]["containers"]
                assert only["image"] == "registry.example.com/nodepass:1.0"
                patched = {variable["name"]: variable["value"] for variable in only["env"]}
                assert patched.keys() == environment(base).keys()
                assert len({*patched.items()} - {*environment(base).items()}) == 1
            elif kind == "Service":
                assert ("annotations" in each["metadata"]) == (name != "nodepass-server")


# The program with all of this


def ask(address: Address, path: str) -> int:
    """The status that the kubelet gets."""
    with contextlib.closing(http.client.HTTPConnection(*address, timeout=PATIENCE)) as connection:
        connection.request("GET", path)
        return connection.getresponse().status


def start(stack: contextlib.ExitStack, lan: Lan, machine: Machine, env: dict[str, str]) -> Nodepass:
    return lan.start(stack, machine.namespace, partial(Nodepass, env=env))


@pytest.mark.programs("network namespaces")
def test_two_servers_and_two_clients_with_these_variables_pass_their_probes_and_serve_a_balancer(
    stack: contextlib.ExitStack, tmp_path: Path
) -> None:
    lan = stack.enter_context(Lan(4))
    lan.hub.ip("address", "add", f"{BALANCER}/24", "dev", "switch")
    key = tmp_path / "tunnel-key"
    key.write_text(SECRET)
    key.chmod(0o600)
    target = lan.hub.inside(lambda: stack.enter_context(Target(lan.others[0].hub_address)))
    envs = {base: {**environment(base), "TUNNEL_KEY_FILE": str(key)} for base in BASES}
    servers, clients = lan.others[:2], lan.others[2:]
    url = envs["client"]["NODEPASS_URL"]
    for name, address in (
        ("a.example.com", servers[0].address),
        ("b.example.com", servers[1].address),
        ("web:80", f"{target.address[0]}:{target.address[1]}"),
    ):
        assert name in url
        url = url.replace(name, address)
    envs["client"]["NODEPASS_URL"] = url

    def probe(name: str, machines: list[Machine]) -> list[int]:
        path = container("server")[name]["httpGet"]["path"]
        return [lan.hub.inside(partial(ask, (each.address, ports("server")["metrics"]), path)) for each in machines]

    runs = [start(stack, lan, each, envs["server"]) for each in servers]
    for each in runs:
        each.wait_for("server.listening")
    assert probe("readinessProbe", servers) == [503, 503]
    runs += [start(stack, lan, each, envs["client"]) for each in clients]
    for each in runs[2:]:
        each.wait_for("metrics.listening")
    until(lambda: probe("readinessProbe", lan.others) == [200] * 4)
    assert probe("livenessProbe", lan.others) == [200] * 4
    assert not [entry for each in runs for entry in each.find("config.warning")]
    for each in servers:
        visitors = each.address, ports("server")["visitors"]
        dial = partial(socket.create_connection, visitors, PATIENCE, (BALANCER, 0))
        visitor = stack.enter_context(lan.hub.inside(dial))
        visitor.sendall(b"PROXY TCP4 203.0.113.9 10.0.0.1 1000 443\r\n")
        with target.accept() as service:
            assert_connected(visitor, service)

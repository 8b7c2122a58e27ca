"""What deploy/ says of the engine is so: flags, ports, routes, labels and times (see also scripts/check_deploy.sh)."""

from __future__ import annotations

import http.server
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml  # type: ignore[import-untyped]

from tokenspeed.engine.supervisor import LONGEST_PAUSE
from tokenspeed.entrypoints.app import make_app
from tokenspeed.entrypoints.door import Door
from tokenspeed.entrypoints.flags import FLAGS, ServerConfig, parse_flags
from tokenspeed.entrypoints.limits import Limits
from tokenspeed.entrypoints.server import LAST_WORDS_SECONDS

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
KEYS = {"TOKENSPEED_API_KEY": "a"}
UNTIL_GRPC = {"--grpc-port"}
"""Flags that there are once the engine has a gRPC door."""

CHECKPOINT_BYTES, SLOW_VOLUME, FIRST_KERNELS = 31.4e9, 50e6, 87.0
"""What a start may take: docs/performance.md has the first and the last, the middle one is bytes a second."""

TORCHRUN_SECONDS = 30.0
"""From torchrun's SIGTERM to its ranks to its SIGKILL."""

EXIT_SECONDS = 10.0
"""What an engine may take to end once nothing runs."""


def manifests() -> list[dict[str, Any]]:
    """Everything in deploy/kubernetes."""
    files = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    return [each for file in files for each in yaml.safe_load_all(file.read_text(encoding="utf-8"))]


def templates(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pod templates of a manifest."""
    if (several := manifest["spec"].get("leaderWorkerTemplate")) is not None:
        yield several["leaderTemplate"]
        yield several["workerTemplate"]
    else:
        yield manifest["spec"]["template"]


def named(kind: str, name: str) -> dict[str, Any]:
    """One manifest."""
    (found,) = (each for each in manifests() if (each["kind"], each["metadata"]["name"]) == (kind, name))
    return found


PODS = [
    pytest.param(template, id=f"{manifest['metadata']['name']}-{number}")
    for manifest in manifests()
    if manifest["kind"] in ("StatefulSet", "Deployment", "LeaderWorkerSet")
    for number, template in enumerate(templates(manifest))
]
ENGINES = [each for each in PODS if not str(each.id).startswith("gateway")]
LABELLED = [each for each in ENGINES if each.id in ("engine-0", "ranks-0")]


def container(template: dict[str, Any]) -> dict[str, Any]:
    """The only one of a pod."""
    (only,) = template["spec"]["containers"]
    return cast(dict[str, Any], only)


def served(template: dict[str, Any]) -> ServerConfig:
    """What the engine makes of a container's flags, behind those of the image; gRPC's once it has them."""
    entry = entries()["cuda"]
    arguments = [*entry[entry.index("tokenspeed.entrypoints.api") + 1 :], *container(template)["args"]]
    if importlib.util.find_spec("tokenspeed.entrypoints.grpc") is None:
        arguments = [each for each in arguments if each.partition("=")[0] not in UNTIL_GRPC]
    return parse_flags(arguments, {each["name"]: "key" for each in container(template)["env"]})


def entries() -> dict[str, list[str]]:
    """The entry point of each image."""
    found, stage = {}, ""
    for line in (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines():
        if line.startswith("FROM "):
            stage = line.rpartition(" ")[2]
        elif line.startswith("ENTRYPOINT "):
            found[stage] = json.loads(line.removeprefix("ENTRYPOINT "))
    return found


def routes() -> set[str]:
    """Paths that the server answers a GET on."""
    app = make_app(cast(Door, SimpleNamespace(limits=Limits())))
    resources = (route.resource for route in app.router.routes() if route.method == "GET")
    return {resource.canonical for resource in resources if resource is not None}


def seconds_of(probe: dict[str, Any]) -> float:
    """How long a probe may fail before something is done about it."""
    return float(probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3))


@pytest.mark.parametrize("template", ENGINES)
def test_an_engine_takes_the_flags_of_its_container(template: dict[str, Any]) -> None:
    config = served(template)
    assert (config.host, config.log_format) == ("0.0.0.0", "json")
    # The gateway sends no key: what guards the doors is the network policy.
    assert (config.insecure, config.api_keys, config.admin_api_keys) == (True, [], ["key"])


def test_only_the_gateway_and_prometheus_reach_an_engine_that_asks_for_no_key() -> None:
    policy = named("NetworkPolicy", "engine")["spec"]
    (gateway,) = templates(named("Deployment", "gateway"))
    gates = {rule["ports"][0]["port"]: rule["from"] for rule in policy["ingress"] if len(rule["ports"]) == 1}
    assert policy["policyTypes"] == ["Ingress"]
    assert gates == {
        50051: [{"podSelector": {"matchLabels": gateway["metadata"]["labels"]}}],
        8000: [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
    }
    ranks = named("NetworkPolicy", "ranks")["spec"]
    (chosen,) = ranks["podSelector"]["matchExpressions"]
    components = {each["metadata"]["labels"][chosen["key"]] for each in templates(named("LeaderWorkerSet", "ranks"))}
    assert components == set(chosen["values"])
    assert ranks["ingress"] == [{"from": [{"podSelector": ranks["podSelector"]}]}]


@pytest.mark.parametrize("template", LABELLED)
def test_named_ports_are_those_that_the_engine_listens_on(template: dict[str, Any]) -> None:
    ports = {port["name"]: port["containerPort"] for port in container(template)["ports"]}
    assert ports["http"] == served(template).port
    assert f"--grpc-port={ports['grpc']}" in container(template)["args"]


@pytest.mark.parametrize("template", LABELLED)
def test_probes_ask_routes_that_want_no_key(template: dict[str, Any]) -> None:
    only = container(template)
    asked = {name: only[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert asked == {"startupProbe": "/ready", "readinessProbe": "/ready", "livenessProbe": "/health"}
    assert set(asked.values()) <= routes()
    for name in asked:
        assert only[name]["httpGet"]["port"] == "http"


@pytest.mark.parametrize("template", LABELLED)
def test_a_start_from_a_slow_volume_is_waited_for(template: dict[str, Any]) -> None:
    assert seconds_of(container(template)["startupProbe"]) >= CHECKPOINT_BYTES / SLOW_VOLUME + FIRST_KERNELS


def test_an_engine_that_is_being_replaced_is_not_killed_meanwhile() -> None:
    (template,) = templates(named("StatefulSet", "engine"))
    needed = served(template).engine_silence + LONGEST_PAUSE + FIRST_KERNELS
    assert seconds_of(container(template)["livenessProbe"]) >= needed


def test_an_engine_has_the_time_to_drain() -> None:
    (template,) = templates(named("StatefulSet", "engine"))
    notice = float(container(template)["lifecycle"]["preStop"]["exec"]["command"][1])
    needed = notice + served(template).shutdown_grace + LAST_WORDS_SECONDS + EXIT_SECONDS
    assert notice >= seconds_of(container(template)["readinessProbe"])
    assert template["spec"]["terminationGracePeriodSeconds"] >= needed


def test_ranks_under_torchrun_drain_before_it_is_told_to_end() -> None:
    for template in templates(named("LeaderWorkerSet", "ranks")):
        command = container(template)["lifecycle"]["preStop"]["exec"]["command"]
        needed = float(command[-1]) + TORCHRUN_SECONDS + EXIT_SECONDS
        assert template["spec"]["terminationGracePeriodSeconds"] >= needed
        assert served(template).shutdown_grace + LAST_WORDS_SECONDS < TORCHRUN_SECONDS
        text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
        assert f"COPY deploy/drain.py {command[1]}\n" in text


def test_the_gateway_has_the_time_to_drain() -> None:
    (template,) = templates(named("Deployment", "gateway"))
    only = container(template)
    notice = float(only["lifecycle"]["preStop"]["exec"]["command"][1])
    (grace,) = (each for each in only["args"] if each.startswith("--shutdown-grace-period-secs="))
    assert template["spec"]["terminationGracePeriodSeconds"] >= notice + float(grace.partition("=")[2]) + EXIT_SECONDS


def test_the_gateway_finds_the_pods_that_have_a_door_and_no_others() -> None:
    (template,) = templates(named("Deployment", "gateway"))
    arguments = container(template)["args"]
    label, _, value = arguments[arguments.index("--selector") + 1].partition("=")
    (port,) = (each for each in arguments if each.startswith("--service-discovery-port="))
    for each in PODS:
        pod = cast(dict[str, Any], each.values[0])
        doors = [given for given in container(pod).get("ports", []) if given["name"] == "grpc"]
        assert (pod["metadata"]["labels"].get(label) == value) == bool(doors), each.id
        assert all(door["containerPort"] == int(port.partition("=")[2]) for door in doors)
    assert f"--service-discovery-namespace={named('Deployment', 'gateway')['metadata']['namespace']}" in arguments
    assert named("NetworkPolicy", "engine")["spec"]["podSelector"]["matchLabels"] == {label: value}


def test_every_selector_finds_exactly_one_kind_of_pod() -> None:
    labels = [cast(dict[str, Any], each.values[0])["metadata"]["labels"] for each in PODS]
    for manifest in manifests():
        selector = manifest.get("spec", {}).get("selector")
        if selector is not None:
            wanted = selector.get("matchLabels", selector)
            found = [each for each in labels if wanted.items() <= each.items()]
            assert len(found) == 1, manifest["metadata"]["name"]


def test_services_and_claims_and_accounts_that_are_named_exist() -> None:
    everything = {(each["kind"], each["metadata"]["name"]): each for each in manifests()}
    assert ("Service", named("StatefulSet", "engine")["spec"]["serviceName"]) in everything
    for each in PODS:
        pod = cast(dict[str, Any], each.values[0])["spec"]
        ports = {port["name"] for port in pod["containers"][0].get("ports", [])}
        for volume in pod["volumes"]:
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in everything
        assert "serviceAccountName" not in pod or ("ServiceAccount", pod["serviceAccountName"]) in everything
        for service in (service for (kind, _), service in everything.items() if kind == "Service"):
            if service["spec"]["selector"].items() <= cast(Any, each.values[0])["metadata"]["labels"].items():
                assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    namespaces = {each["metadata"].get("namespace") for each in manifests() if each["kind"] != "Namespace"}
    assert namespaces == {named("Namespace", "tokenspeed")["metadata"]["name"]}


@pytest.mark.parametrize("template", PODS)
def test_pods_may_do_nothing_but_their_work(template: dict[str, Any]) -> None:
    pod, only = template["spec"], container(template)
    user = re.findall(r"^USER (\d+):(\d+)$", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), re.M)
    assert {(str(pod["securityContext"]["runAsUser"]), str(pod["securityContext"]["runAsGroup"]))} == set(user)
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    locked = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert only["securityContext"] == locked
    mounted = {mount["mountPath"] for mount in only["volumeMounts"]}
    assert {"/models", "/tmp"} <= mounted
    assert pod["volumes"][0]["persistentVolumeClaim"]["readOnly"]


def test_images_start_the_servers_and_say_so_where_their_health_is_asked() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    for stage in ("cpu", "cuda"):
        entry = entries()[stage]
        assert entry[:3] == ["python", "-m", "tokenspeed.entrypoints.api"]
        config = parse_flags(entry[3:], KEYS)
        assert (config.host, config.port) == ("0.0.0.0", 8000)
    asked = set(re.findall(r"urlopen\('http://127\.0\.0\.1:(\d+)(/\w+)'", text))
    assert asked == {("8000", "/health"), ("30000", "/liveness")}
    assert "/health" in routes()
    assert {"--port", "30000"} <= set(entries()["gateway"])
    assert text.count("\nSTOPSIGNAL SIGTERM\n") == text.count("\nENTRYPOINT [") == 3


def test_what_the_page_tells_to_type_exists() -> None:
    """Flags of the engine in docs/deploy.md, and the paths it names."""
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    known = {flag.name for flag in FLAGS} | {"--help", "--config"}
    if importlib.util.find_spec("tokenspeed.entrypoints.grpc") is None:
        known |= UNTIL_GRPC
    for line in re.findall(r"tokenspeed\.entrypoints\.api (.*)", page):
        assert set(re.findall(r"(?<!\S)--[a-z-]+", line)) <= known, line
    for path in re.findall(r"\b(?:deploy|scripts|docs)/[\w./-]+\w", page):
        assert (ROOT / path).exists(), path
    families = set(re.findall(r"`tokenspeed:(\w+)`", page))
    source = (ROOT / "tokenspeed" / "entrypoints" / "metrics.py").read_text(encoding="utf-8")
    assert families
    assert {name for name in families if f'"{name.removesuffix("_total")}"' not in source} == set()


class Load(http.server.BaseHTTPRequestHandler):
    """A server with requests, which end as they are asked for."""

    left = 0
    ready = 200
    keys: list[str | None] = []  # noqa: RUF012  (of the class on purpose: the handler is made anew for each request)

    def do_GET(self) -> None:
        status, load = type(self).ready, b"{}"
        if self.path == "/v1/load":
            self.keys.append(self.headers["Authorization"])
            status = 200
            load = json.dumps({"num_requests_running": type(self).left, "num_requests_waiting": 0}).encode()
            type(self).left = max(0, type(self).left - 1)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(load)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.mark.parametrize(("left", "ready", "asked"), [(2, 200, 3), (0, 200, 1), (5, 503, 0)])
def test_drain_waits_for_requests_and_not_for_a_server_that_failed(left: int, ready: int, asked: int) -> None:
    Load.left, Load.ready, Load.keys = left, ready, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Load)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    lines = ["import drain, sys", "drain.NOTICE_SECONDS = 0.0", "sys.argv = ['drain', '60']", "drain.main()"]
    environment = {**os.environ, **KEYS, "PYTHONPATH": str(DEPLOY), "TOKENSPEED_PORT": str(server.server_port)}
    subprocess.run([sys.executable, "-c", "\n".join(lines)], env=environment, timeout=50, check=True)
    server.shutdown()
    server.server_close()
    assert Load.keys == ["Bearer a"] * asked

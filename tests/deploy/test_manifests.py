"""Manifests agree with each other and with the server: ports, times, memory, keys, labels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from puna.serve.keys import read_keys
from tests.deploy.files import (
    ARGUMENTS,
    DEPLOY,
    DOCKERFILES,
    KUBERNETES,
    PORT,
    compose,
    container,
    documents,
    health_check,
    interpolated,
    manifest,
    pod,
    seconds,
    settings_in,
    value_of,
    yaml,
)

ALL_YAML = sorted(path for ending in ("*.yaml", "*.yml") for path in DEPLOY.rglob(ending))
LABELS = {"app.kubernetes.io/name": "puna"}


@pytest.mark.parametrize("path", ALL_YAML, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_every_manifest_is_read(path: Path) -> None:
    assert all(isinstance(document, dict) for document in documents(path))


@pytest.mark.parametrize("where", ARGUMENTS)
def test_settings_in_manifests_are_the_servers(where: str) -> None:
    settings = settings_in(where)
    assert settings.api_keys is not None and settings.engine.cache_memory is not None


def test_the_signal_comes_long_enough_before_the_kill() -> None:
    patience = seconds(compose["services"]["puna"]["stop_grace_period"])
    assert patience >= settings_in("compose").drain_seconds + 10
    assert container["lifecycle"]["preStop"]["exec"]["command"][0] == "sleep"
    waited = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    drained = settings_in("kubernetes").drain_seconds
    assert pod["terminationGracePeriodSeconds"] >= waited + drained + 10
    # Balancers stop sending before the signal comes.
    unready = container["readinessProbe"]
    assert waited >= unready["periodSeconds"] * unready["failureThreshold"]


def test_balancers_wait_longer_than_answers_take_and_let_connections_go_first() -> None:
    serving = settings_in("kubernetes")
    annotations = manifest("eks/ingress.yaml", "Ingress")["metadata"]["annotations"]
    idle = float(re.search(r"idle_timeout.timeout_seconds=(\d+)", str(annotations))[1])  # type: ignore[index]
    leaving = float(re.search(r"deregistration_delay.timeout_seconds=(\d+)", str(annotations))[1])  # type: ignore[index]
    backend = manifest("gke/backend.yaml", "BackendConfig")["spec"]
    google_keeps = 600  # seconds, fixed
    assert serving.request_seconds < min(idle, backend["timeoutSec"])
    assert max(idle, google_keeps) < serving.idle_seconds
    assert serving.drain_seconds <= min(leaving, backend["connectionDraining"]["drainingTimeoutSec"])
    caddy = (DEPLOY / "Caddyfile").read_text()
    serving = settings_in("compose")
    assert seconds(re.search(r"\skeepalive (\w+)", caddy)[1]) < serving.idle_seconds  # type: ignore[index]
    assert seconds(re.search(r"response_header_timeout (\w+)", caddy)[1]) > serving.request_seconds  # type: ignore[index]
    assert not re.search(r"^\s*flush_interval", caddy, re.MULTILINE)  # -1: requests outlive their clients


def test_ports_agree_everywhere() -> None:
    for path in DOCKERFILES:
        assert value_of(path, "EXPOSE") == str(PORT)
        assert f":{PORT}/health" in health_check(path)[-1]
    assert container["ports"] == [{"name": "http", "containerPort": PORT}]
    service = manifest("base/service.yaml", "Service")["spec"]["ports"]
    assert service == [{"name": "http", "port": PORT, "targetPort": "http"}]
    for place in ("base", "eks", "gke"):
        (rule,) = manifest(f"{place}/network.yaml", "NetworkPolicy")["spec"]["ingress"]
        assert rule["ports"] == [{"protocol": "TCP", "port": PORT}]
    for place in ("eks", "gke"):
        (rule,) = manifest(f"{place}/ingress.yaml", "Ingress")["spec"]["rules"]
        assert rule["http"]["paths"][0]["backend"] == {"service": {"name": "puna", "port": {"name": "http"}}}
    assert manifest("gke/backend.yaml", "BackendConfig")["spec"]["healthCheck"]["port"] == PORT
    (monitored,) = manifest("autoscaling/monitor.yaml", "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert monitored["port"] == "http"
    assert re.findall(r"dynamic a puna (\d+)", (DEPLOY / "Caddyfile").read_text()) == [str(PORT)]
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert job["dns_sd_configs"][0]["names"] == ["puna"] and job["dns_sd_configs"][0]["port"] == PORT
    assert "puna" in compose["services"]


def test_selectors_find_the_replicas() -> None:
    deployment = manifest("base/deployment.yaml", "Deployment")["spec"]
    assert deployment["template"]["metadata"]["labels"] == LABELS == deployment["selector"]["matchLabels"]
    assert pod["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"] == LABELS
    assert manifest("base/service.yaml", "Service")["spec"]["selector"] == LABELS
    assert (
        manifest("base/disruption.yaml", "PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == LABELS
    )
    assert manifest("autoscaling/monitor.yaml", "PodMonitor")["spec"]["selector"]["matchLabels"] == LABELS
    for place in ("base", "eks", "gke"):
        policy = manifest(f"{place}/network.yaml", "NetworkPolicy")["spec"]
        assert policy["podSelector"]["matchLabels"] == LABELS


def test_replicas_can_write_to_their_cache_and_nowhere_else() -> None:
    path = DOCKERFILES[0]
    cache = value_of(path, "VOLUME")
    assert f"XDG_CACHE_HOME={cache} " in value_of(path, "ENV")
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert {place for place, mount in mounts.items() if not mount.get("readOnly")} == {cache, "/tmp"}
    assert {mount["name"] for mount in mounts.values()} == {volume["name"] for volume in pod["volumes"]}
    assert container["securityContext"]["readOnlyRootFilesystem"] and pod["securityContext"]["runAsNonRoot"]
    service = compose["services"]["puna"]
    assert service["read_only"] and service["tmpfs"] == ["/tmp"]
    assert [x.rpartition(":")[2] for x in service["volumes"]] == ["ro", cache]


def test_keys_are_where_replicas_and_prometheus_look(tmp_path: Path) -> None:
    (secret,) = documents(KUBERNETES / "secret.example.yaml")
    mounted = {volume["name"]: volume for volume in pod["volumes"]}["keys"]["secret"]["secretName"]
    assert mounted == secret["metadata"]["name"]
    place = next(m["mountPath"] for m in container["volumeMounts"] if m["name"] == "keys")
    assert settings_in("kubernetes").api_keys == f"{place}/keys"
    (monitored,) = manifest("autoscaling/monitor.yaml", "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert monitored["authorization"]["credentials"] == {"name": mounted, "key": "metrics_key"}
    assert set(secret["stringData"]) == {"keys", "metrics_key"}
    file = tmp_path / "keys"
    file.write_text(secret["stringData"]["keys"])
    assert [key.name for key in read_keys(str(file), {})[0]] == ["alice", "metrics"]
    assert all(line.split()[-1].startswith("REPLACE-") for line in file.read_text().splitlines())

    named = compose["secrets"]
    assert settings_in("compose").api_keys == "/run/secrets/keys" and "keys" in named
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert job["authorization"]["credentials_file"] == "/run/secrets/metrics_key" and "metrics_key" in named
    assert {Path(x["file"]).parent for x in named.values()} == {Path("secrets")}
    assert "*" in (DEPLOY / "secrets" / ".gitignore").read_text().splitlines()


def test_a_replica_has_memory_for_its_cache_and_the_rest() -> None:
    limit = int(container["resources"]["limits"]["memory"].removesuffix("Gi")) << 30
    assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
    assert limit >= (settings_in("kubernetes").engine.cache_memory or 0) + (4 << 30)
    limit = int(interpolated(compose["services"]["puna"]["deploy"]["resources"]["limits"]["memory"])[:-1])
    assert limit << 30 >= (settings_in("compose").engine.cache_memory or 0) + (4 << 30)


@pytest.mark.parametrize("place", ["base", "eks", "gke", "gpu", "autoscaling"])
def test_kustomizations_name_files_and_patch_what_exists(place: str) -> None:
    directory = KUBERNETES / place
    (parts,) = documents(directory / "kustomization.yaml")
    resources = parts.get("resources", [])
    assert [name for name in resources if not (directory / name).exists()] == []
    unnamed = {path.name for path in directory.glob("*.yaml")} - {*resources, "kustomization.yaml"}
    assert unnamed <= {"adapter.yaml"}  # Helm's, as its head says
    objects = [x for path in sorted((KUBERNETES / "base").glob("[!k]*.yaml")) for x in documents(path)]
    for patch in parts.get("patches", []):
        (target,) = [
            x for x in objects
            if (x["kind"], x["metadata"]["name"]) == (patch["target"]["kind"], patch["target"]["name"])
        ]  # fmt: skip
        for change in yaml.safe_load(patch["patch"]):
            *parents, last = [part.replace("~1", "/") for part in change["path"].split("/")[1:]]
            held: Any = target
            for parent in parents:
                held = held[int(parent) if isinstance(held, list) else parent]
            assert (last in held) == (change["op"] != "add")

"""What manifests and deploy/README.md name is there: routes, metrics, commands, settings, files, figures."""

from __future__ import annotations

import re

import pytest
import torch
from typer.main import get_command

from puna.cli.app import app as cli
from puna.engine.cache import bytes_per_position
from puna.engine.llm import LLM
from puna.engine.params import SamplingParams
from puna.engine.settings import EngineSettings
from puna.model.counts import parameters
from puna.model.presets import PRESETS
from puna.serve.keys import ENVIRONMENT
from puna.serve.settings import ServeSettings
from tests.deploy.files import (
    DEFAULTS,
    DEPLOY,
    KUBERNETES,
    README,
    ROOT,
    container,
    manifest,
    yaml,
)

FOREIGN = {  # names of other programs in the README
    "min_tokens", "stop_token_ids", "structured_outputs", "stop_grace_period", "metrics_key",
}  # fmt: skip


def routes(llm: LLM) -> set[str]:
    pytest.importorskip("fastapi")
    pytest.importorskip("prometheus_client")
    from starlette.routing import Route

    from puna.serve.app import make_app
    from puna.serve.metrics import Metrics
    from puna.serve.state import ServerState
    from puna.serve.worker import EngineThread

    metrics = Metrics(llm.engine)
    worker = EngineThread(llm.engine, metrics, 0)
    state = ServerState(llm, worker, DEFAULTS, "puna", frozenset({"puna"}), "", 0, metrics)
    return {route.path for route in make_app(state).routes if isinstance(route, Route)}


def test_paths_are_routes(llm: LLM) -> None:
    probes = [container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")]
    assert all(probe["port"] == "http" for probe in probes)
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    (monitored,) = manifest("autoscaling/monitor.yaml", "PodMonitor")["spec"]["podMetricsEndpoints"]
    eks = manifest("eks/ingress.yaml", "Ingress")["metadata"]["annotations"]
    paths = {
        *(probe["path"] for probe in probes), job["metrics_path"], monitored["path"],
        manifest("gke/backend.yaml", "BackendConfig")["spec"]["healthCheck"]["requestPath"],
        eks["alb.ingress.kubernetes.io/healthcheck-path"],
        *re.findall(r"respond (\S+)", (DEPLOY / "Caddyfile").read_text()),
        *re.findall(r"`(/[a-z][a-z-]+)`", README),
    }  # fmt: skip
    assert {"/ready", "/health", "/metrics"} <= paths
    assert paths - {"/models", "/cache", "/tmp"} <= routes(llm)


def test_metrics_in_rules_exist(llm: LLM) -> None:
    pytest.importorskip("prometheus_client")
    from puna.serve.metrics import BROKEN, KINDS, Metrics

    types = re.findall(r"^# TYPE (\w+) (\w+)$", Metrics(llm.engine).exposition().decode(), re.MULTILINE)
    known = {
        f"{name}{ending}"
        for name, kind in types
        for ending in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",))
    }
    alerts = (DEPLOY / "alerts.yml").read_text()
    scaler = (KUBERNETES / "autoscaling" / "scaler.yaml").read_text()
    used = {name for text in (alerts, scaler, README) for name in re.findall(r"\bpuna_[a-z_]+\b", text)}
    adapter = (KUBERNETES / "autoscaling" / "adapter.yaml").read_text()
    scaled = {f"puna_{name}" for name in re.search(r"puna_\(([^)]*)\)", adapter)[1].split("|")}  # type: ignore[index]
    assert scaled == set(re.findall(r"name: (puna_\w+)", scaler))
    assert len(used) > 5 and used | scaled <= known
    kinds = {kind for given in re.findall(r'kind=~?"([^"]+)"', alerts) for kind in given.split("|")}
    assert kinds <= {*KINDS.values(), BROKEN, "fault"}


def code(text: str) -> list[str]:
    """Lines of code blocks, and what stands between backticks."""
    lines = re.findall(r"^(?: {4}| {7})(\S.*)$", text, re.MULTILINE)
    return [*lines, *re.findall(r"`([^`\n]+)`", text)]


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", README))
def test_every_link_leads_somewhere(link: str) -> None:
    assert (DEPLOY / link).exists()


def test_files_that_the_readme_names_exist() -> None:
    for name in re.findall(r"`([\w./-]+\.(?:ya?ml|cuda|py))`", README):
        places = (DEPLOY, KUBERNETES, KUBERNETES / "eks", KUBERNETES / "gke", ROOT)
        assert any((place / name).exists() for place in places), name
    for name in re.findall(r"(?:apply|diff) -[fk] (\S+)|--file (deploy/\S+)", README):
        assert (ROOT / "".join(name)).exists()


def test_commands_that_the_readme_shows_exist() -> None:
    commands = get_command(cli).commands  # type: ignore[attr-defined]
    shown = [x for x in code(README) if re.match(r"puna [a-z]", x)]
    assert len(shown) >= 4
    for line in shown:
        command = commands[line.split()[1]]
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r" (--[a-z-]+)", line)) <= known


def test_settings_that_the_readme_names_exist() -> None:
    engine = {f"engine.{name}" for name in EngineSettings.model_fields}
    known = {*ServeSettings.model_fields, *SamplingParams.model_fields, *engine}
    words = {x.partition("=")[0].rstrip("…") for x in code(README)}
    named = {x for x in words if re.fullmatch(r"[a-z]+(?:_[a-z]+)+|engine\.\w+", x) and x != "puna_"}
    assert {"drain_seconds", "engine.cache_memory"} <= named
    assert {x for x in named if not x.startswith("puna_")} <= known | FOREIGN


def test_what_the_readme_says_to_set_is_what_compose_reads() -> None:
    read = set(re.findall(r"\$\{(PUNA_\w+)", (DEPLOY / "compose.yaml").read_text()))
    assert set(re.findall(r"\bPUNA_[A-Z_]+\b", README)) == read | {ENVIRONMENT}
    for name, default in re.findall(r"\$\{(PUNA_\w+):-([^}]+)\}", (DEPLOY / "compose.yaml").read_text()):
        assert default in README, name


def test_the_memory_table_is_what_the_code_says() -> None:
    rows = re.findall(
        r"^\| (\S+) \| ([\d.]+) GiB \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) positions \|$", README, re.M
    )
    assert len(rows) == 5
    for name, weights, each, quantized, held in rows:
        config = PRESETS[name]
        assert weights == f"{parameters(config).total * 2 / 2**30:.1f}"
        assert each == f"{bytes_per_position(config, torch.bfloat16):,}"
        assert quantized == f"{bytes_per_position(config, torch.bfloat16, quantized=True):,}"
        assert held == f"{(2 << 30) // bytes_per_position(config, torch.bfloat16):,}"

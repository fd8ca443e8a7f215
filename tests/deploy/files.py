"""What stands in deploy/, read: Dockerfiles as steps, manifests as objects, the settings they give."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from puna.serve.settings import ServeSettings
from puna.settings import parse, read_settings

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
DOCKERFILES = (DEPLOY / "Dockerfile", DEPLOY / "Dockerfile.cuda")
README = (DEPLOY / "README.md").read_text(encoding="utf-8")
DEFAULTS = parse(ServeSettings, {})
PORT = DEFAULTS.port


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def manifest(name: str, kind: str) -> dict[str, Any]:
    return next(x for x in documents(KUBERNETES / name) if x["kind"] == kind)


def instructions(path: Path) -> list[tuple[str, str]]:
    """A Dockerfile's, without comments, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(keyword, value) for keyword, _, value in (x.partition(" ") for x in lines if x.strip())]


def value_of(path: Path, keyword: str) -> str:
    return [value for name, value in instructions(path) if name == keyword][-1]


def command_of(path: Path) -> list[str]:
    """What a container of the image runs."""
    return [*json.loads(value_of(path, "ENTRYPOINT")), *json.loads(value_of(path, "CMD"))]


def health_check(path: Path) -> list[str]:
    return json.loads(value_of(path, "HEALTHCHECK").partition(" CMD ")[2])


def interpolated(value: str) -> str:
    """As compose reads it, with nothing in the environment."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)


def seconds(value: str) -> float:
    return float(value.removesuffix("s"))


compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
container = manifest("base/deployment.yaml", "Deployment")["spec"]["template"]["spec"]["containers"][0]
pod = manifest("base/deployment.yaml", "Deployment")["spec"]["template"]["spec"]
ARGUMENTS = {
    "compose": [interpolated(x) for x in compose["services"]["puna"]["command"]],
    "kubernetes": container["args"],
}


def settings_in(where: str) -> ServeSettings:
    model, *changes = ARGUMENTS[where]
    assert model == "/models"
    return read_settings(ServeSettings, None, changes)

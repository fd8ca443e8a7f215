"""The README tells the truth: every file is on its map, every command and setting it shows exists."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

from puna.cli.app import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def sources() -> list[Path]:
    return [path for path in (ROOT / "puna").rglob("*.*") if path.suffix in (".py", ".cpp", ".hpp")]


def test_every_file_is_on_the_map() -> None:
    files = [path for path in sources() if not path.name.startswith("__")]
    assert [str(path.relative_to(ROOT)) for path in files if f"`{path.name}`" not in README] == []


def test_the_map_names_no_file_that_is_gone() -> None:
    names = {path.name for path in sources()}
    assert [
        name
        for name in re.findall(r"^\| `(\w+\.(?:py|cpp|hpp))` \|", README, re.MULTILINE)
        if name not in names
    ] == []


def test_every_verb_shown_exists() -> None:
    verbs = set(get_command(app).commands)  # type: ignore[attr-defined]
    shown = set(re.findall(r"puna (\w+)", README)) - {"import", "load"}
    assert verbs <= shown
    assert set(re.findall(r"`puna (\w+)", README)) <= verbs


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", README))
def test_every_link_leads_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_make_targets_shown_exist() -> None:
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"^ {4}make (\S+)", README, re.MULTILINE)) <= set(targets)


def test_extras_are_what_the_makefile_installs() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"[{','.join(extras)}]" in (ROOT / "Makefile").read_text()

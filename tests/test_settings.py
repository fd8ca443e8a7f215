"""Strict settings: what is refused, in which words, and which changes matter on resume."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from puna.errors import SettingsError
from puna.settings import (
    Settings,
    differences,
    fixed,
    layout,
    neutral,
    overridden,
    parse,
    read_settings,
    to_toml,
)


class Inner(Settings):
    rate: float = Field(0.1, gt=0)
    threads: int = layout(2)


class Beside(Settings):
    depth: int = 1


class Other(Settings):
    rate: float = 1.0
    deep: Inner | None = None
    many: list[Inner] = []


class Outer(Settings):
    name: str = neutral("run")
    steps: int
    inner: Inner = Inner()
    maybe: int | None = None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["step=3"], "settings: 'steps' is required; unknown setting 'step'. Did you mean 'steps'?"),
        (
            ["steps=1", "inner.thread=3"],
            "settings: unknown setting 'inner.thread'. Did you mean 'inner.threads'?",
        ),
        (["steps=abc"], "settings: 'steps': input should be a valid integer, got 'abc'"),
        (["steps=1", "inner.rate=0"], "settings: 'inner.rate': input should be greater than 0, got 0"),
        (["steps=1.5"], "settings: 'steps': input should be a valid integer, got 1.5"),
        (["steps"], "expected key=value, got 'steps'"),
        (["steps=1", "steps.x=2"], "steps.x: 'steps' is a value, not a table"),
    ],
)
def test_faults_are_one_line_that_helps(overrides: list[str], message: str) -> None:
    with pytest.raises(SettingsError) as error:
        read_settings(Outer, None, overrides)
    assert str(error.value) == message


class Tree(Settings):
    name: str = "run"
    inner: Inner = Inner()
    other: Other = Other()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("threads", "Did you mean 'inner.threads' or 'other.deep.threads'?"),
        ("rate", "Did you mean 'inner.rate' or 'other.rate' or 'other.deep.rate'?"),
        ("other.threadz", "Did you mean 'inner.threads' or 'other.deep.threads'?"),
        ("other.rat", "Did you mean 'other.rate'?"),  # of its own group, where there is one
        ("othr", "Did you mean 'other'?"),
        ("depth", "Did you mean 'beside.depth'?"),
        ("zzz", "Settings here: name, inner, other"),
        ("inner.zzz", "Settings here: rate, threads"),
    ],
)
def test_an_unknown_name_is_looked_for_in_the_whole_tree(name: str, told: str) -> None:
    with pytest.raises(SettingsError) as error:
        parse(Tree, overridden({}, [f"{name}=1"]), beside={"beside": Beside})
    assert str(error.value) == f"settings: unknown setting {name!r}. {told}"


def test_file_then_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('steps = 5\nname = "a"\n[inner]\nrate = 0.5\n')
    settings = read_settings(Outer, path, ["inner.rate=0.25", "name=b c"])
    assert settings == Outer(steps=5, name="b c", inner=Inner(rate=0.25))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such settings file"), (b"steps = ", "not valid TOML"), (b"\xff\xfe", "not valid TOML")],
)
def test_unreadable_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=message):
        read_settings(Outer, path)


def test_toml_round_trip(tmp_path: Path) -> None:
    settings = Outer(steps=7, name='quote " and \\ and ü', inner=Inner(rate=1e-4))
    path = tmp_path / "run.toml"
    path.write_text(to_toml(settings), encoding="utf-8")
    assert read_settings(Outer, path) == settings


def test_differences_have_their_class() -> None:
    old = Outer(steps=1)
    new = Outer(steps=2, name="other", inner=Inner(threads=4), maybe=3)
    found = {change.key: (change.old, change.new, change.kind) for change in differences(old, new)}
    assert found == {
        "steps": (1, 2, "meaning"),
        "name": ("run", "other", "neutral"),
        "inner.threads": (2, 4, "layout"),
        "maybe": (None, 3, "meaning"),
    }


def test_a_fixed_field_is_a_class_of_its_own() -> None:
    class State(Settings):
        name: str = fixed("adamw")

    assert [change.kind for change in differences(State(), State(name="muon"))] == ["fixed"]


def test_settings_are_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        Outer(steps=1).steps = 2  # type: ignore[misc]

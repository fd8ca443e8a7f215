"""The door: quick to answer, exact in its exit codes, one line for every mistake."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest


def puna(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "puna", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)  # type: ignore[call-overload]


HEAVY = ("torch", "numpy", "transformers", "sentencepiece", "tokenizers", "pyarrow", "pydantic", "matplotlib")


@pytest.mark.parametrize("program", ["import puna", "import puna.cli"])
def test_importing_loads_nothing_heavy(program: str) -> None:
    code = f"{program}; import sys; print(*(m for m in {HEAVY!r} if m in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == ""


def test_help_is_quick() -> None:
    times = []
    for _ in range(3):
        began = time.perf_counter()
        assert puna("--help").returncode == 0
        times.append(time.perf_counter() - began)
    assert min(times) < 0.5


@pytest.mark.parametrize(
    "verb",
    [
        *("demo", "pretrain", "generate", "chat", "convert", "verify", "info", "report"),
        *("tokenizer train", "tokenizer encode", "tokenizer decode", "tokenizer inspect"),
    ],
)
def test_every_verb_has_help(verb: str) -> None:
    answer = puna(*verb.split(), "--help")
    assert answer.returncode == 0
    assert "Usage: " in answer.stdout


def test_version() -> None:
    import puna as package

    assert puna("--version").stdout == f"puna {package.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["pretrain"], "Missing argument"),
        (["pretrain", "nowhere.toml"], "nowhere.toml: no such settings file"),
        (["info", "no/such/place"], "no/such/place"),
        (["report", "no-such-run"], "no-such-run"),
        (["demo", "--minutes", "0.01"], "--minutes must be at least"),
        (["demo", "--minutes", "soon"], "valid number"),
        (["generate", ".", "--prompt", "x"], "not a model"),
        (["tokenizer", "inspect", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line_and_exit_two(arguments: list[str], message: str, tmp_path: Path) -> None:
    answer = puna(*arguments, cwd=tmp_path)
    assert answer.returncode == 2, answer.stderr
    assert message in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1, answer.stderr
    assert list(tmp_path.iterdir()) == []

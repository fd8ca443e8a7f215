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
        *("demo", "pretrain", "generate", "chat", "convert", "verify", "info", "bench", "report"),
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
        (["bench", "decoed"], "what must be one of decode, prefill, got 'decoed'. Did you mean 'decode'?"),
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


def test_a_conversion_that_is_told_to_end_leaves_nothing(tmp_path: Path) -> None:
    """Killed in the middle of writing, by a program that gives it SIGTERM as a scheduler does."""
    program = """
import os, signal, sys
from pathlib import Path
from puna import cli, formats
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.model.weights import weights_of
from puna.formats.gguf import writer

config = ModelConfig(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
)
formats.save("source", weights_of(Llama(config)))
append, seen = writer._append, []

def append_and_end(file, value):
    seen.append(value)
    if len(seen) == 3:
        assert [path.name for path in Path().iterdir() if path.name.startswith(".m.gguf")]
        os.kill(os.getpid(), signal.SIGTERM)
    return append(file, value)

writer._append = append_and_end
sys.argv = ["puna", "convert", "source", "m.gguf", "--to", "gguf"]
cli.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (143, "puna: stopped")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]

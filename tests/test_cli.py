"""The door: quick to answer, exact in its exit codes, one line for every mistake."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from puna.cli import printing
from tests.formats import gguf_files
from tests.model.shapes import CONFIGS, model_of


def puna(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "puna", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)  # type: ignore[call-overload]


HEAVY = ("torch", "numpy", "transformers", "sentencepiece", "tokenizers", "pyarrow", "pydantic", "matplotlib")


@pytest.mark.parametrize("program", ["import puna", "import puna.cli"])
def test_importing_loads_nothing_heavy(program: str) -> None:
    code = f"{program}; import sys; print(*(m for m in {HEAVY!r} if m in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == ""


# Each takes as long to import as a small model to load.
NOT_FOR_ANSWERS = (
    "transformers",
    "gguf",
    "yaml",
    "jinja2",
    "zstandard",
    "pyarrow",
    "matplotlib",
    "llguidance",
)
NOT_FOR_ANSWERS += (
    "huggingface_hub",
    "fastapi",
    "tensorboard",
    "puna.recipes.answering.generate_file",
    "puna.train",
)


def test_an_answer_loads_only_what_it_needs(tmp_path: Path) -> None:
    tokenizer = gguf_files.small_tokenizer()
    config = CONFIGS["grouped"].model_copy(update={"vocab_size": tokenizer.vocab_size})
    gguf_files.write(tmp_path / "m.gguf", model_of(config), tokenizer, dtype="q8_0")
    command = ["generate", str(tmp_path / "m.gguf"), "--prompt", "a", "--max-new-tokens", "1"]
    program = f"""
import sys
from puna import cli
sys.argv = ["puna", *{command!r}]
try:
    cli.main()
except SystemExit as end:
    print(end.code, *(module for module in {NOT_FOR_ANSWERS!r} if module in sys.modules))
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert told.splitlines()[-1] == "0"


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("raise KeyboardInterrupt", 130),
        ("os.kill(os.getpid(), signal.SIGINT)", 130),
        ("os.kill(os.getpid(), signal.SIGTERM)", 143),
    ],
)
def test_a_command_that_is_stopped_says_so(ending: str, code: int) -> None:
    program = f"""
import os, signal, sys, typer
from puna import cli
from puna.cli import app
app.app = typer.Typer()
@app.app.command()
def end():
    {ending}
sys.argv = ["puna"]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (code, "puna: stopped")


def test_stopped_while_it_starts_it_says_so_too() -> None:
    """Ctrl-C while the door itself is imported."""
    program = "import sys, puna.cli; sys.modules['typer'] = None; puna.cli.main()"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False).stderr
    assert "ModuleNotFoundError" in told  # the door is imported inside of main, where Ctrl-C is taken
    program = """
import signal, sys, puna.cli
class Finder:
    def find_spec(self, *arguments):
        signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder())
puna.cli.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "puna: stopped\n")


def test_a_pipe_that_nobody_reads_is_left_in_silence() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "puna", "generate", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_what_takes_long_is_announced_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(printing, "PATIENCE", 0.05)
    for terminal, in_time, told in (
        (True, False, "\x1b[2mLoading …\x1b[22m\n"),
        (True, True, ""),
        (False, False, ""),
    ):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        done = printing.announce("Loading …")
        if in_time:
            done()
        time.sleep(0.2)
        assert capsys.readouterr().err == told
        done()


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
        (
            ["bench", "decoed"],
            "must be one of train, decode, prefill, serve, got 'decoed'. Did you mean 'decode'?",
        ),
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

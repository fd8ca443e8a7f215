"""The whole path on this machine: the standard library's own source becomes a Llama that writes Python.

The settings below are an ordinary run's; `puna pretrain` on the run's own run.toml does the same.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from puna.errors import PunaError, SettingsError
from puna.progress import Track, duration
from puna.recipes.training.corpus import STDLIB
from puna.recipes.training.pretrain import pretrain
from puna.recipes.training.settings import PretrainSettings
from puna.settings import parse
from puna.train.history import read_history
from puna.train.run import GO_ON, RunDirectory

Say = Callable[[str], None]
SHORTEST = 1.0  # minutes; less is spent before the first update
# Share of the promised time that is planned: other work on the machine must not break the promise.
SAFETY = 0.85
PROMPT = "def read_lines(path):\n"


def demo_settings(directory: Path, minutes: float) -> PretrainSettings:
    """A model small enough to learn something on two cores in minutes."""
    return parse(
        PretrainSettings,
        {
            "out": str(directory),
            "length": {"minutes": SAFETY * minutes},
            "data": {"corpus": STDLIB, "row_length": 256},
            # Pieces that hold newlines and mix letters with signs take 13% fewer tokens for source code.
            "tokenizer": {"train": {"vocab_size": 4096, "newlines": "learned", "split_scripts": False}},
            "model": {
                "fields": {
                    "hidden_size": 256,
                    "intermediate_size": 704,
                    "num_hidden_layers": 6,
                    "num_attention_heads": 4,
                    "tie_word_embeddings": True,
                }
            },
            "batch": {"rows": 8},
            "optimizer": {"learning_rate": 2e-3},
            "schedule": {"warmup_steps": 60},
            "checkpoint": {"every": 250, "keep_last": 2},
            "validation": {"tokens": 40_000},
            "samples": {"prompts": [PROMPT], "new_tokens": 48},
        },
        "demo",
    )


def run_demo(directory: Path, minutes: float, say: Say, track: Track) -> dict[str, Any]:
    """Run it, continue an interrupted one, or say that it is finished.

    Raises:
        SettingsError: too little time, or the directory holds another run.
        InputError: the directory holds something else, or another process works in it.
    """
    if minutes < SHORTEST:
        raise SettingsError(f"--minutes must be at least {SHORTEST:g}, got {minutes:g}")
    run = RunDirectory(directory)
    if run.exists and run.settings(PretrainSettings).data.corpus != STDLIB:
        raise SettingsError(f"{directory} holds a run that is no demo; choose another directory with --dir")
    finished = read_history(run.metrics).summary if run.exists else {}
    if finished:
        say(
            f"The demo in {directory} is finished. To run it again, delete the directory or choose another "
            "with --dir."
        )
        _conclude(run, finished, say)
        return finished
    began, fresh = time.monotonic(), not run.exists
    say(
        f"Puna's demo: from raw text to a talking model, in about {minutes:g} minutes, in {directory}.\n"
        "The text is the source of Python's standard library, as it lies on this machine."
        if fresh
        else f"Continuing the interrupted demo in {directory}."
    )
    settings = demo_settings(directory, minutes) if fresh else run.settings(PretrainSettings)
    with _told_how_a_demo_goes_on():
        result = pretrain(settings, resume=True, say=say, track=track)
    say(f"{'All of it' if fresh else 'The rest of it'} took {duration(time.monotonic() - began)}.")
    _conclude(run, result, say)
    return result


@contextmanager
def _told_how_a_demo_goes_on() -> Iterator[None]:
    """Messages of a run name the option by which `puna pretrain` goes on with it; the demo does as it is."""
    try:
        yield
    except PunaError as error:
        error.args = (str(error).replace(GO_ON, "continue with the same command"),)
        raise


def _conclude(run: RunDirectory, result: dict[str, Any], say: Say) -> None:
    say(
        f"\nHeld-out bits per byte   model {result['bits_per_byte']:.3f}   gzip -9 {result['gzip']:.3f}   "
        f"xz -9 {result['xz']:.3f}   ({result['parameters']:,} parameters, {result['tokens']:,} tokens)\n"
        f"\nA completion:\n\n{_indented(PROMPT + _completion(run))}\n"
        f"\nWhere everything lies\n"
        f"  {run.model}/        the model: transformers and vLLM open it as it is\n"
        f"  {run.report}  what happened, as one page: open it in a browser\n"
        f"  {run.path}/corpus.json  which files were trained on, held out and left out, with their hashes\n"
        f"\nNext\n" + "\n".join(f"  {command}" for command in next_commands(run))
    )


def next_commands(run: RunDirectory) -> list[str]:
    """Three commands to try, each of which works as it stands."""
    puna = _puna()
    return [
        f"{puna} generate {run.path} --prompt 'def main():' --temperature 0.7 --seed 1",
        f"{puna} info {run.path}",
        f"{puna} pretrain {run.settings_file} out={run.path}-longer 'length={{minutes=30}}'",
    ]


def _completion(run: RunDirectory) -> str:
    """What the finished model writes; seeded, so that asking again shows the same."""
    from puna.engine.loading import load

    llm = load(run.path)
    return llm.generate(PROMPT, max_new_tokens=100, temperature=0.6, top_p=0.9, seed=1).text


def _puna() -> str:
    """How this very program is started from here."""
    script = Path(sys.executable).with_name("puna")
    try:
        return str(script.relative_to(Path.cwd()))
    except ValueError:
        return str(script)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())

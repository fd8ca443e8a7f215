"""The demo on the real standard library, cut short: what it says, and that its next commands work."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from puna.errors import Interrupted, PunaError, ResourceError, SettingsError
from puna.progress import silent
from puna.recipes import demo
from puna.recipes.training.settings import PretrainSettings
from puna.settings import read_settings, to_toml
from puna.train.run import GO_ON, RunDirectory

SMALL = {
    "length": {"steps": 8},
    "schedule": {"warmup_steps": 2},
    "determinism": {"threads": 1},
    "compile": {"mode": "off"},
    "precision": {"dtype": "float32"},
    "device": "cpu",
    "validation": {"tokens": 2000},
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], dict[str, Any]]:
    directory = tmp_path_factory.mktemp("demo") / "run"
    lines: list[str] = []

    class Recorder:
        def start_at(self, amount: float) -> None:
            pass

        def advance(self, amount: float, note: str = "") -> None:
            pass

        def say(self, text: str) -> None:
            lines.append(text)

    @contextmanager
    def track(label: str, total: float, unit: str) -> Iterator[Recorder]:
        yield Recorder()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "demo_settings", _shortened(demo.demo_settings))
        result = demo.run_demo(directory, 10.0, lines.append, track)
    return directory, lines, result


def _shortened(full: Any) -> Any:
    def settings(directory: Path, minutes: float) -> PretrainSettings:
        values = full(directory, minutes).model_dump(exclude_unset=True)
        small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
        fields = {**values["model"]["fields"], **small}
        return PretrainSettings.model_validate({**values, **SMALL, "model": {"fields": fields}})

    return settings


def test_it_shows_what_it_promises(ran: tuple[Path, list[str], dict[str, Any]]) -> None:
    directory, lines, result = ran
    text = "\n".join(lines)
    for expected in ("held out", "it writes", "validation loss", "gzip -9", "xz -9", "A completion", "Next"):
        assert expected in text, expected
    assert result["xz"] < result["gzip"] < result["bits_per_byte"]  # eight updates teach little
    corpus = json.loads((directory / "corpus.json").read_text())
    fates = {file["path"]: file["fate"] for file in corpus["files"]}
    assert fates["encodings/cp1252.py"] == "left out"
    assert corpus["held_out_bytes"] > 300_000
    assert all(len(file["sha256"]) == 64 for file in corpus["files"])


def test_a_second_time_it_says_that_it_is_finished(ran: tuple[Path, list[str], dict[str, Any]]) -> None:
    directory, _, result = ran
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}
    lines: list[str] = []
    again = demo.run_demo(directory, 10.0, lines.append, silent)
    assert "is finished" in lines[0]
    assert again["bits_per_byte"] == result["bits_per_byte"]
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("number", [0, 1])
def test_next_commands_work(ran: tuple[Path, list[str], dict[str, Any]], number: int) -> None:
    command = shlex.split(demo.next_commands(RunDirectory(ran[0]))[number])
    answer = subprocess.run(
        [sys.executable, "-m", "puna", *command[1:]], capture_output=True, text=True, timeout=120, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert ("def main():" if number == 0 else "parameters") in answer.stdout


def test_the_last_next_command_has_valid_settings(ran: tuple[Path, list[str], dict[str, Any]]) -> None:
    command = shlex.split(demo.next_commands(RunDirectory(ran[0]))[2])
    assert command[1] == "pretrain"
    longer = read_settings(PretrainSettings, Path(command[2]), command[3:])
    assert longer.length.minutes == 30
    assert longer.length.steps is None
    assert longer.out != str(ran[0])


STOPS = [
    (Interrupted(2, f"state is saved: {GO_ON}"), "state is saved: continue with the same command"),
    (ResourceError(f"free some space, then {GO_ON}"), "free some space, then continue with the same command"),
]


@pytest.mark.parametrize(("stop", "told"), STOPS)
def test_a_stopped_demo_is_not_told_of_an_option_that_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: PunaError, told: str
) -> None:
    def stopped(*given: Any, **named: Any) -> dict[str, Any]:
        raise stop

    monkeypatch.setattr(demo, "pretrain", stopped)
    with pytest.raises(type(stop)) as caught:
        demo.run_demo(tmp_path / "run", 10.0, lambda line: None, silent)
    assert str(caught.value) == told
    assert caught.value.exit_code == stop.exit_code


def test_another_run_is_not_taken_for_a_demo(tmp_path: Path) -> None:
    given = ["out=x", "length.steps=6", "data.train=['t']", "tokenizer.path=t", "model.preset=puna-1m"]
    (tmp_path / "run.toml").write_text(to_toml(read_settings(PretrainSettings, None, given)))
    with pytest.raises(
        SettingsError, match="holds a run that is no demo; choose another directory with --dir"
    ):
        demo.run_demo(tmp_path, 10.0, lambda line: None, silent)


def test_too_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="at least"):
        demo.run_demo(tmp_path / "run", 0.1, print, silent)
    assert list(tmp_path.iterdir()) == []

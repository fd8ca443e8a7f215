"""Mistakes at the door: one line, exit code 2, found before the text is read, and nothing left behind."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import puna
from puna import cli
from puna.cli import printing
from puna.engine.llm import LLM
from puna.errors import CheckpointError, InputError, ResourceError, SettingsError
from puna.model.presets import PRESETS
from puna.recipes.answering.generate import generate
from puna.recipes.training import opening, session
from puna.recipes.training.pretrain import pretrain
from puna.recipes.training.settings import ModelSettings, PretrainSettings
from puna.settings import read_settings
from puna.train.objectives import language_modelling
from tests.recipes.conftest import tiny

CONFIGS = Path(__file__).parents[2] / "configs"

GIVEN = ["out=x", "length.steps=6", "data.train=['t']", "tokenizer.path=t"]

IMPOSSIBLE = [
    ("model=3", "'model'"),
    ("model.preset=[1]", "'model.preset'"),
    ("optimizer.learning_rate=inf", "finite"),
    ("clip_norm=inf", "finite"),
    ("length.epochs=inf", "finite"),
    ("seed=9223372036854775808", "'seed'"),
    ("determinism.threads=100000", "'determinism.threads'"),
]


@pytest.mark.parametrize(("override", "message"), IMPOSSIBLE)
def test_impossible_values(override: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as raised:
        read_settings(PretrainSettings, None, [*GIVEN, override])
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_the_model_it_names(name: str) -> None:
    config = ModelSettings(preset=name).config(PRESETS[name].vocab_size, 2)
    assert config == PRESETS[name]
    wider = ModelSettings(preset=name, fields={"hidden_size": 2 * config.hidden_size})
    assert wider.config(512, 2).head_dim == 2 * config.head_dim  # derived anew


EARLY: list[tuple[dict[str, Any], str]] = [
    ({"model": {"fields": {"hiden_size": 32}}}, "hidden_size"),
    ({"model": {"fields": {"vocab_size": 9}}}, "vocab_size"),
    ({"model": {"preset": "puna-1m", "fields": {"max_position_embeddings": 16}}}, "row_length"),
    ({"model": {"preset": "llama-7", "fields": {}}}, "llama-7b"),
    ({"schedule": {"warmup_steps": 30}}, "warmup_steps"),
    ({"batch": {"rows": 8, "micro_rows": 3}}, "micro"),
    ({"memory": {"policy": "paper"}}, "know no dropout"),
    ({"memory": {"policy": "offload"}, "model": {"preset": "puna-1m", "fields": None}}, "main memory"),
    ({"precision": {"dtype": "bfloat16", "float8": True}}, "does not multiply in float8"),
    ({"precision": {"dtype": "float32", "weights": "bfloat16"}}, "needs products in bfloat16"),
]


@pytest.mark.parametrize(("changes", "message"), EARLY)
def test_found_before_the_text_is_read(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Tokenizing may take hours: the missing text would be told instead if it were looked for first."""
    with pytest.raises(InputError, match=message):
        pretrain(tiny(tmp_path / "run", tmp_path / "nowhere", **changes), say=lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_go_on_keeps_its_settings(
    tmp_path: Path, finished: tuple[Path, dict[str, Any]]
) -> None:
    """What was refused must not stand in run.toml, or the run's own settings would be refused next."""
    run = shutil.copytree(finished[0], tmp_path / "run")
    written = (run / "run.toml").read_bytes()
    stored = read_settings(PretrainSettings, run / "run.toml", [f"out={run}"])
    fields = {**stored.model.fields, "intermediate_size": 96}
    changed = stored.model_copy(update={"model": ModelSettings(fields=fields)})
    with pytest.raises(
        CheckpointError, match=r"step-30: of another model than .*\(.*96.*\); put them back, or"
    ):
        pretrain(changed, resume=True, allow_changes=True, say=lambda line: None)
    assert (run / "run.toml").read_bytes() == written
    assert pretrain(stored, resume=True, say=lambda line: None)["steps"] == stored.length.steps


STATE = [("optimizer", {"name": "muon"}, "optimizer.name: 'adamw' → 'muon'")]
STATE += [
    ("precision", {"dtype": "bfloat16", "weights": "bfloat16"}, "precision.weights: 'float32' → 'bfloat16'")
]


@pytest.mark.parametrize(("group", "changes", "told"), STATE)
@pytest.mark.parametrize("allowed", [False, True])
def test_what_the_saved_state_is_made_of_cannot_be_allowed_to_change(
    text: Path, finished: tuple[Path, dict[str, Any]], allowed: bool, group: str, changes: Any, told: str
) -> None:
    """What is possible instead is told before the text is read."""
    lines: list[str] = []
    with pytest.raises(
        CheckpointError, match="begin a new run from this one's model, with init_from"
    ) as caught:
        pretrain(
            tiny(finished[0], text, **{group: changes}), resume=True, allow_changes=allowed, say=lines.append
        )
    assert told in str(caught.value)
    assert "--allow-changes" not in str(caught.value)
    assert lines == []


def test_a_papers_model_misspelt_is_told_beside_what_its_recipe_would_have_brought() -> None:
    given = ["out=x", "data.train=['t']", "tokenizer.path=t", "model.preset=llama-7"]
    with pytest.raises(
        SettingsError, match=r"'length' is required; 'model\.preset': no preset .* Did you mean 'llama-7b'\?"
    ):
        read_settings(PretrainSettings, None, given)


def test_a_prompt_too_long_for_samples(tmp_path: Path, text: Path) -> None:
    with pytest.raises(SettingsError, match=r"samples\.prompts: the prompt has"):
        pretrain(tiny(tmp_path / "run", text, samples={"prompts": ["the llama " * 100]}))
    assert list(tmp_path.iterdir()) == []


def test_a_model_too_large_for_memory(tmp_path: Path, text: Path) -> None:
    fields = {
        "hidden_size": 400_000_000,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    with pytest.raises(ResourceError, match="no batch is small enough: take a smaller model"):
        pretrain(tiny(tmp_path / "run", text, model={"fields": fields}))
    assert list(tmp_path.iterdir()) == []


def test_a_batch_too_large_for_memory(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried out while the run can still be undone, whether compiled or not."""

    def full(*arguments: Any) -> None:
        raise ResourceError("out of memory")

    monkeypatch.setattr(opening, "rehearse", full)
    with pytest.raises(ResourceError):
        pretrain(tiny(tmp_path / "run", text))
    assert list(tmp_path.iterdir()) == []


def test_memory_runs_out_while_scoring(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def objective(model: Any, batch: Any) -> Any:
        if not torch.is_grad_enabled():
            raise torch.OutOfMemoryError("no")
        return language_modelling(model, batch)

    monkeypatch.setattr(session, "language_modelling", objective)
    with pytest.raises(ResourceError, match="while scoring 4 rows"):
        pretrain(tiny(tmp_path / "run", text))


def opened(run: Path) -> LLM:
    return puna.load(run, device="cpu", dtype="float32")


def test_generate_writes_nothing_before_it_knows(finished: tuple[Path, dict[str, Any]]) -> None:
    written: list[str] = []
    with pytest.raises(SettingsError, match="top_p"):
        generate(opened(finished[0]), ["hi"], {"top_p": 1.5}, written.append, written.append)
    assert written == []


def test_generate_gives_the_logprobs_asked_for(finished: tuple[Path, dict[str, Any]]) -> None:
    sampling = {"logprobs": 2, "max_new_tokens": 3, "temperature": 0.0}
    result = generate(opened(finished[0]), ["the"], sampling, lambda text: None, str)
    [completion] = json.loads(json.dumps(result))["completions"]
    assert [entry["token"] for entry in completion["logprobs"]] == completion["tokens"]
    assert all(entry["top"][0] == [entry["token"], entry["logprob"]] for entry in completion["logprobs"])


def test_a_terminal_that_cannot_show_a_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["puna", "--version"])
    with pytest.raises(SystemExit):
        cli.main()
    printing.write("8 × 64 \udcff")
    assert shown.getvalue().endswith(b"8 \\xd7 64 \\udcff")


def test_two_lengths_are_refused_with_the_way_to_replace_one() -> None:
    with pytest.raises(SettingsError, match=r"length\.tokens and length\.minutes are both given.*'length="):
        read_settings(PretrainSettings, CONFIGS / "gpu.toml", ["length.minutes=2"])
    replaced = read_settings(PretrainSettings, CONFIGS / "gpu.toml", ["length={minutes=2}"])
    assert (replaced.length.minutes, replaced.length.tokens) == (2, None)

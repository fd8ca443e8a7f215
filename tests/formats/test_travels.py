"""Real material through every format: the ids of a hundred thousand strings, and a known story."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import puna
from puna import formats
from puna.formats.convert import convert
from puna.formats.opening import FORMATS
from puna.model.config import ModelConfig
from puna.model.weights import weights_of
from puna.tokenizer import load
from tests.model.shapes import model_of
from tests.tokenizer.hard_strings import corpus_lines, drawn

WHOLE, SHARE = 100_000, 40
JOURNEYS = {  # each step read by its own reader
    "llama2": ("tokenizers/llama2/tokenizer.model", ("m.gguf", "hf", "m.bin", "meta", "n.gguf")),
    "llama3": ("tokenizers/llama3/tokenizer.model", ("m.gguf", "hf", "meta", "n.gguf")),
}
CASES = [
    pytest.param("llama2", SHARE, id="llama2-sample"),
    *(pytest.param(name, 1, id=f"{name}-whole", marks=pytest.mark.slow) for name in JOURNEYS),
]


def kind_of(name: str) -> str:
    return {"gguf": "gguf", "bin": "llama2c"}.get(name.rpartition(".")[2], name)


@pytest.mark.parametrize(("name", "share"), CASES)
def test_ids_are_the_same_after_every_conversion(name: str, share: int, assets: Path, tmp_path: Path) -> None:
    file, journey = JOURNEYS[name]
    tokenizer = load(assets / file)
    texts = [
        *dict.fromkeys((*drawn(60_000, list(tokenizer.specials)[:12]), *corpus_lines(assets / "corpora")))
    ]
    assert len(texts) >= WHOLE
    texts = texts if share == 1 else random.Random(0).sample(texts, len(texts) // share)
    expected = tokenizer.encode_batch(texts)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    formats.save(tmp_path / "start", weights_of(model_of(config)), tokenizer)
    at = tmp_path / "start"
    for step in journey:
        at = convert(formats.open_model(at), tmp_path / step, kind_of(step), verify=None).path
        found = formats.open_model(at).tokenizer()
        assert found is not None
        different = [
            row for row in zip(texts, found.encode_batch(texts), expected, strict=True) if row[1] != row[2]
        ]
        assert not different, f"{step}: {len(different)} differ, first {different[:2]!a}"


def test_the_story_is_told_from_every_format(assets: Path, tmp_path: Path) -> None:
    stories = assets / "weights" / "stories260K"
    expected = (stories / "greedy_200_steps.txt").read_text(encoding="utf-8")
    source = formats.open_model(stories / "stories260K.bin")
    for kind in FORMATS:
        path = convert(source, tmp_path / f"story.{kind}", kind, verify=None).path
        answer = puna.load(path, dtype="float32").generate("", max_new_tokens=200, temperature=0.0)
        assert answer.text.strip() == expected.strip(), kind

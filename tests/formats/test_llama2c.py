"""llama2.c's files against what llama2.c printed, and against a plain program that reads and runs them."""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import puna
from puna import formats
from puna.errors import ModelError, SettingsError
from puna.formats.content import Content
from puna.formats.llama2c import file as llama2c
from puna.formats.llama2c.file import Llama2cSettings
from puna.formats.packed import expanded
from puna.formats.source import Source
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.model.weights import Packed, Weights, load_weights, weights_of
from puna.settings import parse
from puna.tokenizer.reading import load
from puna.tokenizer.tokenizer import Tokenizer
from tests.model.shapes import CONFIGS, ids_of, model_of
from tests.reference import llama2c_run

HELD = ("multi-head", "grouped", "multi-query", "tied", "odd vocabulary")
MANNERS = {
    "legacy.bin": {},
    "one.bin": {"version": 1},
    "int8.bin": {"dtype": "int8", "group_size": 16},
    "ckpt.pt": {},
}
STORIES = Path("weights") / "stories260K"


def write(target: Path, content: Content, **settings: object) -> tuple[list[str], dict[str, object]]:
    """Write as a conversion does; returns the notes, and what was recorded."""
    recorded: dict[str, object] = {}
    wanted = parse(Llama2cSettings, settings)
    assert not list(llama2c.obstacles(content, wanted))
    return llama2c.write(target, content, wanted, recorded.__setitem__), recorded


def opened(source: Source) -> Llama:
    model = Llama(source.config)
    load_weights(model, expanded(source.weights))
    return model.eval()


def bytes_of(value: object) -> list[bytes]:
    parts = [value.data, value.scales] if isinstance(value, Packed) else [value]
    return [bytes(part.contiguous().numpy().tobytes()) for part in parts]


@pytest.fixture(scope="module")
def stories(assets: Path) -> Path:
    return assets / STORIES


@pytest.fixture(scope="module")
def story(stories: Path) -> Content:
    source = formats.open_model(stories / "stories260K.bin")
    return Content(source.weights, source.tokenizer(), source.end_ids, source.bos_id)


@torch.inference_mode()
def greedy(source: Source, steps: int) -> str:
    """BOS and what follows, as run.c prints it at temperature 0."""
    tokenizer, model = source.tokenizer(), opened(source)
    assert tokenizer is not None
    ids = [1]
    while len(ids) <= steps:
        index = int(model(torch.tensor([ids]))[0, -1].argmax())
        if index in source.end_ids:
            break
        ids.append(index)
    return tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["stories260K.bin", "stories260K.v1.bin"])
def test_the_published_model_tells_its_story(stories: Path, name: str) -> None:
    source = formats.open_model(stories / name)
    assert (source.format, source.end_ids, source.bos_id) == ("llama2c", (2, 1), 1)
    assert source.stored == {"float32": 47}
    assert greedy(source, 200) == (stories / "greedy_200_steps.txt").read_text()


@pytest.mark.parametrize("name", [name for name in MANNERS if name != "int8.bin"])
def test_the_story_survives_every_conversion(
    story: Content, stories: Path, name: str, tmp_path: Path
) -> None:
    write(tmp_path / name, story, **MANNERS[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, f"tok-{Path(name).stem}.bin"])
    assert greedy(formats.open_model(tmp_path / name), 200) == (stories / "greedy_200_steps.txt").read_text()


@pytest.mark.parametrize(
    ("settings", "name"), [({}, "stories260K.bin"), ({"version": 1}, "stories260K.v1.bin")]
)
def test_files_are_those_that_llama2c_writes(
    story: Content, stories: Path, settings: dict[str, object], name: str, tmp_path: Path
) -> None:
    write(tmp_path / name, story, **settings)
    assert (tmp_path / name).read_bytes() == (stories / name).read_bytes()
    assert (tmp_path / f"tok-{Path(name).stem}.bin").read_bytes() == (stories / "tok512.bin").read_bytes()


@torch.inference_mode()
def test_loss_on_stories(assets: Path) -> None:
    source = formats.open_model(assets / STORIES / "stories260K.bin")
    model, tokenizer = opened(source), source.tokenizer()
    assert tokenizer is not None
    text = next((assets / "corpora" / "tinystories").glob("*.txt")).read_text()
    total, count = 0.0, 0
    for part in [each.strip() for each in text.split("<|endoftext|>")][::100][:20]:
        ids = torch.tensor(tokenizer.encode(part)[:512])
        logits = model(ids[None, :-1])[0]
        total += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
        count += len(ids) - 1
    assert count == 7911
    assert total / count == pytest.approx(1.40925, abs=5e-6)


@torch.inference_mode()
@pytest.mark.parametrize("manner", ["legacy.bin", "one.bin", "int8.bin"])
@pytest.mark.parametrize("shape", HELD)
def test_a_plain_program_gets_the_same_logits(shape: str, manner: str, tmp_path: Path) -> None:
    config = CONFIGS[shape]
    model = model_of(config)
    write(tmp_path / manner, Content(weights_of(model)), **MANNERS[manner])
    ids = ids_of(config, 1, 24)
    theirs = llama2c_run.logits(llama2c_run.read(tmp_path / manner), ids[0].tolist())
    source = formats.open_model(tmp_path / manner)
    assert source.config == config
    ours = opened(source)(ids)[0]
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)
    if manner != "int8.bin":
        assert torch.equal(ours, model(ids)[0])


def test_the_story_in_int8_is_what_its_numbers_say(story: Content, tmp_path: Path) -> None:
    notes, _ = write(tmp_path / "int8.bin", story, dtype="int8")
    assert notes[0] == "group_size 4: 64 does not divide every row"  # the feed-forward width is 4 · 43
    source = formats.open_model(tmp_path / "int8.bin")
    assert source.stored == {"int8": 36, "float32": 11}
    ids = load_ids(story, "Once upon a time, there was a little girl named Lily.")
    with torch.inference_mode():
        ours = opened(source)(torch.tensor([ids]))[0]
        exact = opened(replace(source, weights=story.weights))(torch.tensor([ids]))[0]
    theirs = llama2c_run.logits(llama2c_run.read(tmp_path / "int8.bin"), ids)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert 0 < float((ours - exact).abs().max()) < 0.5
    assert torch.equal(ours.argmax(-1), exact.argmax(-1))


def load_ids(content: Content, text: str) -> list[int]:
    assert content.tokenizer is not None
    return content.tokenizer.encode(text)


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("shape", HELD)
def test_what_was_recorded_is_what_is_read(shape: str, manner: str, tmp_path: Path) -> None:
    weights = weights_of(model_of(CONFIGS[shape]))
    _, recorded = write(tmp_path / manner, Content(weights), **MANNERS[manner])
    source = formats.open_model(tmp_path / manner)
    assert source.config == CONFIGS[shape]
    assert source.open_tokenizer is None
    for _ in range(2):
        read = dict(source.weights)
        assert list(read) == list(recorded)
        for name, value in read.items():
            assert bytes_of(value) == bytes_of(recorded[name]), name


@pytest.mark.parametrize("manner", MANNERS)
def test_writing_what_was_read_gives_the_same_bytes(manner: str, tmp_path: Path) -> None:
    write(tmp_path / manner, Content(weights_of(model_of(CONFIGS["grouped"]))), **MANNERS[manner])
    again = tmp_path / "again"
    again.mkdir()
    write(again / manner, Content(formats.open_model(tmp_path / manner).weights), **MANNERS[manner])
    assert (again / manner).read_bytes() == (tmp_path / manner).read_bytes()


def test_packed_and_half_precision_weights_are_expanded(tmp_path: Path) -> None:
    model = model_of(CONFIGS["grouped"])
    half = Weights(model.config, [(name, value.bfloat16()) for name, value in weights_of(model)])
    write(tmp_path / "a.bin", Content(half))
    for (_, ours), (_, theirs) in zip(formats.open_model(tmp_path / "a.bin").weights, half, strict=True):
        assert torch.equal(ours, theirs.float())
    write(tmp_path / "b.bin", Content(half), dtype="int8", group_size=16)
    packed = formats.open_model(tmp_path / "b.bin").weights
    write(tmp_path / "c.bin", Content(packed))
    for (_, ours), (_, theirs) in zip(
        formats.open_model(tmp_path / "c.bin").weights, expanded(packed), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_groups_across_rows_are_read(tmp_path: Path) -> None:
    """llama2.c's own export asks only that groups divide the width, not the feed-forward width."""
    config = ModelConfig(
        vocab_size=96, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
    )
    whole = random.Random(0)
    counts = [96 * 32, *[32 * 32] * 8, *[40 * 32] * 6, 96 * 32]
    data = struct.pack("<Ii7iBi", 0x616B3432, 2, 32, 40, 2, 4, 4, 96, 2048, 0, 32).ljust(256, b"\0")
    data += np.linspace(0.5, 1.5, 32 * 5, dtype="<f4").tobytes()
    for count in counts:
        scales = np.array([whole.uniform(0.001, 0.01) for _ in range(count // 32)], "<f4")
        data += (
            np.array([whole.randrange(-127, 128) for _ in range(count)], "i1").tobytes() + scales.tobytes()
        )
    (tmp_path / "a.bin").write_bytes(data)
    source = formats.open_model(tmp_path / "a.bin")
    assert source.config == config
    assert source.stored == {"int8": 14, "float32": 7}
    ids = ids_of(config, 1, 12)
    theirs = llama2c_run.logits(llama2c_run.read(tmp_path / "a.bin"), ids[0].tolist())
    with torch.inference_mode():
        np.testing.assert_allclose(opened(source)(ids)[0], theirs, atol=1e-5, rtol=1e-5)


def test_tensors_are_views_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.bin", Content(weights_of(model_of(CONFIGS["grouped"]))))
    before = (tmp_path / "a.bin").read_bytes()
    mapped: list[int] = []

    def noting(*arguments: Any, **options: Any) -> Any:
        array = memmap(*arguments, **options)
        mapped.append(array.ctypes.data)
        return array

    memmap = np.memmap
    monkeypatch.setattr(np, "memmap", noting)
    read = dict(formats.open_model(tmp_path / "a.bin").weights)
    moved = ("q_proj", "k_proj")
    places = {value.data_ptr() for name, value in read.items() if not any(part in name for part in moved)}
    assert places <= set(mapped)
    read["model.norm.weight"].zero_()  # a copy on write
    assert (tmp_path / "a.bin").read_bytes() == before


def test_a_file_larger_than_memory_is_opened(tmp_path: Path) -> None:
    """A private mapping of the whole of it would be refused."""
    header = struct.pack("<7i", 64, 3_000_000, 400, 4, 4, -96, 64)
    tensors = 96 * 64 * 2 + 64 + 64 * 16 + 400 * (2 * 64 + 4 * 64 * 64 + 3 * 64 * 3_000_000)  # 922 GB
    with (tmp_path / "a.bin").open("wb") as file:
        file.write(header)
        file.truncate(28 + 4 * tensors)  # it takes no room on the disk
    name, value = next(iter(formats.open_model(tmp_path / "a.bin").weights))
    assert (name, tuple(value.shape)) == ("model.embed_tokens.weight", (96, 64))


def test_what_training_wrote_is_opened(tmp_path: Path) -> None:
    """A checkpoint as llama2.c's train.py saves it, compiled, with the optimizer, without hidden_dim."""
    model = model_of(CONFIGS["tied"])
    write(tmp_path / "a.pt", Content(weights_of(model)))
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    assert saved["model"]["output.weight"].data_ptr() == saved["model"]["tok_embeddings.weight"].data_ptr()
    del saved["model_args"]["hidden_dim"]
    saved["model"] = {f"_orig_mod.{name}": value for name, value in saved["model"].items()}
    saved["model"]["_orig_mod.freqs_cos"] = torch.zeros(16, 4)
    saved |= {
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0)}},
            "param_groups": [{"lr": 1e-3, "params": [0]}],
        },
        "best_val_loss": torch.tensor(1.5),
    }
    torch.save(saved, tmp_path / "b.pt")
    source = formats.open_model(tmp_path / "b.pt")
    assert source.config == model.config
    for (name, ours), (_, theirs) in zip(source.weights, weights_of(model), strict=True):
        assert torch.equal(ours, theirs), name


def test_an_untied_checkpoint_is_told(tmp_path: Path) -> None:
    notes, _ = write(tmp_path / "a.pt", Content(weights_of(model_of(CONFIGS["grouped"]))))
    assert "ties the output projection" in notes[0]


@pytest.mark.parametrize(
    ("shape", "what"),
    [
        ("attention bias", "biases"),
        ("mlp bias", "biases"),
        ("explicit head width", "heads of 16"),
        ("theta", "rms_norm_eps 1e-06"),
        ("theta", "rope_theta 500000"),
        ("linear", "rope scaling linear"),
        ("llama3", "rope scaling llama3"),
    ],
)
def test_what_no_model_remains_without(shape: str, what: str) -> None:
    found = list(llama2c.obstacles(Content(weights_of(model_of(CONFIGS[shape]))), Llama2cSettings()))
    assert any(what in obstacle.what and obstacle.without is None for obstacle in found)


def test_what_may_be_left_out(story: Content) -> None:
    assert story.tokenizer is not None
    windowed = story.config.model_copy(update={"sliding_window": 64})
    content = Content(
        Weights(windowed, story.weights.tensors),
        Tokenizer(story.tokenizer.codec, (), "{{ messages }}"),
        (2, 7),
        1,
    )
    told = []
    while found := list(llama2c.obstacles(content, Llama2cSettings())):
        assert found[0].without is not None
        told.append(found[0].what)
        content = found[0].without
    assert told == [
        "a sliding window of 64 (longer texts get other answers without it)",
        "end tokens other than 1 and 2 (7)",
        "a chat template",
    ]
    assert content.config == story.config
    assert content.tokenizer is not None
    assert content.end_ids == (2,)


def test_a_tokenizer_of_another_kind_may_be_left_out(assets: Path) -> None:
    weights = weights_of(Llama(ModelConfig(**{**CONFIGS["grouped"].model_dump(), "vocab_size": 128_256})))
    tokenizer = load(assets / "tokenizers" / "llama3" / "tokenizer.model")
    (obstacle,) = llama2c.obstacles(Content(weights, tokenizer), Llama2cSettings())
    assert "not SentencePiece" in obstacle.what
    assert obstacle.without is not None
    assert obstacle.without.tokenizer is None


def test_a_tokenizer_may_not_be_larger_than_the_model(story: Content) -> None:
    content = replace(story, weights=weights_of(model_of(CONFIGS["grouped"])))
    (obstacle,) = llama2c.obstacles(content, Llama2cSettings())
    assert "512 tokens for a model with 96 ids" in obstacle.what


def test_settings_that_contradict_each_other() -> None:
    for values in ({"dtype": "float32", "version": 2}, {"dtype": "int8", "version": 0}):
        with pytest.raises(SettingsError, match="does not hold"):
            parse(Llama2cSettings, values)


def test_names_that_cannot_be_written(tmp_path: Path) -> None:
    content = Content(weights_of(model_of(CONFIGS["tied"])))
    with pytest.raises(ModelError, match="a name for the tokenizer"):
        write(tmp_path / "tokenizer.bin", content)
    with pytest.raises(ModelError, match="checkpoint holds float32"):
        write(tmp_path / "ckpt.pt", content, dtype="int8")


def test_a_tokenizer_that_came_as_json_is_rebuilt(story: Content, stories: Path, tmp_path: Path) -> None:
    assert story.tokenizer is not None
    story.tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    tokenizer = load(tmp_path)
    assert tokenizer.kind == "tokenizer.json"
    out = tmp_path / "out"
    out.mkdir()
    write(out / "a.bin", replace(story, tokenizer=tokenizer))
    assert (out / "tok-a.bin").read_bytes() == (stories / "tok512.bin").read_bytes()


def test_a_model_with_more_ids_than_tokens(story: Content, tmp_path: Path) -> None:
    assert story.tokenizer is not None
    config = ModelConfig(**{**CONFIGS["grouped"].model_dump(), "vocab_size": 520})
    write(tmp_path / "a.bin", replace(story, weights=weights_of(model_of(config))))
    found = formats.open_model(tmp_path / "a.bin").tokenizer()
    assert found is not None
    assert found.fingerprint == story.tokenizer.fingerprint
    assert (tmp_path / "tok-a.bin").read_bytes().count(b"[PAD") == 8


@torch.inference_mode()
@pytest.mark.parametrize("end", [1, 2])
def test_a_text_ends_at_bos_and_at_eos(end: int, tmp_path: Path) -> None:
    """run.c ends at BOS: models of llama2.c learn it as what stands between two texts."""
    model = model_of(CONFIGS["grouped"])
    hidden = model.model(torch.tensor([[1]]))[0, -1]
    model.lm_head.weight.zero_()
    model.lm_head.weight[end] = hidden
    write(tmp_path / "a.bin", Content(weights_of(model)))
    llm = puna.load(tmp_path / "a.bin", device="cpu", dtype="float32")
    assert llm.generate([1], max_new_tokens=5, temperature=0.0).finish_reason == "stop"
    assert llm.generate([1], max_new_tokens=5, temperature=0.0, ignore_eos=True).tokens[0] == end

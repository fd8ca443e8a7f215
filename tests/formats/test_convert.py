"""Every format into every other: the same model, proved; nothing half-written, nothing lost in silence."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from puna import formats
from puna.errors import CheckFailed, ModelError, ResourceError, SettingsError
from puna.formats import opening, provenance
from puna.formats.convert import Conversion, convert
from puna.formats.opening import FORMATS
from puna.formats.proof.verify import VerifySettings
from puna.model.config import ModelConfig
from puna.model.weights import Weights, weights_of
from puna.tokenizer.chat import TEMPLATES, render
from puna.tokenizer.tokenizer import Tokenizer
from puna.tokenizer.train import TokenizerSettings, train
from tests.model.shapes import model_of

# What every format can hold.
PLAIN = ModelConfig(
    vocab_size=400,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
TEXTS = ["Hello  world", "def f(x):\n\treturn x + 1\n", "", " 0123456789", "é 日本 😀", "<s> a </s>"]
QUICK = VerifySettings(tokens=64, greedy_tokens=4)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train([inspect.getsource(argparse)], TokenizerSettings(vocab_size=400))


@pytest.fixture(scope="session")
def hf(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of PLAIN."""
    path = tmp_path_factory.mktemp("hf") / "model"
    formats.save(path, weights_of(model_of(PLAIN)), tokenizer, training={"steps": 7})
    return path


def name_for(kind: str) -> str:
    return {"gguf": "m.gguf", "llama2c": "m.bin"}.get(kind, kind)


def converted(source: Path, destination: Path, to: str, **options: Any) -> Conversion:
    return convert(formats.open_model(source), destination, to, **{"verify": QUICK, **options})


def payload(path: Path) -> str:
    return provenance.payload_hash(formats.open_model(path).weights)


@pytest.mark.parametrize(("first", "second"), [*itertools.product(FORMATS, repeat=2)])
def test_every_format_into_every_other(first: str, second: str, hf: Path, tmp_path: Path) -> None:
    at_first = converted(hf, tmp_path / "a" / name_for(first), first).path
    at_second = converted(at_first, tmp_path / "b" / name_for(second), second).path
    for path, kind in ((at_first, first), (at_second, second)):
        source = formats.open_model(path)
        assert source.format == kind
        assert source.config == PLAIN
        assert payload(path) == payload(hf)  # every bit of every tensor
        ours, theirs = source.tokenizer(), formats.open_model(hf).tokenizer()
        assert ours is not None and theirs is not None
        assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
        assert source.end_ids or ours.end_ids
    record = provenance.read(at_second)
    assert record is not None
    assert record["verified"] and record["verify"]["equal"]
    assert record["verify"]["logits"]["max_difference"] == 0.0
    assert record["source"]["format"] == first
    assert record["source"]["sha256"] == record["weights"]["sha256"] == payload(hf)
    assert record["training"] == {"steps": 7}


@pytest.mark.parametrize("kind", ["meta", "gguf"])
def test_the_chat_template_comes_along(kind: str, hf: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    chatty = Tokenizer(tokenizer.codec, tokenizer.end_ids, TEMPLATES["llama2"])
    formats.save(tmp_path / "chat", weights_of(model_of(PLAIN)), chatty)
    done = converted(tmp_path / "chat", tmp_path / "b" / name_for(kind), kind)
    found = formats.open_model(done.path).tokenizer()
    assert found is not None
    messages = [{"role": "user", "content": "What is <s>?"}]
    assert render(found, messages) == render(chatty, messages)


def test_what_a_format_cannot_hold_is_refused_by_name(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chatty = Tokenizer(tokenizer.codec, tokenizer.end_ids, TEMPLATES["llama2"])
    biased = PLAIN.model_copy(update={"attention_bias": True})
    formats.save(tmp_path / "chat", weights_of(model_of(PLAIN)), chatty)
    formats.save(tmp_path / "biased", weights_of(model_of(biased)), tokenizer)
    with pytest.raises(ModelError, match=r"llama2c cannot hold .*template.*; pass --weights-only"):
        converted(tmp_path / "chat", tmp_path / "a.bin", "llama2c")
    for to in ("llama2c", "meta"):
        with pytest.raises(ModelError, match=f"{to} cannot hold .*bias.*; choose another format"):
            converted(tmp_path / "biased", tmp_path / "b", to, weights_only=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["biased", "chat"]
    done = converted(tmp_path / "chat", tmp_path / "a.bin", "llama2c", weights_only=True)
    assert "template" in "".join(done.left_out)
    assert payload(done.path) == payload(tmp_path / "chat")


def test_a_window_beside_biases_is_no_class_of_transformers(tmp_path: Path) -> None:
    both = PLAIN.model_copy(update={"sliding_window": 8, "attention_bias": True})
    source = dataclasses.replace(
        formats.open_model(_saved(tmp_path, PLAIN)), weights=weights_of(model_of(both)), open_tokenizer=None
    )
    with pytest.raises(ModelError, match="hf cannot hold biases beside a sliding window of 8 positions"):
        convert(source, tmp_path / "out", "hf")


def _saved(directory: Path, config: ModelConfig) -> Path:
    formats.save(directory / "m", weights_of(model_of(config)))
    return directory / "m"


def test_a_window_is_left_out_only_when_asked(tmp_path: Path) -> None:
    windowed = PLAIN.model_copy(update={"sliding_window": 8})
    formats.save(tmp_path / "m", weights_of(model_of(windowed)))
    with pytest.raises(ModelError, match=r"meta cannot hold .*sliding window of 8"):
        converted(tmp_path / "m", tmp_path / "a", "meta")
    done = converted(tmp_path / "m", tmp_path / "a", "meta", weights_only=True)
    assert "sliding window of 8" in done.left_out[0]
    assert formats.open_model(done.path).config == PLAIN


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0", "q4_0", "q5_1"])
def test_a_coarser_type_is_equal_within_its_limits(dtype: str, hf: Path, tmp_path: Path) -> None:
    done = converted(hf, tmp_path / "m.gguf", "gguf", settings={"dtype": dtype})
    assert done.comparison is not None and done.comparison.equal
    assert done.comparison.divergence.max_difference > 0
    assert formats.open_model(done.path).stored[dtype] > 0
    again = converted(done.path, tmp_path / "n.gguf", "gguf")  # packed blocks stay as they are
    assert payload(again.path) == payload(done.path)
    expanded = converted(done.path, tmp_path / "hf", "hf", settings={"dtype": "float32"})
    assert expanded.comparison is not None
    assert expanded.comparison.divergence.max_difference == 0.0


def test_a_result_that_differs_is_not_kept(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = FORMATS["hf"]

    def wrong(target: Path, content: Any, settings: Any, record: Any) -> list[str]:
        def swapped() -> Any:
            held = dict(content.weights)
            for name in held:
                other = name.replace("gate_proj", "up_proj") if "gate_proj" in name else name
                yield name, held[other]

        changed = Weights(content.config, list(swapped()))
        return real.write(target, dataclasses.replace(content, weights=changed), settings, record)

    monkeypatch.setitem(opening.FORMATS, "hf", dataclasses.replace(real, write=wrong))
    with pytest.raises(CheckFailed, match="differs from its source and was not kept"):
        converted(hf, tmp_path / "out", "hf")
    assert list(tmp_path.iterdir()) == []


def test_bytes_that_the_disk_changes_are_noticed(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FORMATS["hf"]

    def flipped(target: Path, content: Any, settings: Any, record: Any) -> list[str]:
        notes = real.write(target, content, settings, record)
        data = bytearray((target / "model.safetensors").read_bytes())
        data[-1] ^= 1  # the last bit of one weight's sign and exponent
        (target / "model.safetensors").write_bytes(data)
        return notes

    monkeypatch.setitem(opening.FORMATS, "hf", dataclasses.replace(real, write=flipped))
    with pytest.raises(CheckFailed, match="does not give back the tensors written"):
        converted(hf, tmp_path / "out", "hf")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_nothing(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> list[str]:
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(opening.FORMATS, "gguf", dataclasses.replace(FORMATS["gguf"], write=full))
    with pytest.raises(ResourceError, match="No space left"):
        converted(hf, tmp_path / "m.gguf", "gguf")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_destination_needs_force(hf: Path, tmp_path: Path) -> None:
    converted(hf, tmp_path / "m.gguf", "gguf")
    before = (tmp_path / "m.gguf").read_bytes()
    with pytest.raises(ModelError, match=r"exists already; .* pass --force to replace it$"):
        converted(hf, tmp_path / "m.gguf", "gguf", settings={"dtype": "float16"})
    assert (tmp_path / "m.gguf").read_bytes() == before
    converted(hf, tmp_path / "m.gguf", "gguf", settings={"dtype": "float16"}, force=True)
    assert len((tmp_path / "m.gguf").read_bytes()) < len(before)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="is not a model"):
        converted(hf, tmp_path / "notes.txt", "gguf", force=True)
    with pytest.raises(ModelError, match="is a file, and this format is a directory"):
        converted(hf, tmp_path / "m.gguf", "hf", force=True)


def test_the_source_is_never_replaced_by_another_way_to_it(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = converted(hf, tmp_path / "copy", "hf", verify=None).path
    before = sorted(path.name for path in copy.iterdir())
    (tmp_path / "deep").mkdir()
    (tmp_path / "alias").symlink_to("copy")
    (tmp_path / "cache").mkdir()  # as the hub's cache is, files are links
    for path in copy.iterdir():
        (tmp_path / "cache" / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for source, target in itertools.product(("copy", "alias", "deep/../copy", "cache"), ("copy", "alias")):
        with pytest.raises(ModelError, match="where the source lies"):
            converted(Path(source), Path(target), "meta", verify=None, force=True)
    with pytest.raises(ModelError, match="where the source lies"):
        converted(Path("copy"), Path("deep/../copy"), "meta", verify=None, force=True)
    assert sorted(path.name for path in copy.iterdir()) == before
    assert converted(Path("cache"), Path("deep/../new/"), "hf", verify=None).path == tmp_path / "new"


def test_the_working_directory_is_not_replaced_under_who_stands_in_it(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="is the working directory"):
        converted(hf, Path(), "hf", verify=None)


def test_names_that_no_file_can_have_are_one_line(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")  # a link to itself is replaced as any dangling one
    assert converted(hf, tmp_path / "loop", "gguf", verify=None).path.is_file()
    with pytest.raises(ModelError, match="File name too long"):
        converted(hf, tmp_path / ("a" * 300), "gguf", verify=None)
    with pytest.raises(ModelError, match="cannot be read"):
        formats.resolve(tmp_path / ("a" * 300))
    with pytest.raises(ModelError, match=r"^m\.pt: a checkpoint holds float32"):
        converted(hf, tmp_path / "m.pt", "llama2c", settings={"dtype": "int8"})


def test_directories_made_for_a_conversion_that_failed_go_with_it(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any, **options: Any) -> Any:
        raise CheckFailed("as if")

    (tmp_path / "there").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("puna.formats.convert._compared", failing)
        with pytest.raises(CheckFailed, match="as if"):
            converted(hf, tmp_path / "there" / "a" / "b" / "m.gguf", "gguf")
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
    assert converted(hf, tmp_path / "there" / "a" / "b" / "m.gguf", "gguf", verify=None).path.is_file()


def test_a_damaged_record_of_the_source_is_told_before_anything_is_written(hf: Path, tmp_path: Path) -> None:
    copy = converted(hf, tmp_path / "copy", "hf", verify=None).path
    (copy / "puna.json").write_text('{"format_version": 9}')
    with pytest.raises(ModelError, match="update Puna"):
        converted(copy, tmp_path / "new" / "m.gguf", "gguf", verify=None)
    assert not (tmp_path / "new").exists()


def test_what_else_lies_in_a_directory_is_not_lost(hf: Path, tmp_path: Path) -> None:
    converted(hf, tmp_path / "m", "hf")
    (tmp_path / "m" / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match=r"holds more than a model \(notes.txt\)"):
        converted(hf, tmp_path / "m", "meta", force=True)
    (tmp_path / "m" / "notes.txt").unlink()
    converted(hf, tmp_path / "m", "meta", force=True)
    assert formats.open_model(tmp_path / "m").format == "meta"


@pytest.mark.parametrize("kind", ["meta", "gguf"])
def test_who_came_first_is_not_written_over(
    kind: str, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process makes the destination while this one writes."""
    target, real = tmp_path / name_for(kind), FORMATS[kind]

    def raced(*arguments: Any) -> list[str]:
        if real.is_directory:
            target.mkdir()
            (target / "thesis.tex").write_text("years of work")
        else:
            target.write_text("years of work")
        return real.write(*arguments)

    monkeypatch.setitem(opening.FORMATS, kind, dataclasses.replace(real, write=raced))
    with pytest.raises(ModelError, match=r"exists already; .* pass --force to replace it$"):
        converted(hf, target, kind)
    assert (target / "thesis.tex" if real.is_directory else target).read_text() == "years of work"
    assert list(tmp_path.iterdir()) == [target]


def test_a_name_that_means_a_directory_is_no_file(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is the name of a part of a directory"):
        converted(hf, tmp_path / "model.safetensors", "gguf")


@pytest.mark.parametrize("kind", ["hf", "meta"])
def test_generation_settings_come_along(kind: str, hf: Path, tmp_path: Path) -> None:
    source = converted(hf, tmp_path / "a", "hf").path
    path = source / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "temperature": 0.6, "top_p": 0.9}))
    done = converted(source, tmp_path / "b", kind)
    values = json.loads((done.path / "generation_config.json").read_text())
    assert (values["temperature"], values["top_p"]) == (0.6, 0.9)
    single = converted(source, tmp_path / "m.gguf", "gguf")
    assert "generation settings temperature, top_p" in " ".join(single.notes)


def test_a_tokenizer_given_keeps_the_model_s_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chatty = Tokenizer(tokenizer.codec, tokenizer.end_ids, TEMPLATES["llama2"])
    formats.save(tmp_path / "chat", weights_of(model_of(PLAIN)), chatty)
    done = converted(tmp_path / "chat", tmp_path / "m.gguf", "gguf", tokenizer=tokenizer)
    found = formats.open_model(done.path).tokenizer()
    assert found is not None and found.chat_template == TEMPLATES["llama2"]


def test_two_models_in_one_directory_keep_their_tokenizers(
    hf: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    other = train(["a b c " * 400, inspect.getsource(dataclasses)], TokenizerSettings(vocab_size=400))
    formats.save(tmp_path / "other", weights_of(model_of(PLAIN)), other)
    converted(hf, tmp_path / "bins" / "one.bin", "llama2c")
    converted(tmp_path / "other", tmp_path / "bins" / "two.bin", "llama2c")
    for name, meant in (("one", tokenizer), ("two", other)):
        found = formats.open_model(tmp_path / "bins" / f"{name}.bin").tokenizer()
        assert found is not None and found.fingerprint == meant.fingerprint


def test_the_source_is_never_replaced(hf: Path, tmp_path: Path) -> None:
    copy = converted(hf, tmp_path / "copy", "hf").path
    with pytest.raises(ModelError, match="where the source lies"):
        converted(copy, copy, "meta", force=True)


def test_unverified_is_recorded(hf: Path, tmp_path: Path) -> None:
    done = converted(hf, tmp_path / "m", "meta", verify=None)
    record = json.loads((tmp_path / "m" / "puna.json").read_text())
    assert (record["verified"], record["verify"], done.comparison) == (False, None, None)
    assert record["source"]["sha256"] == record["weights"]["sha256"] == payload(hf)


@pytest.mark.parametrize(
    ("to", "settings", "message"),
    [
        ("onnx", {}, "no format is called 'onnx'"),
        ("gguf", {"shards": 2}, "unknown setting 'shards'"),
        ("hf", {"dtype": "q4_0"}, "'dtype'"),
        ("meta", {"shards": 3}, "3"),
    ],
)
def test_impossible_settings(
    to: str, settings: dict[str, Any], message: str, hf: Path, tmp_path: Path
) -> None:
    with pytest.raises((SettingsError, ModelError), match=message):
        converted(hf, tmp_path / "m", to, settings=settings)
    assert list(tmp_path.iterdir()) == []


def test_one_tensor_at_a_time(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that was written is let go before the next is read."""
    import weakref

    source = formats.open_model(hf)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def counted() -> Any:
        nonlocal most
        for name, value in source.weights:
            assert isinstance(value, torch.Tensor)
            copy = value.clone()
            del value
            alive.append(weakref.ref(copy))
            most = max(most, sum(ref() is not None for ref in alive))
            yield name, copy
            del copy

    for kind in FORMATS:
        streamed = dataclasses.replace(source, weights=Weights(source.config, _Again(counted)))
        convert(streamed, tmp_path / name_for(kind), kind, verify=None)
    assert most <= 2


class _Again:
    def __init__(self, make: Any) -> None:
        self._make = make

    def __iter__(self) -> Any:
        return self._make()

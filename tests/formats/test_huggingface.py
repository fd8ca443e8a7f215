"""Directories that transformers opens with the same logits, and back; sharded, tied, cast, refused."""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from puna import formats
from puna.devices import DTYPES
from puna.errors import ModelError, ResourceError
from puna.formats import provenance
from puna.formats.casting import is_finite
from puna.formats.huggingface.directory import CONFIG, GENERATION, HuggingFaceSettings
from puna.formats.huggingface.safetensors_reader import INDEX, SINGLE
from puna.formats.packed import pack, unpack
from puna.model.llama import Llama
from puna.model.weights import Weights, weights_of
from puna.tokenizer.train import TokenizerSettings, train
from tests.formats.conftest import edit, reopened, same
from tests.model.shapes import CONFIGS, ids_of, model_of

LENGTH = 40  # two and a half times the configs' context


def gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_gives_the_same_logits_there_and_back(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = model_of(CONFIGS[name]).eval()
    ids = ids_of(model.config, 2, LENGTH)
    formats.save(tmp_path / "ours", weights_of(model))

    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report.values())
    assert gap(model(ids), theirs(ids).logits) < 1e-5

    theirs.save_pretrained(tmp_path / "theirs")
    assert same(reopened(tmp_path / "theirs"), model)


@torch.no_grad()
@pytest.mark.parametrize("name", ["grouped", "tied"])
def test_shards_hold_the_same(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = model_of(CONFIGS[name])
    formats.save(tmp_path / "one", weights_of(model))
    formats.save(tmp_path / "many", weights_of(model), settings=HuggingFaceSettings(shard_bytes=9000))
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    index = json.loads((tmp_path / "many" / INDEX).read_text())

    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert {path.name for path in files} == set(index["weight_map"].values())
    total = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert index["metadata"]["total_size"] == total
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 9000
        assert {name for name, home in index["weight_map"].items() if home == file.name} == set(tensors)
    assert same(reopened(tmp_path / "many"), model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "many")
    assert gap(model(ids_of(model.config, 1, 12)), theirs(ids_of(model.config, 1, 12)).logits) < 1e-5
    hashes = [provenance.read(tmp_path / kind)["weights"]["sha256"] for kind in ("one", "many")]
    assert hashes[0] == hashes[1]
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="9KB")
    assert provenance.payload_hash(formats.open_model(tmp_path / "theirs").weights) == hashes[0]


def test_files_are_what_safetensors_itself_would_hold(saved: Path, model: Llama) -> None:
    tensors = load_file(saved / SINGLE)
    assert list(tensors) and tensors.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(tensors[name], value) for name, value in model.named_parameters())
    header = int.from_bytes((saved / SINGLE).read_bytes()[:8], "little")
    assert (8 + header) % 64 == 0  # mapped tensors begin on a cache line


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_a_type_may_be_chosen(dtype: str, model: Llama, tmp_path: Path) -> None:
    formats.save(tmp_path / "cast", weights_of(model), settings=HuggingFaceSettings(dtype=dtype))
    source = formats.open_model(tmp_path / "cast")
    assert source.dtype == DTYPES[dtype]
    assert set(source.stored) == {dtype}
    assert json.loads((tmp_path / "cast" / CONFIG).read_text())["dtype"] == dtype
    expected = dict(model.named_parameters())
    for name, tensor in source.weights:
        assert torch.equal(tensor, expected[name].to(DTYPES[dtype])), name


def test_weights_may_be_read_again(saved: Path) -> None:
    weights = formats.open_model(saved).weights
    assert [name for name, _ in weights] == [name for name, _ in weights]


def test_tokens_that_begin_and_end(saved: Path) -> None:
    source = formats.open_model(saved)
    assert (source.bos_id, source.end_ids, source.tokenizer()) == (1, (2, 7), None)
    assert json.loads((saved / GENERATION).read_text()) == {"bos_token_id": 1, "eos_token_id": [2, 7]}
    edit(saved / GENERATION, lambda values: values.update(eos_token_id=5))
    assert formats.open_model(saved).end_ids == (5,)
    (saved / GENERATION).unlink()
    assert formats.open_model(saved).end_ids == (2, 7)


def test_the_tokenizer_comes_along(model: Llama, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = inspect.getsource(argparse)
    tokenizer = train([source], TokenizerSettings(vocab_size=400))
    formats.save(tmp_path / "whole", weights_of(model), tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "whole")
    for text in [*source.splitlines()[:200], "", "  two  spaces", "é 日本 😀", "0123 4.5"]:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
    opened = formats.open_model(tmp_path / "whole")
    found = opened.tokenizer()
    assert found is not None and found.fingerprint == tokenizer.fingerprint
    assert (opened.bos_id, opened.end_ids) == (tokenizer.bos_id, tokenizer.end_ids)
    record = provenance.read(tmp_path / "whole")
    assert record["tokenizer"] == {"fingerprint": tokenizer.fingerprint, "kind": tokenizer.kind}


def test_provenance_says_what_it_was_told(model: Llama, tmp_path: Path) -> None:
    formats.save(tmp_path / "m", weights_of(model), source="elsewhere", training={"steps": 3})
    record = provenance.read(tmp_path / "m")
    assert (record["source"], record["training"], record["tokenizer"]) == ("elsewhere", {"steps": 3}, None)
    assert record["weights"]["tensors"] == len(list(model.parameters()))
    assert record["weights"]["dtype"] == "float32"
    assert record["weights"]["sha256"] == provenance.payload_hash(weights_of(model))
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6
    assert record["weights"]["sha256"] != provenance.payload_hash(weights_of(model))


def test_provenance_may_be_absent_but_not_of_the_future(saved: Path) -> None:
    edit(saved / "puna.json", lambda values: values.update(format_version=2))
    with pytest.raises(ModelError, match="format_version 2"):
        provenance.read(saved)
    (saved / "puna.json").unlink()
    assert provenance.read(saved) is None
    assert formats.open_model(saved).config


# What is there already, and what fails half-way


def listing(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_an_existing_destination_is_left_alone(saved: Path, model: Llama) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(ModelError, match=r"exists already.*overwrite=True"):
        formats.save(saved, weights_of(model))
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    formats.save(saved, weights_of(model), settings=HuggingFaceSettings(dtype="bfloat16"), overwrite=True)
    assert formats.open_model(saved).dtype == torch.bfloat16
    assert listing(saved.parent) == ["saved"]


def test_only_a_model_is_ever_written_over(tmp_path: Path, model: Llama) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(ModelError, match="not a model, so it is not replaced"):
        formats.save(tmp_path / "home", weights_of(model), overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


def test_an_empty_directory_and_a_missing_parent_will_do(tmp_path: Path, model: Llama) -> None:
    (tmp_path / "empty").mkdir()
    formats.save(tmp_path / "empty", weights_of(model))
    formats.save(tmp_path / "new" / "deep", weights_of(model))
    assert same(reopened(tmp_path / "empty"), reopened(tmp_path / "new" / "deep"))


def test_a_save_that_fails_leaves_nothing_and_spoils_nothing(saved: Path, model: Llama) -> None:
    def breaking():
        yield from list(weights_of(model))[:9]
        raise KeyboardInterrupt

    for target in (saved, saved.parent / "new"):
        with pytest.raises(KeyboardInterrupt):
            formats.save(target, Weights(model.config, breaking()), overwrite=True)
    assert listing(saved.parent) == ["saved"]
    assert same(reopened(saved), model)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_said_so(tmp_path: Path, model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def full(path: Path, *arguments: object, **options: object) -> object:
        return opened(Path("/dev/full") if "shard-" in path.name else path, *arguments, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(ResourceError, match="free some space"):
        formats.save(tmp_path / "m", weights_of(model))
    assert listing(tmp_path) == []


def test_a_place_that_cannot_be_written_to_is_said_so(tmp_path: Path, model: Llama) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelError, match="Not a directory while writing the model"):
        formats.save(tmp_path / "file" / "m", weights_of(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_value_among_many_is_found(dtype: torch.dtype, value: float) -> None:
    tensor = torch.randn(100, 1001).to(dtype)
    assert is_finite(tensor)
    for place in (0, 777, -1):
        bad = tensor.clone()
        bad.view(-1)[place] = value
        assert not is_finite(bad)


def changed(model: Llama, **changes: object) -> Weights:
    """The model's weights with some replaced; None leaves one out."""
    tensors = {
        **dict(weights_of(model)),
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    return Weights(model.config, [(name, value) for name, value in tensors.items() if value is not None])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "lack model.norm.weight"),
        (torch.ones(31), "model.norm.weight .31. is not a tensor"),
        (torch.full((32,), torch.nan), "NaN or infinite"),
        (torch.full((32,), torch.inf), "NaN or infinite"),
        (torch.full((32,), 1e6), "overflows float16"),
    ],
)
def test_weights_that_cannot_be_stored_are_refused(
    model: Llama, tmp_path: Path, value: object, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        formats.save(
            tmp_path / "m",
            changed(model, model__norm__weight=value),
            settings=HuggingFaceSettings(dtype="float16"),
        )
    assert listing(tmp_path) == []


def test_a_packed_tensor_is_expanded_to_the_type_asked_for(model: Llama, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    packed = pack(dict(model.named_parameters())[name].detach(), "q8_0")
    weights = changed(model, model__layers__0__mlp__up_proj__weight=packed)
    formats.save(tmp_path / "m", weights, settings=HuggingFaceSettings(dtype="float32"))
    assert torch.equal(dict(formats.open_model(tmp_path / "m").weights)[name], unpack(packed))


# What others write


def rewrite(saved: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of a saved model; None leaves one out."""
    tensors = load_file(saved / SINGLE)
    tensors |= {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, saved / SINGLE)


def test_frequencies_that_old_files_carry_are_not_missed(saved: Path, model: Llama) -> None:
    rewrite(saved, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4, dtype=torch.int64))
    assert same(reopened(saved), model)


def test_a_tied_head_may_be_stored_or_left_out(tmp_path: Path) -> None:
    model = model_of(CONFIGS["tied"])
    formats.save(tmp_path / "m", weights_of(model))
    assert "lm_head.weight" not in load_file(tmp_path / "m" / SINGLE)
    rewrite(tmp_path / "m", lm_head__weight=model.lm_head.weight.detach().clone())
    assert same(reopened(tmp_path / "m"), model)


@torch.no_grad()
def test_a_head_that_differs_is_not_tied_as_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = model_of(CONFIGS["tied"])
    formats.save(tmp_path / "m", weights_of(model))
    rewrite(tmp_path / "m", lm_head__weight=model.lm_head.weight.detach() + 1)
    opened = reopened(tmp_path / "m")
    assert not opened.config.tie_word_embeddings
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    ids = ids_of(model.config, 1, 12)
    assert gap(opened(ids), theirs(ids).logits) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__norm__weight": None}, "model.norm.weight is missing from the weights"),
        ({"model__norm__weight": torch.ones(31)}, r"norm.weight has shape \[31\], expected \[32\]"),
        ({"model__norm__weight": torch.full((32,), torch.nan)}, "model.norm.weight holds NaN or infinite"),
        ({"model__norm__weight": torch.ones(32, dtype=torch.int32)}, "stored as I32; expected one of"),
        ({"model__norm__bias": torch.ones(32)}, "model.norm.bias is not part of a model.*Did you mean"),
        ({f"extra{i}": torch.ones(1) for i in range(7)}, "extra0, .*extra4 and 2 more are not part"),
        (
            {"model__layers__2__mlp__up_proj__weight": torch.ones(1)},
            "expected 2 layers .* found tensors of 3",
        ),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named(
    saved: Path, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    rewrite(saved, **changes)
    with pytest.raises(ModelError, match=message) as caught:
        list(formats.open_model(saved).weights)
    assert "\n" not in str(caught.value)


def test_a_config_of_another_size_is_told(saved: Path) -> None:
    edit(saved / CONFIG, lambda values: values.update(hidden_size=64, head_dim=8))
    with pytest.raises(ModelError, match=r"embed_tokens.weight has shape \[96, 32\], expected \[96, 64\]"):
        formats.open_model(saved)
    edit(saved / CONFIG, lambda values: values.update(num_hidden_layers=10**9))
    with pytest.raises(ModelError, match="expected 1000000000 layers"):
        formats.open_model(saved)


def test_missing_shards_are_named(model: Llama, tmp_path: Path) -> None:
    formats.save(tmp_path / "m", weights_of(model), settings=HuggingFaceSettings(shard_bytes=9000))
    first, second = sorted((tmp_path / "m").glob("*.safetensors"))[:2]
    first.unlink()
    second.unlink()
    with pytest.raises(ModelError, match=f"{first.name}, {second.name} are missing of"):
        formats.open_model(tmp_path / "m")


def test_a_shard_without_its_index_says_so(model: Llama, tmp_path: Path) -> None:
    formats.save(tmp_path / "m", weights_of(model), settings=HuggingFaceSettings(shard_bytes=9000))
    (tmp_path / "m" / INDEX).unlink()
    with pytest.raises(ModelError, match=f"needs {INDEX}"):
        formats.open_model(tmp_path / "m")


def test_a_tensor_in_two_files_is_told(model: Llama, tmp_path: Path) -> None:
    formats.save(tmp_path / "m", weights_of(model), settings=HuggingFaceSettings(shard_bytes=9000))
    first, second = sorted((tmp_path / "m").glob("*.safetensors"))[:2]
    second.write_bytes(first.read_bytes())
    with pytest.raises(ModelError, match=f"is both in {first.name} and {second.name}"):
        formats.open_model(tmp_path / "m")


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "a/b"])
def test_an_index_may_not_point_outside(model: Llama, tmp_path: Path, name: str) -> None:
    formats.save(tmp_path / "m", weights_of(model), settings=HuggingFaceSettings(shard_bytes=9000))
    edit(tmp_path / "m" / INDEX, lambda values: values["weight_map"].update({"model.norm.weight": name}))
    with pytest.raises(ModelError, match="is not the name of a file beside it"):
        formats.open_model(tmp_path / "m")

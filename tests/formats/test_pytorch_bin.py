"""Hugging Face directories of before safetensors: transformers' logits, shards, shared storages, damage."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from puna import formats
from puna.errors import ModelError
from puna.formats.huggingface.safetensors_reader import SINGLE as SAFETENSORS
from puna.model.llama import Llama
from puna.model.weights import weights_of
from tests.formats.conftest import edit, reopened, same
from tests.formats.damage import bent, bounded, cut_or_flipped, fuzz
from tests.formats.torch_damage import bent_archive
from tests.model.shapes import CONFIGS, ids_of, model_of

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def as_bin(path: Path, model: Llama, shards: int = 1, **extra: Tensor) -> Path:
    """A model as transformers used to save it; `extra` tensors go into the first file."""
    formats.save(path, weights_of(model), end_ids=[2], bos_id=1)
    (path / SAFETENSORS).unlink()
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors = {**{name.replace("__", "."): value for name, value in extra.items()}, **tensors}
    names = list(tensors)
    if shards == 1:
        torch.save(tensors, path / SINGLE)
        return path
    homes = {
        name: f"pytorch_model-{i * shards // len(names) + 1:05d}-of-{shards:05d}.bin"
        for i, name in enumerate(names)
    }
    for home in set(homes.values()):
        torch.save({name: tensors[name] for name in names if homes[name] == home}, path / home)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    return path


@torch.no_grad()
@pytest.mark.parametrize("name", ["grouped", "tied", "llama3", "attention bias"])
def test_what_transformers_held_is_read_with_its_logits(name: str, tmp_path: Path) -> None:
    """transformers no longer writes these files: its tensors are saved as it did."""
    transformers = pytest.importorskip("transformers")
    model = model_of(CONFIGS[name]).eval()
    formats.save(tmp_path / "ours", weights_of(model))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    theirs.config.save_pretrained(tmp_path / "theirs")
    torch.save(theirs.state_dict(), tmp_path / "theirs" / SINGLE)
    source = formats.open_model(tmp_path / "theirs")
    assert (source.format, source.stored) == ("hf", {"float32": len(list(model.parameters()))})
    opened = reopened(tmp_path / "theirs").eval()
    ids = ids_of(model.config, 2, 40)
    expected = theirs(ids).logits
    assert ((opened(ids) - expected).abs().max() / expected.abs().max()).item() < 1e-5
    assert same(opened, model)


@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("name", ["grouped", "tied"])
def test_one_file_or_many_with_buffers_and_shared_storages(name: str, shards: int, tmp_path: Path) -> None:
    model = model_of(CONFIGS[name])
    buffer = {"model__layers__0__self_attn__rotary_emb__inv_freq": torch.arange(4)}
    head = {"lm_head__weight": model.model.embed_tokens.weight.detach()} if name == "tied" else {}
    path = as_bin(tmp_path / "m", model, shards, **buffer, **head)
    assert len(list(path.glob("*.bin"))) == shards
    assert same(reopened(path), model)
    weights = formats.open_model(path).weights
    assert [name for name, _ in weights] == [name for name, _ in weights]


def test_other_types(tmp_path: Path) -> None:
    model = model_of(CONFIGS["grouped"], torch.bfloat16)
    source = formats.open_model(as_bin(tmp_path / "m", model))
    assert (source.dtype, set(source.stored)) == (torch.bfloat16, {"bfloat16"})
    assert same(model, reopened(tmp_path / "m").to(torch.bfloat16))


def test_safetensors_come_first(tmp_path: Path) -> None:
    model = model_of(CONFIGS["grouped"])
    as_bin(tmp_path / "m", model)
    (tmp_path / "m" / SINGLE).write_bytes(b"nonsense")
    formats.save(tmp_path / "other", weights_of(model))
    (tmp_path / "other" / SAFETENSORS).rename(tmp_path / "m" / SAFETENSORS)
    assert same(reopened(tmp_path / "m"), model)


def refused(path: Path) -> str:
    """The one line with which a damaged model is refused."""
    with bounded(), pytest.raises(ModelError) as caught:
        list(formats.open_model(path).weights)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"model__norm__bias": torch.ones(32)}, "model.norm.bias is not part of a model"),
        ({"a\nb": torch.ones(1)}, r"'a\nb' is not part of a model"),
        ({"x" * 900: torch.ones(1)}, f"'{'x' * 200}' is not part of a model"),
        ({"model__norm__bias": torch.ones(32).int()}, "is stored as int32; expected one of float64"),
    ],
)
def test_tensors_of_others_are_named(extra: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    assert message in refused(as_bin(tmp_path / "m", model_of(CONFIGS["grouped"]), **extra))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing from the weights"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(31)}),
            "shape [31], expected [32] by config.json",
        ),
        (lambda t: t.update({"model.norm.weight": torch.full((32,), torch.inf)}), "holds NaN or infinite"),
        (lambda t: t.update(version=3), "expected a dictionary of tensors and nothing else"),
        (lambda t: t.update({"model.norm.weight": torch.ones(1).expand(32)}), "reaches beyond its 1 values"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: Any, message: str, tmp_path: Path) -> None:
    path = as_bin(tmp_path / "m", model_of(CONFIGS["grouped"]))
    tensors = torch.load(path / SINGLE)
    change(tensors)
    torch.save(tensors, path / SINGLE)
    assert message in refused(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    path = as_bin(tmp_path / "m", model_of(CONFIGS["grouped"]), 3)
    first, second, _ = sorted(path.glob("*.bin"))
    first.unlink()
    assert f"{first.name} is missing of 3 weight files" in refused(path)
    second.rename(first)
    edit(path / INDEX, lambda values: values.update(weight_map={"a": first.name}))
    assert "and 9 more are missing from the weights" in refused(path)
    (path / INDEX).unlink()
    assert f"needs {INDEX} beside it, which is missing" in refused(path)
    for file in path.glob("*.bin"):
        file.unlink()
    assert f"holds config.json but no weights; expected model.safetensors or {SAFETENSORS}" in refused(path)


def damaged(draw: random.Random, path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".bin":
        return bent_archive(draw, data)
    return (
        json.dumps(bent(draw, json.loads(data))).encode()
        if draw.random() < 0.8
        else cut_or_flipped(draw, data)
    )


@pytest.mark.parametrize("rounds", [150, pytest.param(2500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("files", [[SINGLE], [INDEX]])
def test_mutated_files_are_refused_or_valid(files: list[str], rounds: int, tmp_path: Path) -> None:
    path = as_bin(tmp_path / "m", model_of(CONFIGS["grouped"]), 1 if files == [SINGLE] else 3)
    assert 0 < fuzz(path, [path / name for name in files], damaged, rounds) < rounds * 0.9

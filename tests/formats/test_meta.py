"""Meta's files: an independent program gives the same logits; ranks and splits; what is left unsaid."""

from __future__ import annotations

import base64
import inspect
import json
import random
import shutil
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import puna.tokenizer
from puna import formats
from puna.errors import ModelError
from puna.formats import provenance
from puna.formats.content import Content
from puna.formats.meta import directory as meta
from puna.formats.meta.directory import MetaSettings
from puna.formats.meta.params import feed_forward_rule
from puna.formats.packed import pack, unpack
from puna.formats.source import Source
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.model.presets import PRESETS, feed_forward_width
from puna.model.weights import Weights, load_weights, shapes, weights_of
from puna.tokenizer.tokenizer import Tokenizer
from puna.tokenizer.train import TokenizerSettings, train
from tests.formats.conftest import edit
from tests.formats.damage import bent, bounded, cut_or_flipped, fuzz
from tests.formats.torch_damage import bent_archive
from tests.model.shapes import CONFIGS, ids_of, model_of
from tests.reference import meta_llama

PARAMS, FIRST = "params.json", "consolidated.00.pth"
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES = {
    "multi-head": CONFIGS["multi-head"],
    "grouped": CONFIGS["grouped"],
    "multi-query": CONFIGS["multi-query"],
    "tied": CONFIGS["tied"],
    "eight heads": CONFIGS["grouped"].model_copy(
        update={"num_attention_heads": 8, "head_dim": 4, "num_key_value_heads": 4}
    ),
    "scaled": ModelConfig(
        **{
            **CONFIGS["grouped"].model_dump(exclude={"rope_scaling"}),
            "rope_theta": 500_000.0,
            "rope_scaling": {"rope_type": "llama3", **LLAMA3},
        }
    ),
}


def written(target: Path, model: Llama, tokenizer: Tokenizer | None = None, **settings: Any) -> list[str]:
    """A model in Meta's files, as a conversion would leave it; returns the notes."""
    content = Content(weights_of(model), tokenizer, (2, 7), 1)
    hashes = provenance.PayloadHash()
    notes = meta.write(target, content, MetaSettings(**settings), hashes.add)
    provenance.write(target, provenance.record(hashes, model.config, tokenizer))
    return notes


def reopened(path: Path, dtype: torch.dtype = torch.float32) -> Llama:
    source = formats.open_model(path)
    model = Llama(source.config).to(dtype)
    load_weights(model, source.weights)
    return model.eval()


def same(first: Llama, second: Llama) -> bool:
    """Whether config and every bit are equal."""
    pairs = zip(first.named_parameters(), second.named_parameters(), strict=True)
    return first.config == second.config and all(
        one == other and torch.equal(a, b) for (one, a), (other, b) in pairs
    )


def ranks_in(directory: Path) -> list[dict[str, Any]]:
    """The files as torch itself reads them, for NumPy."""
    files = sorted(directory.glob("*.pth"))
    loaded = (torch.load(file, weights_only=True, mmap=True) for file in files)
    return [{name: tensor.double().numpy() for name, tensor in rank.items()} for rank in loaded]


def reference(directory: Path, ids: Tensor, ranks: list[dict[str, Any]] | None = None) -> Tensor:
    """Logits by the independent program."""
    params = json.loads((directory / PARAMS).read_text())
    logits = meta_llama.logits(params, ranks or ranks_in(directory), ids.numpy(), LLAMA3)
    return torch.from_numpy(logits)


def gap(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def tiktoken_model(path: Path) -> Tokenizer:
    """A vocabulary of single bytes in Llama 3's form."""
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    (path / "tokenizer.model").write_text("\n".join(lines))
    return puna.tokenizer.load(path)


# The same numbers


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "shards"),
    [(name, n) for name in SHAPES for n in (1, 2, 4) if SHAPES[name].num_key_value_heads % n == 0],
)
def test_an_independent_program_gives_the_same_logits(name: str, shards: int, tmp_path: Path) -> None:
    model = model_of(SHAPES[name]).eval()
    written(tmp_path / "m", model, shards=shards)
    assert len(list((tmp_path / "m").glob("*.pth"))) == shards
    ids = ids_of(model.config, 2, 40)
    expected = reference(tmp_path / "m", ids)
    assert gap(reopened(tmp_path / "m")(ids).double(), expected) < 1e-5
    assert gap(reopened(tmp_path / "m", torch.float64)(ids), expected) < 1e-10
    assert same(reopened(tmp_path / "m"), model)


@torch.no_grad()
def test_the_independent_program_sees_a_wrong_layout(tmp_path: Path) -> None:
    model = model_of(CONFIGS["grouped"]).eval()
    written(tmp_path / "m", model)
    ids, (rank,) = ids_of(model.config, 1, 20), ranks_in(tmp_path / "m")
    ours = dict(model.named_parameters())
    halves = ours["model.layers.0.self_attn.q_proj.weight"]
    keys = ours["model.layers.0.self_attn.k_proj.weight"]
    wrong_heads = keys.unflatten(0, (4, 2, -1)).transpose(1, 2).flatten(0, 2)  # 4 query heads, 2 key heads
    expected = model(ids).double()
    for name, wrong in (("wq", halves), ("wk", keys), ("wk", wrong_heads)):
        changed = {**rank, f"layers.0.attention.{name}.weight": wrong.numpy()}
        assert gap(expected, reference(tmp_path / "m", ids, [changed])) > 1e-3, name


@torch.no_grad()
@pytest.mark.parametrize("shards", [1, 2])
def test_both_ways_to_cut_the_embedding(shards: int, tmp_path: Path) -> None:
    model = model_of(CONFIGS["tied"]).eval()
    (tmp_path / "t").mkdir()
    for name, tokenizer, shape in (
        ("rows", tiktoken_model(tmp_path / "t"), (96 // shards, 32)),
        ("columns", None, (96, 32 // shards)),
    ):
        written(tmp_path / name, model, tokenizer, shards=shards)
        loaded = torch.load(tmp_path / name / FIRST, weights_only=True)
        assert loaded["tok_embeddings.weight"].shape == shape
        assert loaded["output.weight"].shape == (96 // shards, 32)
        shared = loaded["output.weight"].data_ptr() == loaded["tok_embeddings.weight"].data_ptr()
        assert shared == (shards == 1 or name == "rows")
        ids = ids_of(model.config, 1, 12)
        assert gap(model(ids).double(), reference(tmp_path / name, ids)) < 1e-5
        assert same(reopened(tmp_path / name), model)


@torch.no_grad()
@pytest.mark.parametrize("by_rows", [True, False])
def test_shards_made_by_hand(by_rows: bool, tmp_path: Path) -> None:
    """Two ranks in bfloat16, cut here, with the buffer that Llama 1 and 2 carry."""
    D, F, N, K, V = 16, 24, 4, 2, 10
    generator = torch.Generator().manual_seed(3)

    def matrix(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.3).bfloat16()

    whole = {
        "norm.weight": 1 + matrix(D),
        "output.weight": matrix(V, D),
        "tok_embeddings.weight": matrix(V, D),
    }
    shapes_ = {
        "wq": (D, D),
        "wk": (K * 4, D),
        "wv": (K * 4, D),
        "wo": (D, D),
        "w1": (F, D),
        "w2": (D, F),
        "w3": (F, D),
    }
    for name, shape in shapes_.items():
        parent = "attention" if name[1] in "qkvo" else "feed_forward"
        whole[f"layers.0.{parent}.{name}.weight"] = matrix(*shape)
    whole |= {"layers.0.attention_norm.weight": 1 + matrix(D), "layers.0.ffn_norm.weight": 1 + matrix(D)}
    for rank in range(2):
        cut = {}
        for name, tensor in whole.items():
            kind = name.split(".")[-2]
            if kind in ("wo", "w2") or (kind == "tok_embeddings" and not by_rows):
                cut[name] = tensor[:, tensor.shape[1] // 2 * rank :][:, : tensor.shape[1] // 2].clone()
            elif tensor.dim() == 2:
                cut[name] = tensor[tensor.shape[0] // 2 * rank :][: tensor.shape[0] // 2].clone()
            else:
                cut[name] = tensor
        torch.save({**cut, "rope.freqs": torch.ones(2)}, tmp_path / f"consolidated.{rank:02d}.pth")
    params = {
        "dim": D,
        "n_layers": 1,
        "n_heads": N,
        "n_kv_heads": K,
        "norm_eps": 1e-5,
        "vocab_size": -1,
        "multiple_of": 8,
        "ffn_dim_multiplier": 0.5,
    }
    (tmp_path / PARAMS).write_text(json.dumps(params))

    source = formats.open_model(tmp_path)
    found = dict(source.weights)
    assert (source.format, source.dtype, source.stored) == ("meta", torch.bfloat16, {"bfloat16": 12})
    assert (source.config.vocab_size, source.config.intermediate_size) == (V, F)
    queries = whole["layers.0.attention.wq.weight"]
    by_hand = torch.cat(
        [queries[4 * head + first : 4 * head + 4 : 2] for head in range(N) for first in (0, 1)]
    )
    assert torch.equal(found["model.layers.0.self_attn.q_proj.weight"], by_hand)
    assert torch.equal(found["model.layers.0.mlp.down_proj.weight"], whole["layers.0.feed_forward.w2.weight"])
    assert torch.equal(found["model.embed_tokens.weight"], whole["tok_embeddings.weight"])
    ids = ids_of(source.config, 2, 20)
    assert gap(reopened(tmp_path, torch.float64)(ids), reference(tmp_path, ids)) < 1e-10


@torch.no_grad()
def test_key_heads_that_neighbouring_ranks_share(tmp_path: Path) -> None:
    """More ranks than key/value heads: two ranks each hold the same head, as with the largest Llama."""
    model = model_of(CONFIGS["grouped"])
    written(tmp_path / "two", model, shards=2)
    written(tmp_path / "four", model_of(CONFIGS["multi-head"]), shards=4)
    halves = [torch.load(tmp_path / "two" / f"consolidated.0{rank}.pth") for rank in range(2)]
    for rank in range(4):
        share = {}
        for name, tensor in halves[rank // 2].items():
            kind = name.split(".")[-2]
            dimension = {"wo": 1, "w2": 1, "tok_embeddings": 1}.get(kind, 0)
            kept = kind in ("wk", "wv") or tensor.dim() == 1
            share[name] = tensor if kept else tensor.chunk(2, dimension)[rank % 2].clone()
        torch.save(share, tmp_path / "four" / f"consolidated.0{rank}.pth")
    for name in (PARAMS, "puna.json"):
        shutil.copy(tmp_path / "two" / name, tmp_path / "four" / name)
    assert same(reopened(tmp_path / "four"), model)
    share["layers.1.attention.wk.weight"] = share["layers.1.attention.wk.weight"] + 1
    torch.save(share, tmp_path / "four" / "consolidated.03.pth")
    with pytest.raises(ModelError, match=r"layers.1.attention.wk.weight differs between files"):
        list(formats.open_model(tmp_path / "four").weights)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_type_may_be_chosen(dtype: str, tmp_path: Path) -> None:
    model = model_of(CONFIGS["grouped"])
    written(tmp_path / "m", model, dtype=dtype, shards=2)
    source = formats.open_model(tmp_path / "m")
    assert source.stored == {dtype: 21}
    expected = dict(model.named_parameters())
    for name, tensor in source.weights:
        assert torch.equal(tensor, expected[name].to(source.dtype)), name
    assert [name for name, _ in source.weights] == list(shapes(source.config))


def test_packed_tensors_are_expanded_to_a_type_asked_for(tmp_path: Path) -> None:
    model = model_of(CONFIGS["grouped"])
    kept = {name: tensor.detach() for name, tensor in model.named_parameters()}
    name = "model.layers.0.self_attn.q_proj.weight"
    packed = pack(kept[name], "q8_0")
    content = Content(Weights(model.config, list({**kept, name: packed}.items())))
    with pytest.raises(ModelError, match="packed as q8_0; choose a dtype"):
        meta.write(tmp_path / "a", content, MetaSettings(), lambda *_: None)
    meta.write(tmp_path / "b", content, MetaSettings(dtype="float32"), lambda *_: None)
    assert torch.equal(dict(formats.open_model(tmp_path / "b").weights)[name], unpack(packed))


def test_the_record_is_of_the_weights_not_of_their_layout(tmp_path: Path) -> None:
    model = model_of(CONFIGS["grouped"])
    expected = provenance.payload_hash(weights_of(model))
    for shards in (1, 2):
        written(tmp_path / str(shards), model, shards=shards)
        assert provenance.read(tmp_path / str(shards))["weights"]["sha256"] == expected
        assert provenance.payload_hash(formats.open_model(tmp_path / str(shards)).weights) == expected


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        written(tmp_path / name, model_of(CONFIGS["tied"]), shards=2)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


# What params.json leaves unsaid


def opened_as(tmp_path: Path, **params: Any) -> Source:
    """A model with other words in params.json, and no puna.json."""
    written(tmp_path, model_of(CONFIGS["grouped"]))
    (tmp_path / "puna.json").unlink()
    edit(tmp_path / PARAMS, lambda values: values.update(params))
    return formats.open_model(tmp_path)


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("puna")])
def test_every_preset_is_found_again_by_what_is_written(name: str) -> None:
    from puna.formats.meta.params import Told, read_params, write_params

    preset = PRESETS[name]
    told = Told(preset.vocab_size, preset.intermediate_size, preset.hidden_size, preset.tie_word_embeddings)
    values = json.loads(json.dumps(write_params(preset, explicit_theta=False)))
    config, notes = read_params(values, told, None, PARAMS)
    assert config == preset
    assert notes[0] == f"context length {preset.max_position_embeddings}: from the preset {name}"
    assert len(notes) == (2 if name.startswith(("llama-3.1", "llama-3.2")) else 1)
    more = Told(preset.vocab_size + 8, preset.intermediate_size, preset.hidden_size, told.tied)
    grown, _ = read_params({**values, "vocab_size": -1}, more, None, PARAMS)
    assert grown == preset.model_copy(update={"vocab_size": preset.vocab_size + 8})


def test_metas_own_params(tmp_path: Path) -> None:
    """As published, with what they say and what they do not."""
    from puna.formats.meta.params import Told, read_params

    published = {
        "llama-7b": {
            "dim": 4096,
            "multiple_of": 256,
            "n_heads": 32,
            "n_layers": 32,
            "norm_eps": 1e-06,
            "vocab_size": -1,
        },
        "llama-2-70b": {
            "dim": 8192,
            "multiple_of": 4096,
            "ffn_dim_multiplier": 1.3,
            "n_heads": 64,
            "n_kv_heads": 8,
            "n_layers": 80,
            "norm_eps": 1e-05,
            "vocab_size": -1,
        },
        "codellama-34b": {
            "dim": 8192,
            "n_layers": 48,
            "n_heads": 64,
            "n_kv_heads": 8,
            "multiple_of": 256,
            "ffn_dim_multiplier": 1.0,
            "norm_eps": 1e-5,
            "vocab_size": 32000,
            "rope_theta": 1000000,
        },
        "llama-3-8b": {
            "dim": 4096,
            "n_layers": 32,
            "n_heads": 32,
            "n_kv_heads": 8,
            "vocab_size": 128256,
            "multiple_of": 1024,
            "ffn_dim_multiplier": 1.3,
            "norm_eps": 1e-05,
            "rope_theta": 500000.0,
        },
        "llama-3.2-1b": {
            "dim": 2048,
            "n_layers": 16,
            "n_heads": 32,
            "n_kv_heads": 8,
            "vocab_size": 128256,
            "ffn_dim_multiplier": 1.5,
            "multiple_of": 256,
            "norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "use_scaled_rope": True,
        },
    }
    for name, values in published.items():
        preset = PRESETS[name]
        told = Told(
            preset.vocab_size, preset.intermediate_size, preset.hidden_size, preset.tie_word_embeddings
        )
        config, notes = read_params(values, told, None, PARAMS)
        assert config == preset
        assert all(f"from the preset {name}" in note for note in notes)


@pytest.mark.parametrize(
    ("params", "context", "notes"),
    [
        ({}, 2048, ["context length 2048: the usual one"]),
        ({"rope_theta": 500000}, 8192, ["context length 8192: the usual one"]),
        ({"use_scaled_rope": True, "rope_theta": 500000.0}, 8192, ["context length", "rotary scaling by 8"]),
        (
            {"multiple_of": 512},
            2048,
            ["feed-forward width 48: from the tensors; params.json would make it 512", "context"],
        ),
        (
            {"vocab_size": None, "norm_eps": None, "rope_theta": None, "n_kv_heads": 2},
            2048,
            ["context length"],
        ),
    ],
)
def test_what_is_unsaid_is_told(
    params: dict[str, Any], context: int, notes: list[str], tmp_path: Path
) -> None:
    source = opened_as(tmp_path / "m", **params)
    assert source.config.max_position_embeddings == context
    assert len(source.notes) == len(notes)
    assert all(note.startswith(start) for note, start in zip(source.notes, notes, strict=True))
    scaling = source.config.rope_scaling.model_dump()
    assert scaling == (
        {"rope_type": "llama3", **LLAMA3} if "use_scaled_rope" in params else {"rope_type": "default"}
    )


def test_puna_json_keeps_the_rest_and_is_held_against_the_files(tmp_path: Path) -> None:
    config = SHAPES["scaled"].model_copy(update={"max_position_embeddings": 777, "initializer_range": 0.5})
    notes = written(tmp_path / "m", model_of(config))
    assert notes == ["params.json has no place for the context length 777; puna.json keeps it"]
    source = formats.open_model(tmp_path / "m")
    assert (source.config, source.notes, source.end_ids, source.bos_id) == (config, (), (2, 7), 1)
    for change, message in (
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-05, but 1e-06 in puna.json"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 2, but 4 in puna.json"),
        (
            {"rope_scaling": {"rope_type": "default"}},
            "use_scaled_rope is True, but the scaling in puna.json is 'default'",
        ),
        ({"tie_word_embeddings": True}, "the embedding is tied by puna.json, but output.weight differs"),
        ({"hidden_size": "x"}, "the model in puna.json: 'hidden_size'"),
    ):
        before = (tmp_path / "m" / "puna.json").read_text()
        edit(tmp_path / "m" / "puna.json", lambda values, change=change: values["model"].update(change))
        with pytest.raises(ModelError, match=message):
            formats.open_model(tmp_path / "m")
        (tmp_path / "m" / "puna.json").write_text(before)


def test_a_tied_head_may_be_stored_or_left_out(tmp_path: Path) -> None:
    for shards, config in ((1, "tied"), (2, "tied"), (2, "multi-head")):
        path = tmp_path / f"{config}{shards}"
        model = model_of(CONFIGS[config])
        written(path, model, shards=shards)
        (path / "puna.json").unlink()
        assert formats.open_model(path).config.tie_word_embeddings == (config == "tied")
        for file in path.glob("*.pth"):
            rank = torch.load(file)
            del rank["output.weight"]
            torch.save(rank, file)
        assert formats.open_model(path).config.tie_word_embeddings


@pytest.mark.parametrize("name", PRESETS)
def test_the_rule_for_the_feed_forward_width(name: str) -> None:
    D, F = PRESETS[name].hidden_size, PRESETS[name].intermediate_size
    for width in (F, F + 1, F - 1, 1, 7, 3 * D, 20 * D):
        multiple, multiplier = feed_forward_rule(D, width)
        assert feed_forward_width(D, multiplier or 1.0, multiple) == width
    assert feed_forward_rule(D, F)[1] in (None, 1.3, 1.2, 1.5)


# Tokenizers and other files


def test_tokenizers_come_back_whole(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    pieces = train([inspect.getsource(ArgumentParser)], TokenizerSettings(vocab_size=400))
    for name, tokenizer in (("pieces", pieces), ("ranks", tiktoken_model(tmp_path / "t"))):
        tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
        written(tmp_path / name, model_of(CONFIGS["grouped"]), tokenizer)
        names = {path.name for path in (tmp_path / name).iterdir()}
        assert names == {
            "tokenizer.model",
            "tokenizer_config.json",
            "generation_config.json",
            PARAMS,
            FIRST,
            "puna.json",
        }
        source = formats.open_model(tmp_path / name)
        found = source.tokenizer()
        assert found is not None and source.end_ids == (2, 7)
        assert (found.fingerprint, found.chat_template) == (tokenizer.fingerprint, tokenizer.chat_template)
        assert (found.bos_id, found.specials) == (tokenizer.bos_id, tokenizer.specials)


def test_a_tokenizer_one_directory_up(tmp_path: Path) -> None:
    written(tmp_path / "m", model_of(CONFIGS["grouped"]))
    assert formats.open_model(tmp_path / "m").tokenizer() is None
    expected = tiktoken_model(tmp_path)
    source = formats.open_model(tmp_path / "m")
    assert source.notes == (f"tokenizer: from {tmp_path / 'tokenizer.model'}",)
    assert source.tokenizer().fingerprint == expected.fingerprint


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_the_real_tokenizers(name: str, assets: Path, tmp_path: Path) -> None:
    tokenizer = puna.tokenizer.load(assets / "tokenizers" / name)
    written(tmp_path / "m", model_of(CONFIGS["grouped"]), tokenizer)
    found = formats.open_model(tmp_path / "m").tokenizer()
    assert found.fingerprint == tokenizer.fingerprint
    assert (found.end_ids[:1], found.chat_template) == (tokenizer.end_ids[:1], tokenizer.chat_template)
    original = (assets / "tokenizers" / name / "tokenizer.model").read_bytes()
    assert (tmp_path / "m" / "tokenizer.model").read_bytes() == original


# What cannot be held


@pytest.mark.parametrize(
    ("config", "shards", "what", "without"),
    [
        ({"attention_bias": True}, 1, "biases", None),
        ({"mlp_bias": True}, 1, "biases", None),
        ({"head_dim": 16}, 1, "heads of width 16", None),
        ({}, 3, "3 equal shards of num_attention_heads 4", None),
        ({}, 4, "4 equal shards of num_key_value_heads 2", None),
        ({"intermediate_size": 47}, 2, "2 equal shards of intermediate_size 47", None),
        ({"vocab_size": 101}, 2, "2 equal shards of vocab_size 101", None),
        ({"sliding_window": 8}, 1, "a sliding window of 8", {"sliding_window": None}),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 1, "the rotary scaling 'linear'", {}),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "factor": 9.0}},
            1,
            "the rotary scaling 'llama3'",
            {},
        ),
    ],
)
def test_what_cannot_be_held_is_said_before_anything_is_written(
    config: dict[str, Any], shards: int, what: str, without: dict[str, Any] | None
) -> None:
    plain = CONFIGS["grouped"].model_dump(exclude={"rope_scaling"})
    content = Content(Weights(ModelConfig(**{**plain, **config}), ()))
    found = list(meta.obstacles(content, MetaSettings(shards=shards)))
    assert found[0].what.startswith(what)
    if without is None:
        assert found[0].without is None
    else:
        assert found[0].without.config == ModelConfig(**{**plain, **without})
        assert not list(meta.obstacles(found[0].without, MetaSettings(shards=shards)))


def test_a_tokenizer_json_becomes_a_model_file(tmp_path: Path) -> None:
    tokenizer = train([inspect.getsource(ArgumentParser)], TokenizerSettings(vocab_size=400))
    tokenizer.save(tmp_path / "json")
    (tmp_path / "json" / "tokenizer.model").unlink()
    model = model_of(CONFIGS["grouped"].model_copy(update={"vocab_size": 400}))
    content = Content(weights_of(model), puna.tokenizer.load(tmp_path / "json"))
    assert not list(meta.obstacles(content, MetaSettings()))
    meta.write(tmp_path / "meta", content, MetaSettings(), lambda name, value: None)
    found = meta.read(tmp_path / "meta").tokenizer()
    assert found is not None
    for text in ["", "  two  spaces", "def f(x):\n\treturn x", "é 日本 😀 <s>"]:
        assert found.encode(text) == tokenizer.encode(text)


def test_a_tokenizer_of_another_kind_cannot_be_held(tmp_path: Path) -> None:
    tokenizer = train([inspect.getsource(ArgumentParser)], TokenizerSettings(vocab_size=400))
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    edit(tmp_path / "tokenizer.json", lambda values: values.update(normalizer={"type": "NFC"}))
    content = Content(weights_of(model_of(CONFIGS["grouped"])), puna.tokenizer.load(tmp_path))
    (found,) = meta.obstacles(content, MetaSettings())
    assert "cannot be written as a SentencePiece model" in found.what
    assert found.without.tokenizer is None


# What is damaged


def refused(path: Path) -> str:
    """The one line with which a damaged model is refused."""
    with bounded(), pytest.raises(ModelError) as caught:
        list(formats.open_model(path).weights)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """Two ranks without puna.json."""
    written(tmp_path / "m", model_of(CONFIGS["grouped"]), shards=2)
    (tmp_path / "m" / "puna.json").unlink()
    return tmp_path / "m"


def test_missing_files_are_named(pair: Path) -> None:
    shutil.copy(pair / FIRST, pair / "consolidated.04.pth")
    (pair / FIRST).unlink()
    assert "consolidated.00.pth, consolidated.02.pth, consolidated.03.pth are missing" in refused(pair)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm.weight": None}, "norm.weight is in only one of consolidated.00.pth and consolidated.01.pth"),
        ({"norm.weight": torch.ones(32)}, "norm.weight differs between files that must hold the same"),
        (
            {"norm.weight": torch.ones(31)},
            r"norm.weight is float32 [31], but float32 [32] in consolidated.00.pth",
        ),
        ({"norm.weight": torch.ones(32).half()}, "norm.weight is float16 [32], but float32 [32]"),
        (
            {"layers.0.attention.wz.weight": torch.ones(1)},
            "layers.0.attention.wz.weight is not part of Meta's Llama. Did",
        ),
        ({"tok_embeddings.weight": None}, "it has no matrix tok_embeddings.weight"),
        (
            {"layers.0.feed_forward.w2.weight": torch.full((32, 24), torch.nan)},
            "holds NaN or infinite values",
        ),
    ],
)
def test_ranks_that_do_not_fit_each_other(
    pair: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    rank = {**torch.load(pair / "consolidated.01.pth"), **changes}
    torch.save(
        {name: value for name, value in rank.items() if value is not None}, pair / "consolidated.01.pth"
    )
    assert message in refused(pair)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"dim": None}, "dim is missing"),
        ({"dim": 64}, "expected [96, 64] by params.json"),
        ({"dim": "32"}, "dim is '32'; expected a positive integer"),
        ({"n_layers": 3}, "expected 3 layers by params.json, found tensors of 2"),
        ({"n_layers": 10**9}, "expected 1000000000 layers"),
        ({"n_heads": 0}, "n_heads is 0; expected a positive integer"),
        ({"n_heads": 8, "n_kv_heads": 8}, "k_proj.weight has shape [16, 32], expected [32, 32]"),
        ({"n_kv_heads": 3}, "is not divisible by num_key_value_heads 3"),
        ({"vocab_size": 97}, "expected [97, 32] by params.json"),
        ({"norm_eps": 0}, "'rms_norm_eps'"),
        ({"norm_eps": "x"}, "'rms_norm_eps'"),
        ({"rope_theta": -1}, "'rope_theta'"),
        ({"multiple_of": 0}, "multiple_of is 0; expected a positive integer"),
        ({"ffn_dim_multiplier": 1e300}, "ffn_dim_multiplier is 1e+300; expected a number above 0"),
        ({"use_scaled_rope": 1}, "use_scaled_rope is 1; expected true or false"),
    ],
)
def test_params_that_do_not_fit_the_tensors(pair: Path, params: dict[str, Any], message: str) -> None:
    edit(pair / PARAMS, lambda values: values.update(params))
    assert message in refused(pair)


def damaged(draw: random.Random, path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".pth":
        return bent_archive(draw, data)
    if draw.random() < 0.8:
        return json.dumps(bent(draw, json.loads(data))).encode()
    return cut_or_flipped(draw, data)


@pytest.mark.parametrize("rounds", [150, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [".json", ".pth"])
def test_mutated_files_are_refused_or_valid(kind: str, rounds: int, tmp_path: Path) -> None:
    written(tmp_path / "m", model_of(SHAPES["scaled"]), shards=2)
    files = sorted(path for path in (tmp_path / "m").iterdir() if path.suffix == kind)
    assert 0 < fuzz(tmp_path / "m", files, damaged, rounds) < rounds * 0.6

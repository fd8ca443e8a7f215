"""Which tensors a recipe quantizes and how; what it refuses, and with which words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from puna.errors import ModelError, SettingsError
from puna.model.config import ModelConfig
from puna.model.weights import Packed, shapes
from puna.quantize.recipe import Choice, Recipe, choices, not_quantized, settled, told
from puna.quantize.schemes import Format
from puna.settings import read_settings, to_toml

HALF, FULL = torch.float16, torch.float32
INT8, INT4 = Format("int8", None, FULL), Format("int4", 32, HALF)
WIDE, BRAIN = Format("int4", 128, HALF), torch.bfloat16
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"


def config_of(tied: bool = False, wide: int = 256) -> ModelConfig:
    return ModelConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=wide,
        num_hidden_layers=2,
        num_attention_heads=4,
        attention_bias=True,
        tie_word_embeddings=tied,
    )


def recipe(*overrides: str) -> Recipe:
    return read_settings(Recipe, None, overrides)


def test_matrices_are_quantized_and_norms_biases_and_embeddings_kept() -> None:
    found = choices(recipe("scheme=int4"), config_of())
    matrices = [name for name in shapes(config_of()) if name.endswith("_proj.weight")]
    assert list(found) == [*matrices, OUTPUT] and len(matrices) == 14
    assert all(found[name] == Choice("int4", INT4) for name in matrices)
    assert found[OUTPUT] == Choice("int8", INT8)


@pytest.mark.parametrize(
    ("overrides", "inner", "output"),
    [
        (["scheme=int8"], Choice("int8", INT8), Choice("int8", INT8)),
        (["group=32"], Choice("int8", Format("int8", 32, HALF)), Choice("int8", Format("int8", 32, HALF))),
        (["scheme=gptq", "group=128"], Choice("gptq", Format("int4", 128, HALF)), Choice("int8", INT8)),
        (["scheme=int4", "output=keep"], Choice("int4", INT4), None),
        (["scheme=int4", "output=int8:32"], Choice("int4", INT4), Choice("int8", Format("int8", 32, HALF))),
        (["scheme=gptq", "output=gptq"], Choice("gptq", INT4), Choice("gptq", INT4)),
        (["scheme=gptq", "group=128", "output=int4"], Choice("gptq", WIDE), Choice("int4", WIDE)),
        (
            ["scheme=int4", "scales=bfloat16"],
            Choice("int4", replace(INT4, scales=BRAIN)),
            Choice("int8", replace(INT8, scales=BRAIN)),
        ),
        (["scheme=nf4"], Choice("nf4", Format("nf4", 64, FULL)), None),
    ],
    ids=str,
)
def test_formats(overrides: list[str], inner: Choice, output: Choice | None) -> None:
    found = choices(recipe(*overrides), config_of())
    assert found[UP] == inner and found.get(OUTPUT) == output


def test_a_tied_output_is_kept_unless_asked() -> None:
    tied = config_of(tied=True)
    assert EMBEDDING not in choices(recipe("scheme=int4"), tied)
    for asked in ("embeddings=int8", "output=int8"):
        assert choices(recipe("scheme=int4", asked), tied)[EMBEDDING] == Choice("int8", INT8)
    for pattern in ("lm_head", "*.embed_tokens", "lm_*.weight"):  # of one matrix, by either of its names
        found = choices(Recipe(scheme="int4", exceptions={pattern: "int8"}), tied)
        assert found[EMBEDDING] == Choice("int8", INT8)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["embeddings=int8", "output=int4"], "embedding is to be int8 and the output projection int4, .*one"),
        (["embeddings=int8", "output=keep"], "embedding is to be int8 and the output projection keep"),
        (["embeddings=keep", "output=int8"], "embedding is to be keep and the output projection int8"),
        (["output=int4", "exceptions.'*.embed_tokens'=int8"], "to be int8 and the output projection int4"),
        (["embeddings=int4", "exceptions.lm_head=int8"], "to be int4 and the output projection int8"),
        (["scheme=gptq", "output=gptq:32"], "output=gptq:32 is not for a matrix that is the embedding too"),
    ],
    ids=str,
)
def test_one_matrix_cannot_be_two(overrides: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        choices(recipe(*overrides), config_of(tied=True))


def test_what_is_done_to_both_is_told() -> None:
    told_of = [
        list(told(recipe(*each), config_of(tied=True))) for each in ([], ["output=int4"], ["embeddings=int8"])
    ]
    assert told_of[0] == []
    assert told_of[1] == [
        "int4 is asked of the output projection, and so the embedding is: in this model they are one matrix"
    ]
    assert told_of[2] == [
        "int8 is asked of the embedding, and so the output projection is: in this model they are one matrix"
    ]
    assert list(told(recipe("output=int8", "embeddings=int8"), config_of(tied=True))) == []
    assert list(told(recipe("output=int4"), config_of())) == []


def test_a_scheme_may_name_its_group() -> None:
    assert recipe("scheme=int8:32") == recipe("scheme=int8", "group=32")
    assert recipe("scheme=gptq:128", "group=128") == recipe("scheme=gptq", "group=128")


def test_exceptions_name_modules_or_tensors_and_the_last_wins() -> None:
    asked = recipe("scheme=int4", "exceptions.'*.down_proj'=int8", "exceptions.model.layers.0.*=keep")
    assert asked.exceptions == {"*.down_proj": "int8", "model.layers.0.*": "keep"}
    assert asked == recipe("scheme=int4", "exceptions.*.down_proj=int8", "exceptions.model.layers.0.*=keep")
    found = choices(asked, config_of())
    assert found[DOWN].scheme == "int8"
    assert not any(name.startswith("model.layers.0.") for name in found)
    later = choices(Recipe(exceptions={"*.layers.0.*": "keep", UP: "int4:128"}), config_of())
    assert later[UP] == Choice("int4", Format("int4", 128, HALF))
    ends = choices(Recipe(exceptions={"lm_head": "keep", "*embed*": "int4"}), config_of())
    assert OUTPUT not in ends and ends[EMBEDDING] == Choice("int4", INT4)


def test_it_is_read_from_toml_and_written_back(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        'scheme = "gptq"\ngroup = 128\n[exceptions]\n"*.down_proj" = "int8"\n"model.layers.0.*" = "keep"\n'
    )
    found = read_settings(Recipe, path)
    assert found.exceptions == {"*.down_proj": "int8", "model.layers.0.*": "keep"}
    path.write_text(to_toml(found))
    assert read_settings(Recipe, path) == found


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["scheme=int3"],
            r"'scheme': expected int8, int4, gptq, nf4, or .*\(int8:32, .*\), got 'int3'. Did you",
        ),
        (["scheme=int8:64"], r"with a group \(int8:32, int8:128, int4:32, .*\), got 'int8:64'. Did you mean"),
        (["scheme=nf4:32"], r"got 'nf4:32'"),
        (["scheme=int8:32", "group=128"], r"scheme=int8:32 and group=128 differ: leave one of them out"),
        (["group=64"], r"'group': input should be 32 or 128, got 64"),
        (
            ["output=int9"],
            r"'output': expected keep or a scheme \(int8, int4, gptq, nf4\), got 'int9'. Did you mean",
        ),
        (["exceptions.*.down_proj=int8:33"], r"in groups of 32 or 128, such as int8:32, got 'int8:33'"),
        (["exceptions=int8"], r"'exceptions': input should be a valid dictionary, got 'int8'"),
        (["exception.x=int8"], r"unknown setting 'exception'. Did you mean 'exceptions'\?"),
    ],
    ids=str,
)
def test_what_it_cannot_be(overrides: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        recipe(*overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["exceptions.*.dwn_proj=int8"],
            r"'\*.dwn_proj' matches no matrix of this model. Did you mean '\*.down_proj'",
        ),
        (["exceptions.model.layer.0.mlp.up_proj=keep"], r"Did you mean 'model.layers.0.mlp.up_proj'\?"),
        (["exceptions.*norm=int8"], r"'\*norm' matches no matrix"),
        (
            ["embeddings=gptq"],
            "embeddings cannot be gptq, since they take no inputs: set embeddings=int4 or int8",
        ),
        (["scheme=nf4", "group=32"], "nf4 has blocks of 64 .*: leave group and scales out"),
        (["scheme=nf4", "embeddings=nf4"], "embeddings cannot be nf4"),
        (["scheme=nf4", "output=int8"], "goes with keep alone, got it beside int8"),
        (["scheme=int4", "exceptions.*.down_proj=nf4"], "goes with keep alone, got it beside int4"),
    ],
    ids=str,
)
def test_what_does_not_fit_a_model(overrides: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        choices(recipe(*overrides), config_of())


def test_a_shape_that_does_not_allow_the_scheme() -> None:
    with pytest.raises(
        ModelError, match=r"layers\.0\.mlp\.down_proj\.weight \(128, 172\) has 172 inputs, .*=int8"
    ):
        choices(recipe("scheme=int4"), config_of(wide=172))
    mended = choices(recipe("scheme=int4", "exceptions.*.down_proj=int8"), config_of(wide=172))
    assert mended[DOWN] == Choice("int8", INT8)
    with pytest.raises(ModelError, match="set group=32"):
        choices(recipe("scheme=int4", "group=128"), config_of(wide=160))


def test_format_of_looks_at_the_shape() -> None:
    asked = recipe("scheme=int4")
    assert asked.format_of(DOWN, (128, 256)) == INT4
    assert asked.format_of("model.norm.weight", (128,)) is None
    with pytest.raises(ModelError, match="multiple of 32"):
        asked.format_of(DOWN, (128, 172))


def test_a_quantized_tensor_is_refused() -> None:
    plain = torch.ones(2, 2)
    assert not_quantized(UP, plain) is plain
    packed = Packed("q4_0", torch.ones(1, 18, dtype=torch.uint8), None, (1, 32))
    with pytest.raises(
        ModelError, match=r"up_proj\.weight is q4_0 already, .* give the model in full precision"
    ):
        not_quantized(UP, packed)


def test_scales_left_open_are_a_bfloat16_models_own() -> None:
    """A directory is opened in one type: float16 scales would make all else float32."""
    assert settled(Recipe(scheme="int4"), torch.bfloat16).scales == "bfloat16"
    assert settled(Recipe(scheme="int4"), torch.float16) == Recipe(scheme="int4")
    assert settled(Recipe(scales="float16"), torch.bfloat16).scales == "float16"
    assert settled(Recipe(scheme="nf4"), torch.bfloat16).scales is None

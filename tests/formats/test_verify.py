"""Two models are told apart where they differ, and not where only the type they are stored in does."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from puna import formats
from puna.devices import DTYPES
from puna.errors import ModelError
from puna.formats import provenance
from puna.formats.packed import BLOCKS, CODED, block_sizes, pack, unpack
from puna.formats.proof.agreement import agreement
from puna.formats.proof.divergence import NO_TARGET, diverge
from puna.formats.proof.layerwise import Tokens, build, states, streamed_states
from puna.formats.proof.layerwise import logits as projected
from puna.formats.proof.rounding import HALF_STEPS, LIMITS, RELATIVE, STEPS, Furthest, distances
from puna.formats.proof.sketches import Sketches
from puna.formats.proof.texts import CONVERSATIONS
from puna.formats.proof.tokens import proof_tokens
from puna.formats.proof.verdict import config_differences
from puna.formats.proof.verify import VerifySettings, compare
from puna.formats.rotary import interleaved
from puna.formats.source import Source
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.model.rope import LinearScaling, Llama3Scaling
from puna.model.weights import Packed, Weights, load_weights, weights_of
from puna.progress import silent
from puna.quantize.schemes import Format, quantized
from puna.tokenizer.reading import load
from puna.tokenizer.tokenizer import Tokenizer
from puna.tokenizer.train import TokenizerSettings, train
from tests.model.shapes import CONFIGS, ids_of, model_of

CPU = torch.device("cpu")
QUICK = VerifySettings(tokens=256, greedy_tokens=8, low_memory=False)
WIDE = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
FORMS = {  # of what is not in GGUF's blocks
    "int8": Format("int8", None, torch.float32),
    "int4": Format("int4", 32, torch.float16),
    "nf4": Format("nf4", 64, torch.float32),
}
Named = dict[str, Tensor | Packed]


def tensors_of(config: ModelConfig, flat: bool = False) -> Named:
    """Random tensors; `flat` ones give logits that are all nearly equal, as a new model's."""
    found: Named = {name: tensor.clone() for name, tensor in weights_of(model_of(config))}
    if flat:
        found = {name: t * 0.02 if t.dim() == 2 else torch.ones_like(t) for name, t in found.items()}
    return found


def source(config: ModelConfig, tensors: Named, tokenizer: Tokenizer | None = None) -> Source:
    """A model that is nowhere on disk."""
    kinds = Counter(
        value.scheme if isinstance(value, Packed) else str(value.dtype).removeprefix("torch.")
        for value in tensors.values()
    )
    weights = Weights(config, list(tensors.items()))
    opener = None if tokenizer is None else lambda: tokenizer
    return Source(Path("model"), "hf", weights, torch.float32, dict(kinds), open_tokenizer=opener)


def rounded(tensors: Named, kind: str) -> Named:
    """The same stored in another type; vectors stay as they are where the type packs matrices."""
    if kind in DTYPES:
        return {name: tensor.to(DTYPES[kind]) for name, tensor in tensors.items()}
    return {name: packed(tensor, kind) if tensor.dim() == 2 else tensor for name, tensor in tensors.items()}


def packed(tensor: Tensor, kind: str) -> Packed:
    return quantized(tensor, FORMS[kind]) if kind in FORMS else pack(tensor, kind)


def swapped(tensors: Named, first: str, second: str) -> Named:
    """The same with two kinds of tensors exchanged in every layer."""
    other = {first: second, second: first}
    module = {name: name.split(".")[-2] for name in tensors}
    return {
        name: tensors[name.replace(module[name], other.get(module[name], module[name]))] for name in tensors
    }


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train([inspect.getsource(argparse)], TokenizerSettings(vocab_size=400))


# ---- layer by layer


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_layer_by_layer_gives_the_bits_of_the_whole(name: str) -> None:
    config = CONFIGS[name]
    model = model_of(config).eval()
    tokens = [
        Tokens(ids_of(config, 3, 20), torch.arange(20)[None]),
        Tokens(ids_of(config, 1, 30), torch.arange(30)[None] * 3),
    ]
    streamed = streamed_states(weights_of(model), tokens, torch.float32, CPU, *bar())
    with silent("", 0, "") as tracker:
        whole = states(build(weights_of(model), torch.float32, CPU, tracker), tokens)
    for each, one, other in zip(tokens, streamed.hidden, whole.hidden, strict=True):
        expected = model(each.ids, each.positions)
        assert torch.equal(one, other)
        for found in (streamed, whole):
            rows = projected(one.flatten(0, 1), found.head, config.vocab_size)
            assert torch.equal(rows.view(expected.shape), expected)


def bar() -> list:
    with silent("", 0, "") as tracker:
        return [tracker]


@pytest.mark.parametrize("kind", ["bfloat16", "q8_0", "q4_0", "int8"])
@torch.no_grad()
def test_layer_by_layer_expands_what_is_stored(kind: str) -> None:
    tensors = rounded(tensors_of(WIDE), kind)
    tokens = [Tokens(ids_of(WIDE, 2, 24), torch.arange(24)[None])]
    found = streamed_states(Weights(WIDE, list(tensors.items())), tokens, torch.float32, CPU, *bar())
    model = Llama(WIDE)
    load_weights(
        model,
        Weights(
            WIDE,
            [(n, unpack(v) if isinstance(v, Packed) else v.float()) for n, v in tensors.items()],
        ),
    )
    expected = model(tokens[0].ids)
    got = projected(found.hidden[0].flatten(0, 1), found.head, WIDE.vocab_size).view(expected.shape)
    assert torch.equal(got, expected)


def test_both_ways_of_reading_find_the_same() -> None:
    a, b = tensors_of(WIDE), rounded(tensors_of(WIDE), "bfloat16")
    whole = compare(source(WIDE, a), source(WIDE, b), QUICK)
    layers = compare(source(WIDE, a), source(WIDE, b), QUICK.model_copy(update={"low_memory": True}))
    assert whole.divergence == layers.divergence
    assert whole.distances == layers.distances
    assert (whole.sha256_a, whole.sha256_b) == (layers.sha256_a, layers.sha256_b)
    assert whole.parted is not None
    assert layers.parted is None
    assert layers.as_dict()["greedy"] is None


# ---- figures


def test_figures_by_hand() -> None:
    # One word of hidden state, so that logits are the projection itself: (0, ln 3) and (0, 0) for two words.
    hidden = torch.ones(1, 1)
    first, second = torch.tensor([[0.0], [math.log(3)]]), torch.zeros(2, 1)
    found = diverge((hidden, first), (hidden, second), 2, torch.tensor([1]), torch.tensor([0]))
    assert found.max_difference == pytest.approx(math.log(3))
    assert found.mean_difference == pytest.approx(math.log(3) / 2)
    assert found.relative_error == pytest.approx(1.0)
    kl = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert found.kl_mean == pytest.approx(kl)
    assert found.kl_max == pytest.approx(kl)
    assert found.loss_a == pytest.approx(-math.log(0.75))
    assert found.loss_b == pytest.approx(math.log(2))
    assert found.top1_agreement == 0.0


def test_an_offset_common_to_all_words_is_no_error() -> None:
    hidden = torch.eye(2)
    head = torch.randn(8, 2)
    found = diverge((hidden, head), (hidden, head + 3), 8, torch.full((2,), NO_TARGET), torch.tensor([0, 1]))
    assert found.relative_error < 1e-6
    assert found.kl_max < 1e-12
    assert found.max_difference == pytest.approx(3, rel=1e-6)
    assert found.loss_a is None


def test_the_worst_sequence_is_told() -> None:
    hidden = torch.ones(4, 1)
    first = torch.tensor([[0.0], [1.0]])
    apart = torch.tensor([[1.0], [1.0], [1.0], [2.0]])
    found = diverge((hidden, first), (apart, first), 2, torch.full((4,), -1), torch.tensor([0, 0, 1, 1]))
    assert found.relative_error == pytest.approx(0.5)
    assert found.worst_relative_error == pytest.approx(math.sqrt(0.5))


def test_the_text_is_scored_as_cross_entropy_does(tokenizer: Tokenizer) -> None:
    config = WIDE.model_copy(update={"vocab_size": 400})
    tensors = tensors_of(config)
    found = compare(*[source(config, tensors, tokenizer)] * 2, QUICK)
    proof = proof_tokens(tokenizer, 400, 64, 256, CPU)
    assert not proof.strided
    model = Llama(config)
    load_weights(model, Weights(config, list(tensors.items())))
    total, count = 0.0, 0
    with torch.no_grad():
        for tokens in proof.sequences:
            rows = model(tokens.ids)[:, :-1].double()
            targets = tokens.ids[:, 1:]
            total += torch.nn.functional.cross_entropy(
                rows.flatten(0, 1), targets.flatten(), reduction="sum"
            ).item()
            count += targets.numel()
    assert found.divergence.loss_a == pytest.approx(total / count, rel=1e-6)
    assert found.divergence.positions == proof.count


def test_logits_that_are_not_finite_are_refused() -> None:
    tensors = tensors_of(WIDE)
    broken = {**tensors, "lm_head.weight": torch.full_like(tensors["lm_head.weight"], 3e38)}
    with pytest.raises(ModelError, match="second model's logits are not finite"):
        compare(source(WIDE, tensors), source(WIDE, broken), QUICK)


# ---- tokens


@pytest.mark.parametrize("context", [2, 16, 64, 512, 2048, 4096, 131_072])
@pytest.mark.parametrize("total", [16, 256, 2048])
def test_a_sequence_reaches_past_half_of_the_context(context: int, total: int) -> None:
    proof = proof_tokens(None, 50, context, total, CPU)
    assert context // 2 <= proof.furthest < context + context // 4
    long = proof.sequences[-1]
    assert proof.strided == (int(long.positions.max()) >= long.ids.shape[1])
    assert proof.count <= max(2 * total, 64)
    assert len(proof.targets()) == len(proof.numbers()) == proof.count
    assert all(int(each.ids.max()) < 50 for each in proof.sequences)


def test_up_to_a_context_of_2048_positions_have_no_gaps() -> None:
    assert not proof_tokens(None, 50, 2048, 2048, CPU).strided
    assert proof_tokens(None, 50, 4096, 2048, CPU).strided


def test_gaps_show_a_wrong_scaling_where_a_shift_does_not() -> None:
    scaled = WIDE.model_copy(
        update={"max_position_embeddings": 100_000, "rope_scaling": LinearScaling(factor=1.02)}
    )
    plain = WIDE.model_copy(update={"max_position_embeddings": 100_000})
    tensors = tensors_of(WIDE)
    found = compare(source(plain, tensors), source(scaled, tensors), QUICK)
    assert found.run["furthest"] > 50_000
    assert found.divergence.worst_relative_error > 3 * found.divergence.relative_error / 2
    assert not found.equal


# ---- the same


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_is_itself_bit_for_bit(name: str, low_memory: bool, tmp_path: Path) -> None:
    model = model_of(CONFIGS[name])
    formats.save(tmp_path / "model", weights_of(model))
    settings = QUICK.model_copy(update={"low_memory": low_memory})
    found = compare(
        formats.open_model(tmp_path / "model"), source(model.config, tensors_of(model.config)), settings
    )
    assert found.equal
    assert found.verdict == "the same: weights and logits are equal bit for bit"
    assert found.divergence.max_difference == 0
    assert found.divergence.kl_max == 0
    assert found.divergence.top1_agreement == 1
    assert found.sha256_a == found.sha256_b == provenance.payload_hash(weights_of(model))
    assert low_memory or found.first_parting is None


@pytest.mark.parametrize(
    "kind", ["float64", "float16", "bfloat16", "q8_0", "int8", "q5_0", "q5_1", "q4_0", "q4_1"]
)
@pytest.mark.parametrize("flat", [False, True])
def test_another_type_is_the_same_model(kind: str, flat: bool) -> None:
    tensors = tensors_of(WIDE, flat)
    found = compare(source(WIDE, tensors), source(WIDE, rounded(tensors, kind)), QUICK)
    assert found.equal, found.verdict
    assert found.sha256_a != found.sha256_b
    assert found.limit == LIMITS["float32" if kind == "float64" else kind]
    assert found.furthest is not None
    assert not found.furthest.exceeds
    assert (found.divergence.max_difference > 0) == (kind != "float64")


def test_what_rounding_does_not_explain_is_held_to_float32() -> None:
    tensors = rounded(tensors_of(WIDE), "bfloat16")
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    found = compare(source(WIDE, tensors), source(WIDE, wide), QUICK)
    assert found.equal
    assert found.limit == LIMITS["float32"]
    assert found.divergence.max_difference == 0
    nearly = WIDE.model_copy(update={"rms_norm_eps": 1e-5 * (1 - 2e-8)})
    found = compare(source(WIDE, tensors), source(nearly, tensors), QUICK)
    assert found.equal
    assert not found.has_equal_bits
    assert found.limit == LIMITS["float32"]


def test_every_type_has_limits() -> None:
    assert set(LIMITS) == {*DTYPES, *BLOCKS, *CODED}
    assert set(RELATIVE) == set(DTYPES)
    assert set(STEPS) == set(BLOCKS)
    assert set(HALF_STEPS) == set(CODED)
    assert all(block_sizes(kind) for kind in LIMITS if kind in BLOCKS)


def test_a_tied_model_is_its_untied_copy() -> None:
    tied = CONFIGS["tied"]
    tensors = tensors_of(tied)
    untied = tied.model_copy(update={"tie_word_embeddings": False})
    found = compare(
        source(tied, tensors),
        source(untied, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}),
        QUICK,
    )
    assert found.equal
    assert any("tie_word_embeddings" in text for text in found.told)


def test_padding_of_the_vocabulary_is_no_difference() -> None:
    config = CONFIGS["odd vocabulary"]  # 101 words
    tensors = tensors_of(config)
    wide = config.model_copy(update={"vocab_size": 128})
    names = ("model.embed_tokens.weight", "lm_head.weight")
    more = {name: torch.cat((tensors[name], torch.ones(27, 32))) for name in names}
    for low_memory in (False, True):
        settings = QUICK.model_copy(update={"low_memory": low_memory})
        found = compare(source(config, tensors), source(wide, {**tensors, **more}), settings)
        assert found.equal, found.verdict
        assert found.run["vocabulary"] == 101
        assert found.divergence.max_difference == 0
        assert any("vocab_size" in text for text in found.told)


def test_other_vocabularies_cannot_be_compared(tokenizer: Tokenizer) -> None:
    wide = WIDE.model_copy(update={"vocab_size": 400})
    with pytest.raises(ModelError, match="models of 96 and 400 words cannot be compared"):
        compare(source(WIDE, tensors_of(WIDE)), source(wide, tensors_of(wide), tokenizer), QUICK)


# ---- different


@pytest.mark.parametrize("stored", ["float32", "q4_0"])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("fault", ["interleaved", "gate and up", "groups", "one norm", "other layer"])
def test_wrong_tensors_are_another_model(fault: str, flat: bool, stored: str) -> None:
    tensors = tensors_of(WIDE, flat)
    right = rounded(tensors, stored)
    wrong = {
        "interleaved": lambda: {name: interleaved(name, value, WIDE) for name, value in right.items()},
        "gate and up": lambda: swapped(right, "gate_proj", "up_proj"),
        "groups": lambda: {**right, **_regrouped(tensors, stored)},
        "one norm": lambda: {**right, "model.norm.weight": torch.full((WIDE.hidden_size,), 0.9)},
        "other layer": lambda: {**right, **_exchanged(right)},
    }[fault]()
    found = compare(source(WIDE, tensors), source(WIDE, wrong), QUICK)
    assert not found.equal
    assert found.verdict.startswith("different: ")
    assert found.furthest is not None
    assert found.furthest.exceeds


def _regrouped(tensors: Named, stored: str) -> Named:
    """Keys and values as though query head n read head n modulo K, not n // (N/K)."""
    names = [name for name in tensors if "k_proj" in name or "v_proj" in name]
    return rounded(
        {name: tensors[name].unflatten(0, (2, -1)).flip(0).flatten(0, 1) for name in names}, stored
    )


def _exchanged(tensors: Named) -> Named:
    """What layer 0 has of layer 1's, and the reverse."""
    pairs = [(name, name.replace("layers.0", "layers.1")) for name in tensors if "layers.0.mlp" in name]
    return {one: tensors[other] for pair in pairs for one, other in (pair, pair[::-1])}


LLAMA3 = Llama3Scaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 1e-6},
        {"rope_theta": 500_000.0},
        {"rope_scaling": LLAMA3},
        {"rope_scaling": LinearScaling(factor=2.0)},
        {"sliding_window": 8},
    ],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("flat", [False, True])
def test_equal_weights_with_another_config_are_another_model(change: dict, flat: bool) -> None:
    tensors = tensors_of(WIDE, flat)
    found = compare(source(WIDE, tensors), source(WIDE.model_copy(update=change), tensors), QUICK)
    assert found.sha256_a == found.sha256_b
    assert not found.equal
    assert found.config[0].startswith(next(iter(change)))


def test_other_head_counts_are_another_model() -> None:
    tensors = tensors_of(WIDE)
    other = WIDE.model_copy(update={"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8})
    found = compare(source(WIDE, tensors), source(other, tensors), QUICK)
    assert not found.equal
    assert any("num_attention_heads" in reason for reason in found.reasons)


def test_another_model_of_the_same_shape() -> None:
    tensors = tensors_of(WIDE)
    other = {name: -tensor for name, tensor in tensors.items()}
    assert not compare(source(WIDE, tensors), source(WIDE, rounded(other, "q4_0")), QUICK).equal


def test_fields_that_change_no_logit_are_told() -> None:
    changed = WIDE.model_copy(
        update={"max_position_embeddings": 128, "initializer_range": 0.1, "rms_norm_eps": 1e-5 * (1 - 2e-8)}
    )
    matter, told = config_differences(WIDE, changed)
    assert not matter
    assert [text.partition(":")[0] for text in told] == [
        "max_position_embeddings",
        "rms_norm_eps",
        "initializer_range",
    ]


def test_two_spellings_of_one_rotation_are_one() -> None:
    spelled = WIDE.model_copy(update={"rope_scaling": LinearScaling(factor=1.0)})
    assert config_differences(WIDE, spelled)[0] == ()
    dynamic = CONFIGS["dynamic"]
    longer = dynamic.model_copy(update={"max_position_embeddings": 32})
    assert config_differences(dynamic, longer)[0] == ("max_position_embeddings: 16 → 32",)


# ---- every row


def heavy(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Student's t with two degrees of freedom, whose variance is infinite."""
    normal, *others = (torch.randn(shape, generator=generator) for _ in range(3))
    return 0.05 * normal / (others[0] ** 2 + others[1] ** 2).div(2).sqrt()


def one_channel(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """One column sixty times as large as the others, as in trained models."""
    values = torch.randn(shape, generator=generator) * 0.02
    values[:, 7] *= 60
    return values


def signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Half of the numbers lie at the end of a block that q4_0 and q5_0 cut."""
    return torch.randn(shape, generator=generator).sign() * 0.02


def dead_rows(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Rows so small that float16 has no scale for them."""
    values = torch.randn(shape, generator=generator) * 0.02
    values[3], values[5] = 0, values[5] * 1e-6
    return values


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "q8_0", "int8", "q5_0", "q5_1", "q4_0", "q4_1"])
@pytest.mark.parametrize("drawn", [heavy, one_channel, signs, dead_rows])
def test_a_conversion_is_right_whatever_the_weights(drawn: Callable, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: drawn(tuple(tensor.shape), generator) if tensor.dim() == 2 else tensor
        for name, tensor in tensors_of(WIDE).items()
    }
    other = rounded(tensors, kind)
    for pair in ((tensors, other), (other, tensors)):
        found = compare(*[source(WIDE, each) for each in pair], QUICK)
        assert found.equal, found.verdict
        assert found.distances.furthest is not None


def changed(tensors: Named, name: str, **parts: Tensor) -> Named:
    value = tensors[name]
    assert isinstance(value, Packed)
    return {**tensors, name: replace(value, **parts)}


@pytest.mark.parametrize("kind", FORMS)
def test_what_two_of_one_scheme_may_differ_by_is_the_rounding_of_scales(kind: str) -> None:
    """One can hold all that the other holds, so that a code that differs was not rounded to the scheme."""
    tensors, name = rounded(tensors_of(WIDE), kind), "model.layers.1.self_attn.q_proj.weight"
    value = tensors[name]
    assert isinstance(value, Packed) and value.scales is not None
    assert compare(source(WIDE, tensors), source(WIDE, dict(tensors)), QUICK).has_equal_bits
    near = changed(tensors, name, scales=value.scales.bfloat16())
    found = compare(source(WIDE, tensors), source(WIDE, near), QUICK)
    assert found.equal and not found.has_equal_numbers and found.limit == LIMITS["bfloat16"], found.verdict
    data = value.data.clone()
    data[3, 5] += 1 if data[3, 5] % 16 < 15 else -1
    again = {n: t * (1 + 0.01 * torch.randn(t.shape)) for n, t in tensors_of(WIDE).items()}
    for other in (changed(tensors, name, data=data), {**tensors, name: rounded(again, kind)[name]}):
        found = compare(source(WIDE, tensors), source(WIDE, other), QUICK)
        scales = str(value.scales.dtype).removeprefix("torch.")
        assert f"{name} differs by" in found.verdict
        assert f"where rounding {kind}'s scales to {scales} allows" in found.verdict
        assert found.distances.as_dict()["furthest"]["scheme"] == kind


def test_other_groups_of_one_scheme_are_a_rounding_of_their_own() -> None:
    tensors = tensors_of(WIDE)
    by_row, by_group = (
        {
            n: quantized(t, Format("int8", group, torch.float32)) if t.dim() == 2 else t
            for n, t in tensors.items()
        }
        for group in (None, 32)
    )
    found = compare(source(WIDE, by_row), source(WIDE, by_group), QUICK)
    assert found.equal and found.rounding == "int8" and not found.has_equal_numbers


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "q8_0", "int8", "q5_0", "q5_1", "q4_0", "q4_1"])
@pytest.mark.parametrize("fault", ["zero", "neighbour", "exchanged columns"])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"])
def test_one_wrong_row_is_found(name: str, fault: str, kind: str) -> None:
    tensors = tensors_of(WIDE)
    for row in (0, 41, len(tensors[name]) - 1):
        matrix = tensors[name].clone()
        if fault == "zero":
            matrix[row] = 0
        elif fault == "neighbour":
            matrix[row] = matrix[row - 1]
        else:
            matrix[row] = matrix[row].roll(1)
        wrong = rounded({name: matrix}, kind)
        for right in (rounded({name: tensors[name]}, kind), {name: tensors[name]}):
            for pair in ((right, wrong), (wrong, right)):
                far = furthest_of(*pair)
                assert far.exceeds
                assert far.row == row
                assert far.name == name


def furthest_of(a: Named, b: Named) -> Furthest:
    made = []
    for tensors in (a, b):
        made.append(Sketches(10**6, wide=True, by_block=frozenset(LIMITS), projections=16))
        for name, value in tensors.items():
            made[-1].add(name, value, value)
    found = distances(*made).furthest
    assert found is not None
    return found


@pytest.mark.parametrize("kind", ["float32", "q4_0"])
def test_rows_that_no_text_reaches_are_compared(kind: str, tokenizer: Tokenizer) -> None:
    config = WIDE.model_copy(update={"vocab_size": 400})
    tensors = tensors_of(config)
    proof = proof_tokens(tokenizer, 400, 64, 256, CPU)
    used = {int(index) for each in proof.sequences for index in each.ids.flatten()}
    row = max(set(range(400)) - used)
    embedding = tensors["model.embed_tokens.weight"].clone()
    embedding[row] = 0
    wrong = rounded({**tensors, "model.embed_tokens.weight": embedding}, kind)
    settings = QUICK.model_copy(update={"greedy_tokens": 0})
    found = compare(source(config, tensors, tokenizer), source(config, wrong, tokenizer), settings)
    assert not found.equal
    assert f"row {row} of model.embed_tokens.weight differs" in found.verdict


def test_one_number_of_a_norm_is_seen() -> None:
    tensors = tensors_of(WIDE)
    norm = tensors["model.norm.weight"].clone()
    norm[9] *= 1.02
    found = compare(
        source(WIDE, tensors), source(WIDE, rounded(tensors, "q4_0") | {"model.norm.weight": norm})
    )
    assert not found.equal
    assert "row 9 of model.norm.weight" in found.verdict


def test_the_distance_is_that_of_the_whole_matrix() -> None:
    a = torch.randn(4000, 96, generator=torch.Generator().manual_seed(1))
    b = a + 0.1 * torch.randn(a.shape, generator=torch.Generator().manual_seed(2))
    expected = ((a - b).norm() / a.norm()).item()
    made = [Sketches(10**6, False, frozenset(), 8) for _ in range(2)]
    for each, matrix in zip(made, (a, b), strict=True):
        each.add("x", matrix, matrix)
    first, second = (each.found["x"] for each in made)
    found = ((first.rows - second.rows).norm() / first.norms.norm()).item()
    assert found == pytest.approx(expected, rel=0.02)


def test_a_wider_type_that_changes_no_number_is_no_damage() -> None:
    tensors = rounded(tensors_of(WIDE), "bfloat16")
    wide = {name: tensor.float() if tensor.dim() == 1 else tensor for name, tensor in tensors.items()}
    found = compare(source(WIDE, tensors), source(WIDE, wide), QUICK)
    words = "every number is equal; 5 tensors are stored in a wider type"
    assert found.verdict == f"the same: {words}; all logits are equal"
    assert words in found.lines()[0]
    last = wide["model.norm.weight"].clone()
    last[0] = last[0].nextafter(torch.tensor(9.0))
    nearly = compare(source(WIDE, tensors), source(WIDE, {**wide, "model.norm.weight": last}), QUICK)
    assert nearly.equal
    assert "every number is equal" not in nearly.verdict
    for name in ("lm_head.weight", "model.layers.0.mlp.up_proj.weight"):
        full = {each: tensor.float() for each, tensor in tensors.items()}
        full[name][3, 3] = full[name][3, 3].nextafter(torch.tensor(9.0))
        assert not compare(source(WIDE, tensors), source(WIDE, full), QUICK).has_equal_numbers


def test_other_end_tokens_are_in_the_verdict() -> None:
    one, other = (source(WIDE, tensors_of(WIDE)) for _ in range(2))
    found = compare(replace(one, end_ids=(2,)), replace(other, end_ids=(3,)), QUICK)
    assert found.equal
    assert found.verdict.endswith("; they end answers at different tokens")
    assert "end answers" not in compare(replace(one, end_ids=(2,)), other, QUICK).verdict


# ---- sliding windows


def test_a_window_is_passed_where_the_tokens_allow_it() -> None:
    long = WIDE.model_copy(update={"max_position_embeddings": 4096})
    narrow = long.model_copy(update={"sliding_window": 300})
    tensors = tensors_of(WIDE)
    settings = QUICK.model_copy(update={"tokens": 512, "greedy_tokens": 0})
    found = compare(source(narrow, tensors), source(long, tensors), settings)
    assert found.divergence.max_difference > 0.01
    assert not any("window of 300" in text for text in found.told)
    same = compare(source(narrow, tensors), source(narrow, tensors), QUICK)
    assert same.equal
    assert any("the sliding window of 300 was not reached" in text for text in same.told)


# ---- greedy


def test_where_greedy_continuations_part() -> None:
    tensors = tensors_of(WIDE)
    settings = VerifySettings(tokens=64, greedy_tokens=40, low_memory=False)
    found = compare(source(WIDE, tensors), source(WIDE, rounded(tensors, "q4_0")), settings)
    assert found.parted is not None
    models = []
    for kind in ("float32", "q4_0"):
        models.append(Llama(WIDE))
        each = rounded(tensors, kind).items()
        load_weights(
            models[-1], Weights(WIDE, [(n, unpack(v) if isinstance(v, Packed) else v) for n, v in each])
        )
    prompts = proof_tokens(None, WIDE.vocab_size, 64, 64, CPU).prompts
    first, second = (_greedy(model, prompts, found.greedy_tokens) for model in models)
    for row, place in enumerate(found.parted):
        differ = (first[row] != second[row]).nonzero()
        assert place == (int(differ[0]) if len(differ) else None)
    assert found.first_parting is not None
    assert found.as_dict()["greedy"]["first"] == found.first_parting


@torch.no_grad()
def _greedy(model: Llama, ids: Tensor, count: int) -> Tensor:
    for _ in range(count):
        ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
    return ids[:, -count:]


@pytest.mark.parametrize("change", [{"sliding_window": 6}, {"rope_scaling": CONFIGS["dynamic"].rope_scaling}])
def test_greedy_continuations_are_the_models_own(change: dict) -> None:
    config = CONFIGS["grouped"].model_copy(update={**change, "max_position_embeddings": 40})
    found = compare(*[source(config, tensors_of(config))] * 2, QUICK)
    assert found.parted == (None,) * 4


# ---- tokenizers


def test_a_tokenizer_agrees_with_its_saved_self(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    found = agreement(tokenizer, load(tmp_path))
    assert found.holds
    assert found.equal == found.strings > 50
    assert found.template == "neither"


def test_a_shifted_tokenizer_is_a_difference(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = WIDE.model_copy(update={"vocab_size": 401})
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    high = sorted(vocabulary, key=vocabulary.__getitem__)[-40:]
    for name, other in zip(high, [*high[1:], high[0]], strict=True):
        values["model"]["vocab"][name] = dict(vocabulary)[other] if other != high[0] else 400 - 40
    path.write_text(json.dumps(values))
    (tmp_path / "tokenizer.model").unlink()
    tensors = tensors_of(config)
    found = compare(source(config, tensors, tokenizer), source(config, tensors, load(tmp_path)), QUICK)
    assert not found.equal
    assert "the tokenizers: " in found.verdict
    assert found.tokenizers is not None
    assert found.tokenizers.equal < found.tokenizers.strings
    assert found.divergence.max_difference == 0  # the models are the same


def test_another_tokenizer_of_the_same_size_is_a_difference(tokenizer: Tokenizer) -> None:
    other = train([inspect.getsource(inspect)], TokenizerSettings(vocab_size=400))
    assert not agreement(tokenizer, other).holds


TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"


def test_templates_are_compared_by_what_they_render(tokenizer: Tokenizer) -> None:
    def with_template(text: str | None) -> Tokenizer:
        return Tokenizer(tokenizer._codec, chat_template=text)

    spelled = "{{- bos_token -}}" + TEMPLATE.removeprefix("{{ bos_token }}")
    assert agreement(with_template(TEMPLATE), with_template(spelled)).template == "equal"
    wrong = agreement(with_template(TEMPLATE), with_template(TEMPLATE.replace("[", "(")))
    assert wrong.template == "different"
    assert not wrong.holds
    assert "the conversation" in str(wrong.rendered)
    lacking = agreement(with_template(TEMPLATE), with_template(None))
    assert lacking.template == "only the first has one"
    assert not lacking.holds


@pytest.mark.parametrize(
    "tail",
    [
        "{% if messages[-1].role == 'tool' %}TOOL{% endif %}",
        "{% if not add_generation_prompt %}END{% endif %}",
        "{% if tools %}{{ tools | tojson }}{% endif %}",
        "{% if messages|length > 5 %}LONG{% endif %}",
        "{% if messages[-1].role == 'assistant' %}CONTINUED{% endif %}",
    ],
)
def test_a_branch_of_a_template_is_a_difference(tokenizer: Tokenizer, tail: str) -> None:
    one, other = (Tokenizer(tokenizer._codec, chat_template=text) for text in (TEMPLATE, TEMPLATE + tail))
    assert agreement(one, other).template == "different"


def test_templates_written_differently_are_told(tokenizer: Tokenizer) -> None:
    one, other = (
        Tokenizer(tokenizer._codec, chat_template=text) for text in (TEMPLATE, TEMPLATE + "{# a remark #}")
    )
    words = f"the templates are written differently; {len(CONVERSATIONS)} conversations alike"
    assert agreement(one, other).notes == (words,)
    assert agreement(one, one).notes == ()


def test_two_ids_exchanged_in_a_large_vocabulary_are_found(assets: Path, tmp_path: Path) -> None:
    whole = load(assets / "tokenizers/llama2/tokenizer.model")
    whole.save(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    assert agreement(whole, load(tmp_path)).holds
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    first, second = (name for name, index in vocabulary.items() if index in (20_000, 20_001))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(values))
    found = agreement(whole, load(tmp_path))
    assert not found.holds
    assert (found.tokens, found.tokens_equal) == (32_000, 31_998)
    assert str(found.first).startswith("token 20000 is ")


def test_a_token_that_is_special_in_one_only_is_found(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.model").unlink(missing_ok=True)
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text())
    entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for number in range(2000):
        name = f"<extra {number}>"
        values["added_tokens"].append({"id": 400 + number, "content": name, "special": True, **entry})
    path.write_text(json.dumps(values))
    many = load(tmp_path)
    assert agreement(many, many).holds
    values["added_tokens"][-700]["special"] = False
    path.write_text(json.dumps(values))
    found = agreement(many, load(tmp_path))
    assert not found.holds
    assert found.tokens_equal == found.tokens - 1


def test_a_missing_tokenizer_is_told(tokenizer: Tokenizer) -> None:
    config = WIDE.model_copy(update={"vocab_size": 400})
    tensors = tensors_of(config)
    found = compare(source(config, tensors), source(config, tensors, tokenizer), QUICK)
    assert found.equal
    assert found.tokenizers is None
    assert found.run["is_text"]
    assert "only the second has a tokenizer" in found.told
    without = compare(source(config, tensors, tokenizer), source(config, tensors), QUICK, tokenizer_a=None)
    assert not without.run["is_text"]
    assert "neither has a tokenizer: random ids were run" in without.told


# ---- what is told


def test_the_result_is_json_and_lines(tokenizer: Tokenizer) -> None:
    config = WIDE.model_copy(update={"vocab_size": 400})
    tensors = tensors_of(config)
    found = compare(
        source(config, tensors, tokenizer), source(config, rounded(tensors, "q8_0"), tokenizer), QUICK
    )
    values = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert values["equal"] is True
    assert values["weights"]["stored"][1] == {"q8_0": 16, "float32": 5}
    assert values["logits"]["relative_error"] == found.divergence.relative_error
    assert values["limits"] == {"logits": 0.8, "kl": 3.0}
    lines = found.lines()
    assert all("\n" not in line for line in lines)
    assert lines[-1].startswith("verdict")
    assert "\n" not in found.verdict


def test_progress_counts_the_tensors_of_both() -> None:
    seen: list[float] = []

    class Counting:
        def __enter__(self) -> Counting:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def start_at(self, amount: float) -> None:
            pass

        def advance(self, amount: float, note: str = "") -> None:
            seen.append(amount)

        def say(self, text: str) -> None:
            pass

    totals: list[float] = []

    def track(label: str, total: float, unit: str) -> Counting:
        totals.append(total)
        return Counting()

    compare(*[source(WIDE, tensors_of(WIDE))] * 2, QUICK, track)
    assert totals == [sum(seen)] == [2 * 21]


# ---- size

STREAMED = r"""
import math, re
from pathlib import Path
import torch
from puna.formats.source import Source
from puna.formats.proof.verify import VerifySettings, compare
from puna.model.config import ModelConfig
from puna.model.counts import parameters
from puna.model.weights import Weights, shapes

config = ModelConfig(vocab_size=4000, hidden_size=512, intermediate_size=2048, num_hidden_layers=60,
                     num_attention_heads=8)
numbers = torch.randn(4000 * 512).mul(0.02).bfloat16()

class Tensors:
    def __iter__(self):
        return ((name, numbers[: math.prod(shape)].view(shape)) for name, shape in shapes(config).items())

def source():
    return Source(Path("model"), "hf", Weights(config, Tensors()), torch.bfloat16, {"bfloat16": 1})

assert compare(source(), source(), VerifySettings(low_memory=True, tokens=64)).equal
# Not ru_maxrss: a process begins with that of the one that started it.
most = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) >> 10
print(4 * parameters(config).total >> 20, most)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the most memory")
def test_layer_by_layer_a_large_model_takes_little_memory() -> None:
    done = subprocess.run([sys.executable, "-c", STREAMED], capture_output=True, text=True, check=True)
    whole, peak = (int(word) for word in done.stdout.split())  # MiB
    assert whole > 900
    assert peak < 600  # torch itself takes two thirds of that


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("low_memory", [False, True])
def test_a_gpu_finds_the_same(low_memory: bool) -> None:
    tensors = tensors_of(WIDE)
    sources = source(WIDE, tensors), source(WIDE, rounded(tensors, "q8_0"))
    settings = QUICK.model_copy(update={"low_memory": low_memory})
    here = compare(*sources, settings)
    there = compare(*sources, settings.model_copy(update={"device": "cuda"}))
    assert there.equal
    assert there.divergence.relative_error == pytest.approx(here.divergence.relative_error, rel=1e-2)
    assert compare(sources[0], sources[0], settings).divergence.max_difference == 0

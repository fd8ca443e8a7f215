"""Frequencies and angles: the bits of transformers, the limits of every scaling, no state to spoil."""

from __future__ import annotations

import math

import pytest
import torch

from puna.model.rope import (
    SCALINGS,
    DynamicScaling,
    Llama3Scaling,
    NoScaling,
    Rope,
    apply_rope,
    document_lengths,
)

CONTEXT, WIDTH, THETA = 4096, 128, 500_000.0
FIELDS = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.3},
    "yarn": {"factor": 16.0, "original_max_position_embeddings": 2048},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 2048,
    },
}


def rope_of(name: str, **fields) -> Rope:
    return Rope(THETA, WIDTH, CONTEXT, SCALINGS[name](**(fields or FIELDS[name])))


def cos_sin(rope: Rope, positions: torch.Tensor, lengths: torch.Tensor | None = None):
    return torch.stack(rope(positions, torch.float32, lengths))


def test_every_scaling_is_tried_here():
    assert FIELDS.keys() == SCALINGS.keys()


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("last", [100, 4095, 4096, 130_000])
def test_cosines_and_sines_have_the_bits_of_transformers(name, last):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(
        hidden_size=2 * WIDTH,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        rope_theta=THETA,
        rope_scaling={"rope_type": name, **FIELDS[name]},
    )
    positions = torch.tensor([[0, 1, 2, 77, last // 2, last - 1, last]])
    their_cos, their_sin = llama.LlamaRotaryEmbedding(config)(torch.zeros(1), positions)

    cos, sin = rope_of(name)(positions, torch.float32)
    first, second = sin.chunk(2, dim=-1)
    assert torch.equal(cos, their_cos)
    assert torch.equal(torch.cat((-first, second), dim=-1), their_sin)


def test_frequencies_are_powers_of_theta():
    frequencies, factor = NoScaling().frequencies(10_000.0, 4, 2048, None, torch.float64)
    assert frequencies.tolist() == pytest.approx([1.0, 0.01], rel=1e-15)
    assert factor == 1.0


def test_llama3_keeps_short_waves_divides_long_ones_and_blends_between():
    scaling = Llama3Scaling(**FIELDS["llama3"])
    plain, _ = NoScaling().frequencies(THETA, WIDTH, CONTEXT, None, torch.float64)
    scaled, _ = scaling.frequencies(THETA, WIDTH, CONTEXT, None, torch.float64)
    waves = 2 * math.pi / plain
    assert torch.equal(scaled[waves < 2048 / 4], plain[waves < 2048 / 4])
    assert torch.allclose(scaled[waves > 2048], plain[waves > 2048] / 8, rtol=1e-15)
    between = (waves > 2048 / 4) & (waves < 2048)
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


def test_dynamic_is_plain_up_to_the_context_and_each_row_has_its_own_length():
    rows = torch.stack([torch.arange(CONTEXT - 50, CONTEXT), torch.arange(2 * CONTEXT - 50, 2 * CONTEXT)])
    both = cos_sin(rope_of("dynamic"), rows)
    assert torch.equal(both[:, :1], cos_sin(rope_of("default"), rows[:1]))
    assert torch.equal(both[:, 1:], cos_sin(rope_of("dynamic"), rows[1:]))
    assert not torch.equal(both[:, 1:], cos_sin(rope_of("default"), rows[1:]))


def test_dynamic_turns_by_given_lengths_not_by_the_positions_at_hand():
    whole = torch.arange(2 * CONTEXT)[None]
    at_once = cos_sin(rope_of("dynamic"), whole)
    fixed = torch.tensor([[2 * CONTEXT]])
    assert torch.equal(at_once[:, :, 10:11], cos_sin(rope_of("dynamic"), whole[:, 10:11], fixed))
    assert not torch.equal(at_once[:, :, 10:11], cos_sin(rope_of("dynamic"), whole[:, 10:11]))


def test_document_lengths_are_last_position_plus_one():
    documents = torch.tensor([[7, 7, 7, 8, 8], [1, 2, 2, 2, 2]])
    positions = torch.tensor([[0, 1, 2, 0, 1], [9, 0, 1, 2, 3]])
    assert document_lengths(positions, documents).tolist() == [[3, 3, 3, 2, 2], [10, 4, 4, 4, 4]]


@pytest.mark.parametrize("name", SCALINGS)
def test_scores_depend_on_distance_only(name):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, WIDTH, dtype=torch.float64)
    rope, lengths = rope_of(name), torch.tensor([[9000]])

    def score(at: int, back: int) -> float:
        cos, sin = rope(torch.tensor([[at, at - back]]), torch.float64, lengths)
        turned_q, _ = apply_rope(q, k, cos[:, :1], sin[:, :1])
        _, turned_k = apply_rope(q, k, cos[:, 1:], sin[:, 1:])
        return (turned_q * turned_k).sum().item()

    assert score(8000, 37) == pytest.approx(score(40, 37), rel=1e-9)
    assert score(8000, 37) != pytest.approx(score(8000, 38), rel=1e-3)


def test_pairs_are_half_a_head_apart():
    x = torch.zeros(1, 1, 1, 4)
    x[..., 0] = 1.0
    cos, sin = torch.tensor([[[0.6, 1.0, 0.6, 1.0]]]), torch.tensor([[[-0.8, 0.0, 0.8, 0.0]]])
    turned, _ = apply_rope(x, x, cos, sin)
    assert turned.flatten().tolist() == pytest.approx([0.6, 0.0, 0.8, 0.0])


def test_half_precision_is_rounded_once_after_turning():
    torch.manual_seed(0)
    x = torch.randn(1, 64, 2, WIDTH).bfloat16()
    cos, sin = rope_of("default")(torch.arange(5000, 5064)[None], torch.float32)
    rounded, _ = apply_rope(x, x, cos, sin)
    exact, _ = apply_rope(x.float(), x.float(), cos, sin)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, exact.bfloat16())


def test_rope_holds_no_tensor_that_a_move_or_a_meta_build_could_spoil():
    with torch.device("meta"):
        rope = rope_of("yarn")
        frequencies, _ = NoScaling().frequencies(THETA, WIDTH, CONTEXT, None, torch.float32)
    assert not list(rope.parameters()) + list(rope.buffers())
    assert frequencies.device.type == "cpu"
    positions = torch.arange(5)[None]
    assert torch.equal(cos_sin(rope.to(torch.bfloat16), positions), cos_sin(rope_of("yarn"), positions))


def test_dynamic_gives_plain_frequencies_without_lengths():
    scaling = DynamicScaling(factor=2.0)
    plain, _ = NoScaling().frequencies(THETA, WIDTH, CONTEXT, None, torch.float32)
    assert torch.equal(scaling.frequencies(THETA, WIDTH, CONTEXT, None, torch.float32)[0], plain)

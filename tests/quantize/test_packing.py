"""A packed model has the same weights and gives the same answers; unpacked it is as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import puna
from puna.engine.fingerprint import fingerprint
from puna.engine.llm import LLM
from puna.errors import ModelError
from puna.kernels.library import load
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.model.weights import Packed, Weights, load_weights, weights_of
from puna.quantize.codes import expand
from puna.quantize.loading import load_quantized
from puna.quantize.packed import PackedEmbedding, PackedLinear
from puna.quantize.packing import is_packed, pack, schemes, unpack
from puna.quantize.release import release
from puna.quantize.schemes import Format, quantized
from tests.model.shapes import CONFIGS, ids_of, model_of

pytestmark = pytest.mark.skipif(load("panels").functions is None, reason=load("panels").fault)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = ["grouped", "tied", "odd vocabulary", "all at once"]


def tensors_of(model: Llama) -> dict[str, Tensor]:
    found = {}
    for name, tensor in weights_of(model):
        assert isinstance(tensor, Tensor)
        found[name] = tensor.clone()
    return found


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(one.values(), other.values(), strict=True)
    )


@pytest.fixture(params=SHAPES)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_keep_their_names_and_bits(config: ModelConfig, dtype: torch.dtype) -> None:
    model = model_of(config, dtype)
    before = tensors_of(model)
    pack(model)
    assert sum(type(module) is PackedLinear for module in model.modules()) == 4 * config.num_hidden_layers + 1
    assert not any(type(module) is nn.Linear for module in model.modules())
    assert equal(tensors_of(model), before)
    unpack(model)
    assert not is_packed(model)
    assert equal(tensors_of(model), before)
    assert equal(dict(model.named_parameters()), before)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_are_those_of_the_model_up_to_rounding(config: ModelConfig, dtype: torch.dtype) -> None:
    model, ids = model_of(config, dtype).eval(), ids_of(config, 3, 20)
    exact = copy.deepcopy(model).double()(ids)
    before = model(ids)
    pack(model)
    found = model(ids)
    ours, theirs = ((x.double() - exact).abs() for x in (found, before))
    assert found.dtype == dtype and ours.mean() < 1.1 * theirs.mean() and ours.max() < 1.5 * theirs.max()
    unpack(model)
    assert torch.equal(model(ids), before)


def test_a_tied_matrix_is_held_once() -> None:
    model = model_of(CONFIGS["tied"])
    before = sum(parameter.nbytes for parameter in model.parameters())
    pack(model)
    assert type(model.model.embed_tokens) is PackedEmbedding
    embedding, head = model.model.get_submodule("embed_tokens"), model.get_submodule("lm_head")
    assert isinstance(embedding, PackedEmbedding) and isinstance(head, PackedLinear)
    assert embedding.matrix.panels is head.matrices()[0].panels
    assert sum(parameter.nbytes for parameter in model.parameters()) == pytest.approx(before, rel=0.2)
    unpack(model)
    assert model.model.embed_tokens.weight is model.lm_head.weight


def test_packing_twice_changes_nothing_more() -> None:
    model = model_of(CONFIGS["all at once"])
    pack(model)
    modules = list(map(id, model.modules()))
    pack(model)
    assert list(map(id, model.modules())) == modules


def test_modules_of_another_kind_stay() -> None:
    class Own(nn.Linear):
        pass

    model = model_of(CONFIGS["grouped"])
    model.model.layers[1].mlp.up_proj.__class__ = Own
    before = tensors_of(model)
    pack(model)
    assert type(model.model.layers[1].mlp.up_proj) is Own and is_packed(model)
    assert equal(tensors_of(model), before)


def test_what_the_products_do_not_take_stays() -> None:
    model = model_of(CONFIGS["grouped"], torch.float64)
    pack(model)
    assert not is_packed(model)


def test_an_unpacked_model_learns_again() -> None:
    model, ids = model_of(CONFIGS["tied"]), ids_of(CONFIGS["tied"], 2, 9)
    reference = copy.deepcopy(model)
    pack(model)
    assert not any(parameter.requires_grad for parameter in model.lm_head.parameters())
    unpack(model)
    for one in (model, reference):
        one(ids).square().mean().backward()
    for (name, one), (_, other) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad), name


def test_gradients_reach_what_is_not_packed() -> None:
    model, ids = model_of(CONFIGS["grouped"]).eval(), ids_of(CONFIGS["grouped"], 2, 9)
    reference = copy.deepcopy(model)
    pack(model)
    for one in (model, reference):
        one(ids).square().mean().backward()
    for (name, one), (_, other) in zip(
        ((name, x) for name, x in model.named_parameters() if x.requires_grad),
        ((name, x) for name, x in reference.named_parameters() if "norm" in name or "embed" in name),
        strict=True,
    ):
        assert one.grad is not None and other.grad is not None, name
        assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-5), name


def test_weights_are_not_put_into_a_packed_model() -> None:
    model = model_of(CONFIGS["grouped"])
    given = Weights(model.config, list(tensors_of(model).items()))
    pack(model)
    with pytest.raises(ModelError, match="unpack it first"):
        load_weights(model, given)


def test_what_is_saved_is_the_model(tmp_path: Path) -> None:
    model = model_of(CONFIGS["all at once"], torch.bfloat16).eval()
    before = tensors_of(model)
    LLM(model).save(tmp_path / "plain")
    llm = LLM(model)
    llm.pack()
    llm.save(tmp_path / "packed")
    plain, packed = (tmp_path / name / "model.safetensors" for name in ("plain", "packed"))
    assert plain.read_bytes() == packed.read_bytes()
    loaded = puna.load(tmp_path / "packed", dtype="bfloat16", device="cpu")
    assert not is_packed(loaded.model) and equal(tensors_of(loaded.model), before)


def test_the_engine_is_made_anew_for_a_packed_model() -> None:
    llm = LLM(model_of(CONFIGS["tied"]).eval())
    before = llm.engine
    expected = llm.generate([1, 2, 3], max_new_tokens=8, temperature=0.0)
    llm.pack()
    assert llm.engine is not before
    assert llm.generate([1, 2, 3], max_new_tokens=8, temperature=0.0).tokens == expected.tokens
    packed = llm.engine
    llm.pack()
    assert llm.engine is packed


def test_a_model_that_learns_is_not_rewritten() -> None:
    llm = LLM(model_of(CONFIGS["grouped"]).train())
    llm.pack()
    assert not is_packed(llm.model)
    llm.model.eval()(torch.tensor([[1, 2]])).sum().backward()
    llm.pack()
    assert not is_packed(llm.model)


def test_a_loaded_model_is_packed_by_its_first_answer_until_it_is_unpacked(tmp_path: Path) -> None:
    LLM(model_of(CONFIGS["tied"]).eval()).save(tmp_path / "model")
    llm = puna.load(tmp_path / "model", dtype="float32", device="cpu")
    before = tensors_of(llm.model)
    assert not is_packed(llm.model)
    answer = llm.generate([1, 2, 3], max_new_tokens=8, temperature=0.0)
    assert is_packed(llm.model)
    with pytest.raises(ModelError, match="call unpack"):
        llm.model.train()(torch.tensor([[1, 2]]))
    llm.unpack()
    llm.model(torch.tensor([[1, 2]])).sum().backward()
    assert all(parameter.grad is not None for parameter in llm.model.parameters())
    llm.model.zero_grad()
    llm.model.eval()
    assert llm.generate([1, 2, 3], max_new_tokens=8, temperature=0.0).tokens == answer.tokens
    assert not is_packed(llm.model)
    assert equal(tensors_of(llm.model), before)


def test_pages_of_a_file_are_given_back_and_others_are_not(tmp_path: Path) -> None:
    path, size = tmp_path / "numbers", 1 << 22
    torch.arange(size, dtype=torch.int32).numpy().tofile(path)
    mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.int32)
    own, expected = torch.arange(size, dtype=torch.int32), torch.arange(size, dtype=torch.int32)
    assert torch.equal(mapped, expected)
    before = resident()
    release(mapped)
    release(own)
    assert before - resident() > 0.9 * mapped.nbytes
    assert torch.equal(own, expected) and torch.equal(mapped, expected)
    mapped[5] = 99  # a page of its own now, which the file does not have
    release(mapped)
    assert mapped[5] == 99


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


FORMATS = {
    "int8": Format("int8", None, torch.float32),
    "int8 by groups": Format("int8", 16, torch.float16),
    "int4": Format("int4", 16, torch.float16),
    "int4, bfloat16 scales": Format("int4", 8, torch.bfloat16),
}


def quantized_weights(config: ModelConfig, formats: dict[str, Format]) -> list[tuple[str, Tensor | Packed]]:
    """Random weights, each matrix whose name ends so in its format; biases and norms as they are."""
    found: list[tuple[str, Tensor | Packed]] = []
    for name, tensor in tensors_of(model_of(config)).items():
        chosen = next((each for end, each in formats.items() if name.endswith(f"{end}.weight")), None)
        found.append((name, tensor if chosen is None else quantized(tensor, chosen)))
    return found


def quantized_model(
    weights: list[tuple[str, Tensor | Packed]], config: ModelConfig, dtype: torch.dtype = torch.float32
) -> Llama:
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    cast = ((name, x if isinstance(x, Packed) else x.to(dtype)) for name, x in weights)
    load_quantized(model, Weights(config, cast))
    return model.eval()


def same(one: Iterable[tuple[str, Tensor | Packed]], other: Iterable[tuple[str, Tensor | Packed]]) -> bool:
    """Whether names, schemes, types and every bit are equal."""
    return list(map(bits, one)) == list(map(bits, other))


def bits(pair: tuple[str, Tensor | Packed]) -> tuple[object, ...]:
    name, value = pair
    parts = (value,) if isinstance(value, Tensor) else (value.data, value.scales)
    scheme = None if isinstance(value, Tensor) else (value.scheme, value.shape)
    return name, scheme, [(x.dtype, x.shape, x.contiguous().view(torch.uint8).tolist()) for x in parts]


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("shape", ["grouped", "all at once"])
def test_whole_numbers_come_back_bit_for_bit(shape: str, format: Format) -> None:
    config = CONFIGS[shape]
    weights = quantized_weights(config, dict.fromkeys(("proj", "embed_tokens", "lm_head"), format))
    model = quantized_model(weights, config)
    assert same(weights_of(model), weights)
    pack(model)
    assert not any(type(module) is nn.Linear for module in model.modules())
    assert same(weights_of(model), weights)
    unpack(model)
    assert same(weights_of(model), weights) and is_packed(model)
    pack(model)
    assert same(weights_of(model), weights)
    assert schemes(model) == [format.scheme]


def test_products_are_joined_as_far_as_they_are_of_one_kind() -> None:
    eight, four = FORMATS["int8"], FORMATS["int4"]
    ends = {"q_proj": four, "k_proj": eight, "v_proj": eight, "gate_proj": four, "up_proj": four}
    weights = quantized_weights(CONFIGS["all at once"], ends)
    model, ids = quantized_model(weights, CONFIGS["all at once"]), ids_of(CONFIGS["all at once"], 2, 9)
    before = model(ids)
    pack(model)
    layer = model.model.layers[0]
    assert [matrix.kind for matrix in layer.self_attn.qkv.matrices()] == ["int4", "int8"]
    assert [matrix.kind for matrix in layer.self_attn.o_proj.matrices()] == ["float32"]
    assert [matrix.kind for matrix in layer.mlp.gate_up.matrices()] == ["int4"]
    assert same(weights_of(model), weights)
    assert (model(ids) - before).abs().max() < 0.02 * before.std()
    unpack(model)
    assert torch.equal(model(ids), before) and same(weights_of(model), weights)


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_of_whole_numbers_gives_rows_of_the_models_type(tied: bool) -> None:
    config = CONFIGS["tied" if tied else "grouped"]
    weights = quantized_weights(config, {"embed_tokens": FORMATS["int4"]})
    model = quantized_model(weights, config, torch.bfloat16)
    table = dict(weights)["model.embed_tokens.weight"]
    assert isinstance(table, Packed) and type(model.model.embed_tokens) is PackedEmbedding
    ids = torch.tensor([[3, 95, 0]])
    assert torch.equal(model.model.embed_tokens(ids), expand(table).bfloat16()[ids])
    assert (type(model.lm_head) is PackedLinear) == tied
    own = sum(part.nbytes for part in (table.data, table.scales) if part is not None)
    assert sum(part.nbytes for part in model.model.embed_tokens.parameters()) == own
    if tied:
        shared = {id(parameter) for parameter in model.lm_head.parameters()}
        assert shared == {id(parameter) for parameter in model.model.embed_tokens.parameters()}


def test_what_was_frozen_before_takes_adapters_on_top() -> None:
    """Gradients of a vector added before the last layer are those of the plain model."""
    model, ids = model_of(CONFIGS["grouped"]).requires_grad_(False), ids_of(CONFIGS["grouped"], 2, 9)
    reference = copy.deepcopy(model)
    pack(model)
    found = [gradient_of_added(each.train(), ids) for each in (model, reference)]
    assert torch.allclose(*found, rtol=1e-3, atol=1e-5) and found[0].abs().min() > 0
    unpack(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def gradient_of_added(model: Llama, ids: Tensor) -> Tensor:
    added = torch.zeros(model.config.hidden_size, requires_grad=True)
    handle = model.model.layers[0].register_forward_hook(lambda module, given, out: out + added)
    model(ids).square().mean().backward()
    handle.remove()
    assert added.grad is not None
    return added.grad


def test_a_quantized_model_is_frozen_and_passes_gradients_on() -> None:
    config, ids = CONFIGS["grouped"], ids_of(CONFIGS["grouped"], 2, 9)
    weights = quantized_weights(config, dict.fromkeys(("proj", "lm_head"), FORMATS["int8 by groups"]))
    model = quantized_model(weights, config).train()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(ids).sum().backward()  # nothing learns by mistake
    plain = model_of(config).requires_grad_(False)
    load_weights(plain, Weights(config, [(n, x if isinstance(x, Tensor) else expand(x)) for n, x in weights]))
    ours, theirs = gradient_of_added(model, ids), gradient_of_added(plain, ids)
    assert (ours - theirs).norm() < 0.05 * theirs.norm()


def test_a_fingerprint_is_of_the_weights_packed_or_not() -> None:
    config = CONFIGS["all at once"]
    weights = quantized_weights(config, {"gate_proj": FORMATS["int4"], "v_proj": FORMATS["int8"]})
    llm = LLM(quantized_model(weights, config))
    before = fingerprint(llm)
    llm.pack()
    assert fingerprint(llm) == before
    changed = dict(weights)["model.layers.1.mlp.gate_proj.weight"]
    assert isinstance(changed, Packed)
    changed.data[0, 0] ^= 1
    assert fingerprint(LLM(quantized_model(weights, config))) != before

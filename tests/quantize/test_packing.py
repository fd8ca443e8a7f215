"""A packed model has the same weights and gives the same answers; unpacked it is as it was."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import puna
from puna.engine.llm import LLM
from puna.errors import ModelError
from puna.kernels.library import load
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.model.weights import Weights, load_weights, weights_of
from puna.quantize.packed import PackedEmbedding, PackedLinear
from puna.quantize.packing import is_packed, pack, unpack
from puna.quantize.release import release
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
    assert model.model.embed_tokens.weight is model.lm_head.weight
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
    assert not model.lm_head.weight.requires_grad
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

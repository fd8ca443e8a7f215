"""Linear layers in nf4: their products and gradients, what they keep, and the way there and back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from puna.errors import ModelError, SettingsError
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.model.weights import Packed, weights_of
from puna.quantize.codes import expand
from puna.quantize.nf4 import Nf4Linear, from_nf4, to_nf4
from puna.quantize.recipe import Recipe
from puna.quantize.schemes import SCHEMES, quantized
from tests.model.shapes import ids_of, model_of

NF4 = Recipe(scheme="nf4")


def config_of(tied: bool = False, bias: bool = False) -> ModelConfig:
    return ModelConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=bias,
        tie_word_embeddings=tied,
    )


def layer_of(dtype: torch.dtype, bias: bool = True) -> tuple[Nf4Linear, nn.Linear]:
    """A layer, and a plain one with the numbers that it expands to."""
    torch.manual_seed(0)
    plain = nn.Linear(128, 48, bias=bias).to(dtype)
    packed = quantized(plain.weight.detach(), SCHEMES["nf4"].format)
    layer = Nf4Linear(packed, plain.bias)
    plain.weight.data = expand(packed).to(dtype)
    return layer, plain


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_product_and_gradient_are_those_of_the_expanded_matrix(dtype: torch.dtype, bias: bool) -> None:
    layer, plain = layer_of(dtype, bias)
    x = torch.randn(2, 5, 128).to(dtype).requires_grad_()
    again = x.detach().clone().requires_grad_()
    out, expected = layer(x), plain(again)
    assert out.dtype == dtype
    assert torch.allclose(out, expected, rtol=2 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    toward = torch.randn_like(out)
    out.backward(toward)
    expected.backward(toward)
    assert x.grad is not None and again.grad is not None
    assert torch.allclose(x.grad, again.grad, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-5)
    assert layer.codes.grad is None and layer.scales.grad is None


def test_gradient_by_differences() -> None:
    layer, _ = layer_of(torch.float32, bias=False)
    x = torch.randn(3, 128, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_what_waits_for_the_gradient_is_codes() -> None:
    layer, _ = layer_of(torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(3, 128, requires_grad=True))
    assert sum(tensor.nbytes for tensor in kept) == layer.codes.nbytes + layer.scales.nbytes


@pytest.mark.parametrize(
    "config", [config_of(), config_of(tied=True), config_of(bias=True)], ids=["untied", "tied", "bias"]
)
def test_a_model_there_and_back(config: ModelConfig) -> None:
    model = model_of(config, torch.float32)
    meant = copy.deepcopy(model)
    for module in meant.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = expand(quantized(module.weight.data, SCHEMES["nf4"].format))
    ids = ids_of(config, 2, 12)
    to_nf4(model, NF4)
    assert sum(type(module) is Nf4Linear for module in model.modules()) == 14
    assert type(model.lm_head) is nn.Linear and (model.lm_head.weight is model.model.embed_tokens.weight) == (
        config.tie_word_embeddings
    )
    assert torch.allclose(model(ids), meant(ids), atol=1e-5)
    from_nf4(model)
    assert torch.equal(model(ids), meant(ids))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in meant.named_parameters()]


def test_its_weights_are_packed_under_the_same_names() -> None:
    model = model_of(config_of(bias=True), torch.float32)
    names = [name for name, _ in weights_of(model)]
    to_nf4(model, NF4)
    found = dict(weights_of(model))
    assert list(found) == names
    packed = {name for name, value in found.items() if isinstance(value, Packed)}
    assert packed == {name for name in names if name.endswith("_proj.weight")}


def test_exceptions_are_kept_and_the_output_taken_where_asked() -> None:
    model = model_of(config_of(), torch.float32)
    to_nf4(model, Recipe(scheme="nf4", output="nf4", exceptions={"model.layers.0.*": "keep"}))
    found = [name for name, module in model.named_modules() if type(module) is Nf4Linear]
    assert len(found) == 8 and "lm_head" in found and not any("layers.0." in name for name in found)


def test_it_learns_beside_what_is_fixed() -> None:
    model = model_of(config_of(), torch.float32)
    to_nf4(model, NF4)
    model(ids_of(config_of(), 2, 12)).sum().backward()
    assert model.model.embed_tokens.weight.grad is not None
    assert bool(model.model.embed_tokens.weight.grad.any())


def test_what_it_refuses() -> None:
    model = model_of(config_of(), torch.float32)
    with pytest.raises(SettingsError, match="nf4"):
        to_nf4(model, Recipe(scheme="nf4", output="int8"))
    to_nf4(model, NF4)
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj is not a plain linear layer"):
        to_nf4(model, NF4)


def test_a_fault_in_one_layer_leaves_that_layer_plain() -> None:
    model = model_of(config_of(), torch.float32)
    weight = model.get_submodule("model.layers.1.mlp.down_proj").get_parameter("weight")
    with torch.no_grad():
        weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN"):
        to_nf4(model, NF4)
    assert isinstance(model, Llama)

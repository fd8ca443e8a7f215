"""Which policy a run gets, and what is said where one does not suit."""

from __future__ import annotations

import copy

import pytest
import torch

from puna.errors import SettingsError
from puna.kernels import gemm
from puna.model.llama import Llama
from puna.train import policies
from puna.train.compile import prepare_layers
from puna.train.gradients import accumulate
from puna.train.objectives import language_modelling
from puna.train.policies import Circumstances, MemorySettings, Policy, choose_policy
from tests.train.test_compile import trained
from tests.train.tiny import CONFIG, CPU, ROWS, TinySource, precision, same_bits, tiny_model

CUDA = torch.device("cuda")


def chosen(
    policy: str,
    model: Llama | None = None,
    device: torch.device = CPU,
    compute: torch.dtype = torch.float32,
    compiling: bool = False,
    float8: bool = False,
) -> str:
    settings = MemorySettings(policy=policy)  # type: ignore[arg-type]
    at = Circumstances(device, compute, float8, compiling)
    return choose_policy(settings, model or tiny_model(), at)


def refusal(policy: str, **more: object) -> str:
    with pytest.raises(SettingsError) as caught:
        chosen(policy, **more)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text and f'memory.policy = "{policy}"' in text
    return text


def test_auto_takes_the_layers_own_passes_where_there_is_code_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(policies, "_has_kernels", lambda compute: True)
    assert chosen("auto") == chosen("auto", compute=torch.bfloat16) == "paper"
    assert chosen("auto", compute=torch.float64) == "none"
    assert chosen("auto", device=CUDA, compute=torch.bfloat16) == "none"
    assert chosen("auto", compiling=True) == "none"
    assert chosen("auto", tiny_model(dropout=0.1)) == "none"
    monkeypatch.setattr(policies, "_has_kernels", lambda compute: False)
    assert chosen("auto") == "none"


def test_bfloat16_wants_products_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "available", lambda: False)
    assert not policies._has_kernels(torch.bfloat16)


def test_a_policy_by_name_is_taken() -> None:
    assert [chosen(policy) for policy in ("none", "paper", "block")] == ["none", "paper", "block"]
    assert chosen("offload", device=CUDA, compute=torch.bfloat16) == "offload"
    assert chosen("paper", device=CUDA, compute=torch.bfloat16, compiling=True) == "paper"


def test_what_does_not_suit_is_refused_in_a_line() -> None:
    assert 'use "paper" or "block"' in refusal("offload")
    dropping = refusal("paper", model=tiny_model(dropout=0.1))
    assert "know no dropout" in dropping and dropping.endswith('; use "none"')
    model = Llama(CONFIG.model_copy(update={"attention_dropout": 0.1}))
    assert "know no dropout" in refusal("block", model=model)
    assert 'leave compile.mode at "auto"' in refusal("paper", compiling=True)


def test_float8_wants_a_device_and_a_shape_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"cpu does not multiply in float8 .* leave it out"):
        chosen("none", float8=True)
    monkeypatch.setattr(policies.float8, "multiplies_float8", lambda device: device == CUDA)
    assert chosen("auto", device=CUDA, compute=torch.bfloat16, float8=True) == "paper"
    assert chosen("block", device=CUDA, compute=torch.bfloat16, float8=True) == "block"
    odd = Llama(CONFIG.model_copy(update={"intermediate_size": 72}))
    with pytest.raises(SettingsError, match=r"widths that 16 divides, got \(32, 72, 16\)"):
        chosen("paper", odd, CUDA, float8=True)
    with pytest.raises(
        SettingsError, match=r"float8 = true: the layer's own passes know no dropout.*it out$"
    ):
        chosen("auto", tiny_model(dropout=0.1), CUDA, float8=True)
    with pytest.raises(SettingsError, match=r"needs the layer's own passes"):
        chosen("none", device=CUDA, float8=True)


def test_layers_that_were_changed_are_told_by_their_name() -> None:
    class Adapted(torch.nn.Linear):
        pass

    model = tiny_model()
    model.model.layers[1].mlp.up_proj = Adapted(32, 64)
    assert "got Adapted" in refusal("paper", model=model)
    assert chosen("auto", model) == "none"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_learns_the_same_with_every_policy(dtype: torch.dtype) -> None:
    """Four updates: `block` gives the bits of `paper`, and both come as near to autograd as rounding lets."""
    (none, expected), (paper, losses), (block, others) = (
        trained("off", dtype, 0.0, policy=policy) for policy in ("none", "paper", "block")
    )
    assert same_bits(paper, block) and losses == others
    for ours, theirs in zip(losses, expected, strict=True):
        assert abs(ours - theirs) <= (1e-5 if dtype == torch.float32 else 2e-2) * theirs
    assert not same_bits(none, {name: torch.zeros_like(x) for name, x in none.items()})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("micro_rows", [ROWS, ROWS // 4])
def test_any_parameters_may_be_frozen(tied: bool, micro_rows: int) -> None:
    """All but those whose name holds a word, with one micro-batch and with several."""

    def gradients(policy: Policy, learned: str) -> dict[str, torch.Tensor | None]:
        model = tiny_model(dtype=torch.float64, tied=tied)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = learned in name
        prepare_layers(model, policy, "off", CPU, lambda: None, pytest.fail)
        batches = next(TinySource(micro_rows).steps(0)).batches
        seeds = range(len(batches))
        accumulate(language_modelling, model, batches, precision(torch.float64), seeds=seeds)
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    for learned in ("embed_tokens", "norm", "k_proj", "layers.0.mlp.up", "layers.1", "self_attn.o"):
        expected = gradients("none", learned)
        for policy in ("paper", "block", "offload"):
            for name, gradient in gradients(policy, learned).items():
                assert (gradient is None) == (expected[name] is None), (learned, policy, name)
                torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-14)


def test_generation_runs_the_layers_as_they_are_written() -> None:
    model = tiny_model()
    layers = prepare_layers(model, "paper", "off", CPU, lambda: None, pytest.fail)
    assert str(layers) == "memory policy paper"
    assert all("forward" in vars(block) for block in model.model.layers)
    with layers.replaced.eager():
        assert not any("forward" in vars(block) for block in model.model.layers)
    assert all("forward" in vars(block) for block in model.model.layers)


@pytest.mark.parametrize("tied", [False, True])
def test_a_copied_model_runs_its_own_layers(tied: bool) -> None:
    model = tiny_model(tied=tied)
    prepare_layers(model, "paper", "off", CPU, lambda: None, pytest.fail)
    ids = torch.arange(12).view(2, 6)
    expected = model(ids).detach()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = copied(ids)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in copied.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_embeddings_in_bfloat16_add_up_in_more() -> None:
    """One word over and over: in bfloat16 its sum would stop growing."""
    model = tiny_model(dtype=torch.bfloat16)
    prepare_layers(model, "paper", "off", CPU, lambda: None, pytest.fail)
    out = model.model.embed_tokens(torch.zeros(4096, dtype=torch.int64))
    slopes = torch.rand(out.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    out.backward(slopes)
    gradient = model.model.embed_tokens.weight.grad
    assert gradient is not None
    expected = slopes.double().sum(0)
    assert ((gradient[0].double() - expected).norm() / expected.norm()) < 0.01

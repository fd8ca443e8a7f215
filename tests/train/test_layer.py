"""The layer whose backward pass is written out: held against autograd, NumPy and finite differences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from puna.kernels import causal, float8, gates, norms, rowwise
from puna.kernels.compiler import find_toolchain
from puna.model.attention import KERNELS
from puna.model.config import ModelConfig
from puna.model.llama import Block, Llama
from puna.train import policies
from puna.train.compile import Replaced
from puna.train.layer import Memory
from puna.train.policies import written_out
from tests.model.shapes import CONFIGS, ids_of, model_of, summed_loss
from tests.model.test_parity_numpy import CASES, check_against_the_reference

POLICIES = ("paper", "block", "offload")
FORMS = ("grouped", "multi-query", "attention bias", "sliding window", "explicit head width", "all at once")
LENGTH = 11


def as_it_is(function: Any) -> Any:
    return function


def with_policy(model: Llama, policy: str) -> Llama:
    Replaced(written_out(model, policy, as_it_is)).apply()  # type: ignore[arg-type]
    return model


def gradients_of(model: Llama, ids: Tensor, documents: Tensor | None = None) -> dict[str, Tensor]:
    """The loss, and the gradient of every parameter."""
    model.zero_grad(set_to_none=True)
    loss = summed_loss(model(ids, None, documents).float(), ids.roll(-1, dims=1))
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}  # type: ignore[dict-item]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_equal_the_numpy_reference(name: str, case: str) -> None:
    check_against_the_reference(with_policy(model_of(CONFIGS[name], torch.float64), "paper"), *CASES[case])


@pytest.mark.parametrize("name", ["multi-query", "all at once"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    config = CONFIGS[name].model_copy(update={"hidden_size": 6, "head_dim": 2, "intermediate_size": 4})
    block = Block(config, KERNELS["fused"]).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model = Llama(config)
    model.model.layers = torch.nn.ModuleList([block])
    (_, forward), *_ = written_out(model, "paper", as_it_is)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(1, 5, 1, dtype=torch.float64)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
    starts = torch.tensor([[0, 0, 1, 3, 3], [0, 1, 1, 1, 2]], dtype=torch.int32)
    names = [name for name, _ in block.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        # The forward reads the block's parameters: the ones given take their place.
        swapped = dict(zip(names, parameters, strict=True))
        with exchanged(block, swapped):
            return forward(x, cos, sin, starts)

    assert torch.autograd.gradcheck(run, (x, *block.parameters()))


@contextmanager
def exchanged(block: Block, tensors: dict[str, Tensor]) -> Iterator[None]:
    with torch.nn.utils.parametrize.cached(), torch.nn.utils.stateless._reparametrize_module(block, tensors):
        yield


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_float32_equals_autograd(name: str, tied: bool) -> None:
    config = CONFIGS[name].model_copy(update={"tie_word_embeddings": tied})
    ids = ids_of(config, 3, LENGTH)
    documents = torch.tensor([[0] * 4 + [1] * 7, [0] * 11, [2] * 10 + [3]])
    for packed in (None, documents):
        expected = gradients_of(model_of(config), ids, packed)
        found = gradients_of(with_policy(model_of(config), "paper"), ids, packed)
        for key, value in expected.items():
            assert (found[key] - value).abs().max() <= 1e-5 * value.abs().max(), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_policies_give_the_same_bits(dtype: torch.dtype) -> None:
    config = CONFIGS["grouped"]
    ids = ids_of(config, 3, LENGTH)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        paper, *others = (gradients_of(with_policy(model_of(config), policy), ids) for policy in POLICIES)
    for other in others:
        assert all(torch.equal(paper[key], other[key]) for key in paper)


WIDE = ModelConfig(
    vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip


@pytest.mark.parametrize("mixed", [True, False])
def test_bfloat16_is_as_near_to_float32_as_autograds_own(mixed: bool) -> None:
    """Over all parameters together: the distance to gradients in float32 that rounding explains."""
    ids = ids_of(WIDE, 4, 48)
    exact = gradients_of(model_of(WIDE), ids)
    errors = []
    for prepare in (lambda model: model, lambda model: with_policy(model, "paper")):
        model = prepare(model_of(WIDE) if mixed else model_of(WIDE).bfloat16())
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            found = gradients_of(model, ids)
        errors.append({key: float((found[key] - exact[key]).norm() / exact[key].norm()) for key in exact})
    plain, ours = errors
    for key in exact:
        assert ours[key] <= 1.3 * plain[key] + 2e-3, (key, ours[key], plain[key])
    assert sum(ours.values()) <= 1.1 * sum(plain.values())


def kept_by(model: Llama, ids: Tensor) -> list[Tensor]:
    """What autograd holds of the layers for the backward pass, parameters and ids left out."""
    held: dict[int, Tensor] = {}
    own = {parameter.data_ptr() for parameter in model.parameters()}

    def hold(x: Tensor) -> Tensor:
        if x.is_floating_point() and x.data_ptr() not in own and x.numel():
            held[x.data_ptr()] = x
        return x

    cos, sin = model.model.rope(torch.arange(ids.shape[1])[None], torch.float32, None)
    own |= {cos.data_ptr(), sin.data_ptr()}
    x = model.model.embed_tokens(ids).detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
        for layer in model.model.layers:
            x = layer(x, cos, sin)
    return list(held.values())


def test_what_is_kept_is_what_the_policy_says() -> None:
    """In mixed precision: the stream in float32, what products give in bfloat16."""
    ids = ids_of(WIDE, 2, 16)
    R, D, F, L = 32, 64, 160, 2
    joint, heads = 64 + 2 * 32, 4  # (N + 2K)·H, N
    stream = 4 * R * D
    paper = stream + 2 * R * (joint + D + D + 2 * F) + 4 * R * (heads + 2)
    with torch.autocast("cpu", torch.bfloat16):
        sizes = {
            policy: sum(x.nbytes for x in kept_by(with_policy(model_of(WIDE), policy), ids))
            for policy in ("paper", "block")
        }
        plain = sum(x.nbytes for x in kept_by(model_of(WIDE), ids))
    assert sizes == {"paper": L * paper, "block": L * stream}
    assert plain > 1.5 * sizes["paper"]


def operations(model: Llama, ids: Tensor) -> list[str]:
    """The names of all backward functions of a loss."""
    found, waiting = [], [model(ids).sum().grad_fn]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.append(node.name())
        waiting += [next_node for next_node, _ in node.next_functions]
    return found


@pytest.mark.parametrize("policy", POLICIES)
def test_no_formula_of_autograds_own_runs_in_a_layer(policy: str) -> None:
    config = CONFIGS["grouped"]
    names = operations(with_policy(model_of(config), policy), ids_of(config, 2, 5))
    assert sum("_Layer" in name for name in names) == config.num_hidden_layers
    within = ("Silu", "Attention", "Attend", "Softmax", "Roll", "Index", "Cat")
    assert not [name for name in names if any(word in name for word in within)]
    assert any("Silu" in name for name in operations(model_of(config), ids_of(config, 2, 5)))


def test_frozen_parameters_get_none_and_the_others_the_same() -> None:
    config = CONFIGS["attention bias"]
    ids = ids_of(config, 2, 7)
    expected = gradients_of(with_policy(model_of(config), "paper"), ids)
    model = with_policy(model_of(config), "paper")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "v_proj" in name or "gate_proj" in name or "bias" in name
    found = gradients_of(model, ids)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(found[name], expected[name]), name
        else:
            assert found[name] is None


def test_a_second_backward_pass_is_refused() -> None:
    config = CONFIGS["grouped"]
    model = with_policy(model_of(config), "paper")
    loss = model(ids_of(config, 2, 5)).sum()
    (gradient,) = torch.autograd.grad(loss, [model.model.norm.weight], create_graph=True)
    x = model.model.layers[0].input_layernorm.weight
    (gradient,) = torch.autograd.grad(model(ids_of(config, 2, 5)).sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_without_gradients_the_same_numbers_come_out() -> None:
    config = CONFIGS["grouped"]
    model, ids = with_policy(model_of(config), "paper"), ids_of(config, 2, 9)
    learning = model(ids).detach()
    with torch.no_grad():
        assert torch.equal(model(ids), learning)
    with torch.inference_mode():
        assert torch.equal(model(ids), learning)


def test_where_nothing_is_learned_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    noting = Memory(lambda kept_now: kept.append(kept_now) or kept_now, policies.MEMORIES["paper"].fetch)
    monkeypatch.setitem(policies.MEMORIES, "offload", noting)
    config = CONFIGS["grouped"]
    model, ids = with_policy(model_of(config), "offload"), ids_of(config, 2, 9)
    with torch.no_grad():
        model(ids)
    assert not kept
    model(ids)
    assert len(kept) == config.num_hidden_layers


def test_products_in_float8_differ_by_their_rounding_alone() -> None:
    """On a CPU, where torch forms them one by one; and they are what runs in the layers."""
    ids = ids_of(WIDE, 4, 48)
    exact = gradients_of(model_of(WIDE), ids)
    model = model_of(WIDE)
    Replaced(written_out(model, "paper", as_it_is, float8=True)).apply()
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients_of(model, ids)
    assert float(found["loss"]) == pytest.approx(float(exact["loss"]), rel=2e-2)
    for key, value in exact.items():
        if key != "loss":
            assert (
                0.5 < float(torch.cosine_similarity(found[key].flatten(), value.flatten(), dim=0)) < 0.9999
            ), key


@pytest.mark.skipif(not find_toolchain().works, reason=find_toolchain().fault)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # while the compiler is imported
def test_the_passes_are_one_graph_each_where_kernels_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: what is kept is then decided here, and not by the compiler."""
    for module in (causal, gates, norms, rowwise):
        monkeypatch.setattr(module, "_calls", dict)
    config, graphs = CONFIGS["grouped"], []

    def compiler(function: Any) -> Any:
        def counted(graph: Any, inputs: Any) -> Any:
            graphs.append(function.__name__)
            return graph.forward

        return torch.compile(function, backend=counted, fullgraph=True, dynamic=False)

    ids = ids_of(config, 2, 9)
    for documents in (None, torch.tensor([[0] * 9, [1] * 4 + [2] * 5])):
        torch._dynamo.reset()
        graphs.clear()
        model = model_of(config, torch.float64)
        Replaced(written_out(model, "block", compiler)).apply()
        found = gradients_of(model, ids, documents)
        for key, value in gradients_of(model_of(config, torch.float64), ids, documents).items():
            torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            model(ids, None, documents)
        assert graphs == ["forward", "up_to_gates", "backward"]  # one for all layers, and for validation


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_on_cuda_are_those_of_float64(policy: str, compiled: bool) -> None:
    ids = ids_of(WIDE, 4, 48)
    documents = torch.tensor([[0] * 48, [1] * 20 + [2] * 28, [3] * 48, [4] * 47 + [5]])
    exact = gradients_of(model_of(WIDE, torch.float64), ids, documents)
    model = model_of(WIDE).cuda()
    compiler = partial(torch.compile, dynamic=False) if compiled else as_it_is
    Replaced(written_out(model, policy, compiler)).apply()  # type: ignore[arg-type]
    found = []
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            found.append(gradients_of(model, ids.cuda(), documents.cuda()))
    for key, value in exact.items():
        assert torch.equal(found[0][key], found[1][key]), key
        assert (found[0][key].cpu() - value).norm() < 0.03 * value.norm(), key


@pytest.mark.cuda
@pytest.mark.skipif(
    not (torch.cuda.is_available() and float8.multiplies_float8(torch.device("cuda"))),
    reason="needs a CUDA device with products in float8",
)
@pytest.mark.parametrize("length", [48, 31])
def test_products_in_float8_on_cuda_are_those_of_a_cpu(length: int) -> None:
    ids, found = ids_of(WIDE, 1, length), []
    for device in ("cpu", "cuda"):
        model = model_of(WIDE).to(device)
        Replaced(written_out(model, "paper", as_it_is, float8=True)).apply()
        with torch.autocast(device, torch.bfloat16):
            found.append(gradients_of(model, ids.to(device)))
    for key, value in found[0].items():
        assert (found[1][key].cpu() - value).norm() < 0.03 * value.norm(), key

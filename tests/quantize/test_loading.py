"""Quantized models run as they are stored: by the formula, near llama.cpp, and in little memory."""

from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from puna import formats
from puna.engine import arriving
from puna.engine.llm import LLM
from puna.engine.loading import load
from puna.errors import PunaError
from puna.formats.packed import canonical
from puna.formats.packed import plain as plain_numbers
from puna.kernels import integers
from puna.kernels.library import load as library
from puna.kernels.matrix import Matrix
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.model.weights import Packed, Weights, load_weights, weights_of
from puna.quantize.nf4 import Nf4Linear
from puna.quantize.packed import PackedLinear
from puna.quantize.packing import schemes
from puna.quantize.schemes import quantized
from tests.formats import gguf_files, llama_cpp_program
from tests.model.shapes import CONFIGS, ids_of, model_of

pytestmark = pytest.mark.skipif(library("integers").functions is None, reason=library("integers").fault)

WIDE = ModelConfig(  # every row divides into blocks of 256 weights
    vocab_size=400,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


class Formula(nn.Module):
    """A quantized linear layer, as the documentation has it, in whole numbers of 64 bits."""

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        assert packed.scales is not None
        codes = packed.data
        if packed.scheme == "int4":
            codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).to(torch.int8) - 8
        self.codes = codes.long().unflatten(-1, (packed.scales.shape[1], -1))  # (O, groups, G)
        self.scales = packed.scales.float()

    def forward(self, x: Tensor) -> Tensor:
        groups = x.float().unflatten(-1, (self.scales.shape[1], -1))
        steps = groups.abs().amax(-1, keepdim=True) / 127
        whole = (groups / steps.where(steps > 0, 1)).round().long()
        out = torch.zeros(*x.shape[:-1], len(self.scales))
        for group, factors in enumerate(self.scales.unbind(1)):
            sums = whole[..., group, :] @ self.codes[:, group].t()
            out += sums.float() * (steps[..., group, :] * factors)
        return out.to(x.dtype)


def by_formula(model: Llama) -> Llama:
    """The same model with every quantized layer replaced by the formula."""
    plain = Llama(model.config).to(model.model.norm.weight.dtype)
    values = dict(weights_of(model))
    load_weights(plain, Weights(model.config, [(name, plain_numbers(x)) for name, x in values.items()]))
    for name, value in values.items():
        if isinstance(value, Packed) and name != "model.embed_tokens.weight":
            plain.set_submodule(name.removesuffix(".weight"), Formula(value))
    if isinstance(table := values["model.embed_tokens.weight"], Packed) and model.config.tie_word_embeddings:
        plain.lm_head = Formula(table)
    return plain.eval()


def saved(config_name: str, path: Path) -> Path:
    LLM(model_of(CONFIGS[config_name])).save(path)
    return path


@torch.no_grad()
@pytest.mark.parametrize("shape", ["grouped", "tied", "multi-head"])
@pytest.mark.parametrize(
    "recipe",
    [
        {"scheme": "int8"},
        {"scheme": "int8", "group": 32, "exceptions": {"*.down_proj": "keep"}},
        {"scheme": "int4", "exceptions": {"*.down_proj": "int8", "*.k_proj": "keep"}, "embeddings": "int8"},
    ],
    ids=str,
)
def test_logits_are_those_of_the_formula(shape: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    llm = load(saved(shape, tmp_path / "model"), "float32", "cpu", recipe)
    ids = ids_of(llm.config, 2, 20)
    shared = shape == "tied" and "embeddings" in recipe
    assert ["one matrix" in note for note in llm.notes] == [True] * shared
    assert schemes(llm.model)[0] == recipe["scheme"]
    before, expected = llm.model(ids), by_formula(llm.model)(ids)
    assert torch.allclose(before, expected, rtol=1e-5, atol=1e-5)
    llm.pack()  # norms are added up in another order, and now and then a whole number is the next one
    assert (llm.model(ids) - expected).abs().mean() < 0.02 * expected.std()


@torch.no_grad()
def test_logits_are_near_those_of_the_model(assets: Path) -> None:
    path = assets / "weights" / "stories260K" / "stories260K.bin"
    ids = torch.tensor(
        [load(path, "float32", "cpu").ids("Once upon a time, there was a little girl named Lily.")]
    )
    exact = load(path, "float32", "cpu").model(ids).log_softmax(-1)
    limits = {"int8": 1e-3, "int4": 0.3, "nf4": 0.3}
    for scheme, limit in limits.items():
        llm = load(path, "float32", "cpu", {"scheme": scheme, "exceptions": {"*.down_proj": "keep"}})
        found = llm.model(ids).log_softmax(-1)
        assert 0 < (exact.exp() * (exact - found)).sum(-1).mean() < limit, scheme
        assert scheme in repr(llm)


@torch.no_grad()
def test_what_is_saved_loads_as_the_same_bits(tmp_path: Path) -> None:
    recipe = {"scheme": "int4", "exceptions": {"*.down_proj": "int8"}}
    llm = load(saved("grouped", tmp_path / "model"), "bfloat16", "cpu", recipe)
    ids = ids_of(llm.config, 1, 12)
    before = llm.model(ids)
    answer = llm.generate([1, 2, 3], max_new_tokens=8, temperature=0.0).tokens
    llm.save(tmp_path / "small")
    again = load(tmp_path / "small", "bfloat16", "cpu")
    assert again.notes == () and schemes(again.model) == schemes(llm.model)
    assert torch.equal(again.model(ids), before)
    assert again.generate([1, 2, 3], max_new_tokens=8, temperature=0.0).tokens == answer


def small_gguf(path: Path, mix: str) -> Path:
    """A model of WIDE in one of llama.cpp's mixes, quantized by llama.cpp itself."""
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer = gguf_files.small_tokenizer()
    model = model_of(WIDE.model_copy(update={"vocab_size": tokenizer.vocab_size})).eval()
    gguf_files.write(path / "m.gguf", model, tokenizer)
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype, how.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{mix}"), 1
    names = (str(path / name).encode() for name in ("m.gguf", "small.gguf"))
    assert llama_cpp.llama_model_quantize(*names, how) == 0
    return path / "small.gguf"


@torch.no_grad()
@pytest.mark.parametrize(
    ("mix", "scheme", "expanded"),
    [("Q8_0", "int8", None), ("Q4_0", "int4", "1 of q6_k"), ("Q4_K_M", None, "q4_k")],
)
def test_gguf_runs_as_it_is_stored_and_near_llama_cpp(
    mix: str, scheme: str | None, expanded: str | None, tmp_path: Path
) -> None:
    target = small_gguf(tmp_path, mix)
    llm = load(target, "float32", "cpu")
    assert schemes(llm.model) == ([scheme] if scheme else [])
    told = [note for note in llm.notes if "are expanded to float32" in note]
    assert len(told) == (expanded is not None) and all(
        expanded is not None and expanded in note for note in told
    )
    values = dict(weights_of(llm.model))
    for name, stored in formats.open_model(target).weights:
        known = canonical(stored) if isinstance(stored, Packed) else None
        value = values[name]
        if known is not None:
            assert isinstance(value, Packed) and known.scales is not None and value.scales is not None
            assert torch.equal(value.data, known.data) and torch.equal(value.scales, known.scales), name
        else:
            assert isinstance(value, Tensor) and torch.equal(value, plain_numbers(stored)), name
    ids = ids_of(llm.config, 1, 48)
    theirs = llama_cpp_program.log_probabilities(target, ids[0])
    for _ in range(2):  # as it was loaded, and packed
        ours = llm.model(ids)[0].log_softmax(-1)
        # llama.cpp rounds rows in blocks of 32 as we do, with a scale in 16 bits.
        assert (ours.exp() * (ours - theirs)).sum(-1).mean() < 5e-3
        llm.pack()


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_stories_run_packed_as_in_llama_cpp(kind: str, assets: Path, tmp_path: Path) -> None:
    directory = assets / "weights" / "stories260K"
    float_llm, target = load(directory / "stories260K.bin", "float32", "cpu"), tmp_path / "small.gguf"
    gguf_files.write(target, float_llm.model, float_llm.tokenizer, dtype=kind)
    llm = load(target, "float32", "cpu")
    assert schemes(llm.model) == [{"q8_0": "int8", "q4_0": "int4"}[kind]]
    prompt = llm.ids("Once upon a time")
    answer = llm.generate("Once upon a time", max_new_tokens=60, temperature=0.0, logprobs=0)
    theirs = llama_cpp_program.log_probabilities(target, torch.tensor([*prompt, *answer.tokens]))[
        len(prompt) - 1 : -1
    ]
    chosen = theirs[torch.arange(60), torch.tensor(answer.tokens)]
    assert (theirs.amax(-1) - chosen).max() < 0.1  # each of our tokens is its likeliest, or as good as that
    assert (torch.tensor([each.logprob for each in answer.logprobs]) - chosen).abs().max() < 0.2


@pytest.mark.parametrize(
    ("quantize", "message"),
    [
        ("gptq", "puna quantize MODEL DST --scheme gptq"),
        ({"scheme": "int4", "exceptions": {"*.down_proj": "gptq"}}, "calibrated with text"),
        ({"scheme": "int8", "exceptions": {"*": "gptq:32"}}, "quantize='gptq' is calibrated with text"),
        ("int5", "expected int8, int4, gptq, nf4, or one with a group .int8:32"),
        ("int8:64", "expected int8, int4, gptq, nf4, or one with a group .int8:32"),
        ("int4", "has 48 inputs, and int4 in groups of 32 needs a multiple of 32"),
        ({"scheme": "int8", "exceptions": {"*.dwon_proj": "keep"}}, "matches no matrix"),
        ({"scheme": "int8", "grop": 32}, "group"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_one_line(quantize: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(PunaError, match=message.replace("*", ".")) as caught:
        load(saved("grouped", tmp_path / "model"), "float32", "cpu", quantize)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_a_scheme_may_be_named_with_its_group(tmp_path: Path) -> None:
    """As `puna quantize --scheme int8:32` has it; the same as a recipe of both."""
    path = tmp_path / "model"
    formats.save(path, weights_of(model_of(WIDE)))
    first, second = (
        load(path, "float32", "cpu", asked) for asked in ("int8:32", {"scheme": "int8", "group": 32})
    )
    for (name, a), (_, b) in zip(weights_of(first.model), weights_of(second.model), strict=True):
        assert isinstance(a, Packed) == ("norm" not in name and "embed" not in name)
        if isinstance(a, Packed) and isinstance(b, Packed) and a.scales is not None and b.scales is not None:
            assert a.scales.shape[1] == a.shape[1] // 32
            assert torch.equal(a.data, b.data) and torch.equal(a.scales, b.scales)


def test_a_quantized_model_is_not_quantized_again(tmp_path: Path) -> None:
    LLM(load(saved("grouped", tmp_path / "model"), quantize="int8", device="cpu").model).save(
        tmp_path / "small"
    )
    with pytest.raises(PunaError, match=r"is quantized already .int8.*leave quantize='int4' out") as caught:
        load(tmp_path / "small", quantize="int4", device="cpu")
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_where_no_kernel_is_matrices_are_expanded_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, ids = saved("grouped", tmp_path / "model"), ids_of(CONFIGS["grouped"], 2, 9)
    held = load(path, "float32", "cpu", "int8")
    wide = load(path, "float64", "cpu", "int8")
    monkeypatch.setattr(integers, "suits", lambda packed: False)
    without = load(path, "float32", "cpu", "int8")
    for llm in (wide, without):
        kind = str(llm.dtype).removeprefix("torch.")
        assert [
            note for note in llm.notes if f"15 quantized matrices (15 of int8) are expanded to {kind}" in note
        ]
        assert not any(isinstance(module, PackedLinear) for module in llm.model.modules())
        for (_, ours), (_, stored) in zip(weights_of(llm.model), weights_of(held.model), strict=True):
            assert torch.equal(ours, plain_numbers(stored).to(llm.dtype))
        assert (llm.model(ids) - held.model(ids)).abs().mean() < 0.05 * held.model(ids).std()


def test_nf4_keeps_its_codes_and_says_that_it_is_slow(tmp_path: Path) -> None:
    recipe = {"scheme": "nf4", "exceptions": dict.fromkeys(("*.q_proj", "*.o_proj"), "keep")}
    config = CONFIGS["all at once"].model_copy(update={"hidden_size": 64, "intermediate_size": 128})
    LLM(model_of(config)).save(tmp_path / "model")
    llm = load(tmp_path / "model", "bfloat16", "cpu", recipe)
    assert schemes(llm.model) == ["nf4"] and len(llm.notes) == 1 and "10 matrices are nf4" in llm.notes[0]
    assert sum(type(module) is Nf4Linear for module in llm.model.modules()) == 10
    assert not any(parameter.requires_grad for parameter in llm.model.parameters())
    assert len(llm.generate([1, 2, 3], max_new_tokens=4, temperature=0.0, ignore_eos=True).tokens) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is told by Linux")
def test_one_matrix_is_held_beside_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "vocab_size": 1024}
    LLM(model_of(WIDE.model_copy(update=sizes), torch.bfloat16)).save(tmp_path / "model")
    seen: list[weakref.ref[Tensor]] = []

    def watched(*arguments: Any) -> Packed:
        assert sum(each() is not None for each in seen) <= 1
        packed = quantized(*arguments)
        seen.append(weakref.ref(packed.data))
        return packed

    monkeypatch.setattr(arriving, "quantized", watched)
    before = resident_of_files()
    llm = load(tmp_path / "model", "bfloat16", "cpu", "int8")
    assert len(seen) == 2 * 7 + 1 and not any(each() is not None for each in seen[:-1])
    file = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert resident_of_files() - before < 0.3 * file  # the embedding, and what libraries are loaded
    size = sum(parameter.nbytes for parameter in llm.model.parameters())
    assert size == sum(x.nbytes for _, value in weights_of(llm.model) for x in tensors(value))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["int8", "int4", "q8_0", "q4_0"])
def test_matrices_that_are_joined_lie_so_since_they_came(kind: str, tmp_path: Path) -> None:
    config = WIDE.model_copy(update={"attention_bias": True})
    if kind in ("int8", "int4"):
        LLM(model_of(config, torch.bfloat16)).save(tmp_path / "model")
        llm = load(tmp_path / "model", "bfloat16", "cpu", kind)
    else:
        gguf_files.write(tmp_path / "m.gguf", model_of(config), None, dtype=kind)
        llm = load(tmp_path / "m.gguf", "bfloat16", "cpu")
    stored = {name: value for name, value in weights_of(llm.model) if isinstance(value, Packed)}
    layer = llm.model.model.layers[1]
    before = [matrix_of(layer, name).panels.data_ptr() for name in ("self_attn.q_proj", "mlp.gate_proj")]
    llm.pack()
    layer = llm.model.model.layers[1]
    joined = [matrix_of(layer, name) for name in ("self_attn.qkv", "mlp.gate_up")]
    assert [matrix.panels.data_ptr() for matrix in joined] == before
    assert all(matrix.panels.is_contiguous() for matrix in joined) and joined[0].bias is not None
    for name, value in weights_of(llm.model):
        assert not isinstance(value, Packed) or same_codes(value, stored.pop(name)), name
    assert not stored


def matrix_of(layer: nn.Module, name: str) -> Matrix:
    linear = layer.get_submodule(name)
    assert isinstance(linear, PackedLinear)
    (matrix,) = linear.matrices()
    return matrix


def same_codes(first: Packed, second: Packed) -> bool:
    assert first.scales is not None and second.scales is not None
    return torch.equal(first.data, second.data) and torch.equal(first.scales, second.scales)


PEAK = """
import sys, torch
from pathlib import Path
from puna.engine.loading import load
def held(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
load(sys.argv[1], "bfloat16", "cpu").pack()  # whatever libraries are loaded with
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = held("VmRSS")
llm = load(sys.argv[2], "bfloat16", "cpu")
llm.pack()
print(held("VmHWM") - before, sum(parameter.nbytes for parameter in llm.model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is told by Linux")
@pytest.mark.parametrize("kind", ["q8_0", "bfloat16"])
def test_loading_takes_little_more_than_the_weights(kind: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 2560, "num_hidden_layers": 4, "vocab_size": 1024}
    gguf_files.write(tmp_path / "s.gguf", model_of(WIDE), None, dtype=kind)
    gguf_files.write(tmp_path / "m.gguf", model_of(WIDE.model_copy(update=sizes)), None, dtype=kind)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "s.gguf"), str(tmp_path / "m.gguf")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    peak, weights = map(int, told)
    layer = weights / 4  # what is on its way: pages of the file, and what is laid of them
    assert weights < peak < 1.1 * weights + 0.6 * layer, (peak / 1e6, weights / 1e6)


def tensors(value: Tensor | Packed) -> list[Tensor]:
    parts = [value] if isinstance(value, Tensor) else [value.data, value.scales]
    return [part for part in parts if part is not None]


def resident_of_files() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))

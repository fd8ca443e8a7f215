"""A captured pass gives the bits of the modules one by one, and notices when the model is another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from puna.engine.cache import PagedCache
from puna.engine.captured import Captured
from puna.engine.engine import Engine
from puna.engine.llm import LLM
from puna.errors import ModelError
from puna.kernels import integers, panels
from puna.kernels.library import load
from puna.kernels.matrix import Matrix
from puna.kernels.pages import BLOCK
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.quantize.packed import PackedEmbedding, PackedLinear
from puna.quantize.packing import pack, unpack
from tests.model.shapes import CONFIGS, model_of

NAMES = ("decoder", "panels", "rowwise", "paged_attention", "integers")
FAULT = next((load(name).fault for name in NAMES if load(name).functions is None), "")
pytestmark = pytest.mark.skipif(bool(FAULT), reason=FAULT)

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STEPS = [[1, 2, 3], [1, 1, 1], [5, 60, 40], [1, 0, 0], [1, 69, 230], [1, 1, 1]]  # rows of each sequence
SHAPES = ("grouped", "attention bias", "sliding window", "dynamic", "explicit head width", "all at once")
MIXED = ModelConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    attention_bias=True,
)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def packed(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> Llama:
    model = model_of(config, dtype).eval()
    pack(model)
    return model


def cache_of(model: Llama, quantized: bool = False) -> PagedCache:
    return PagedCache(model.config, 3 * 8, model.model.norm.weight.dtype, CPU, quantized)


def captured(model: Llama, cache: PagedCache) -> Captured:
    found = Captured.of(model, cache)
    assert found is not None
    return found


@torch.no_grad()
def one_by_one(model: Llama, cache: PagedCache, ids: list[int], at: list[int], chosen: list[int]) -> Tensor:
    flat = torch.tensor([ids, at])
    hidden = model.model(flat[:1], flat[1:], cache=cache)[0]
    return torch.cat((hidden.flatten(), model.lm_head(hidden[chosen]).flatten()))


def in_one(ours: Captured, ids: list[int], at: list[int], chosen: list[int]) -> Tensor:
    return torch.cat([x.flatten() for x in ours.run(ids, at, chosen)])


def assert_same_bits(model: Llama, quantized: bool = False, threads: int = 2) -> None:
    """Several steps of three sequences, each kept by a cache of either way."""
    torch.set_num_threads(threads)
    caches = cache_of(model, quantized), cache_of(model, quantized)
    ours = captured(model, caches[1])
    generator, starts = torch.Generator().manual_seed(1), [0, 0, 0]
    tables: list[list[int | None]] = [[8 * i + j for j in range(8)] for i in range(3)]
    by_length = model.model.rope.scaling.by_length
    for counts in STEPS:
        rows = sum(counts)
        ids = torch.randint(model.config.vocab_size, (rows,), generator=generator).tolist()
        at = [p for start, count in zip(starts, counts, strict=True) for p in range(start, start + count)]
        for cache in caches:
            cache.begin(tables, list(starts), counts, rows, [300, 400, 500] if by_length else None)
        chosen = list(range(rows - 1, -1, -3))
        expected = one_by_one(model, caches[0], ids, at, chosen)
        assert expected.isfinite().all() and torch.equal(in_one(ours, ids, at, chosen), expected)
        starts = [start + count for start, count in zip(starts, counts, strict=True)]
    assert max(starts) <= 8 * BLOCK


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantized", [False, True], ids=["plain cache", "int8 cache"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_pass_has_the_bits_of_the_modules(name: str, quantized: bool, dtype: torch.dtype) -> None:
    assert_same_bits(packed(CONFIGS[name], dtype), quantized)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_so_it_has_for_every_option(name: str, threads: int, dtype: torch.dtype) -> None:
    assert_same_bits(packed(CONFIGS[name], dtype), threads=threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["matrix", "panels", "int8", "int4"])
def test_tokens_are_looked_up_in_embeddings_of_every_kind(kind: str, dtype: torch.dtype) -> None:
    model = model_of(MIXED, dtype).eval()
    weight = model.model.embed_tokens.weight
    if kind != "matrix":
        V, D = weight.shape
        plain = Matrix(panels.into_panels(weight.detach()), None, None, V)
        held = plain if kind == "panels" else whole_numbers(V, D, kind == "int4", 16)
        model.model.embed_tokens = PackedEmbedding(held, dtype)
    pack(model)
    found = captured(model, cache_of(model))
    assert found._call.embeds([0, 96]) and not found._call.embeds([97]) and not found._call.embeds([-1, 3])
    assert_same_bits(model)


@pytest.mark.parametrize("shape", [(50, 64), (96, 64), (97, 4096), (97, 32)], ids=str)
def test_an_embedding_of_another_shape_is_left_to_the_modules(shape: tuple[int, int]) -> None:
    model = packed(MIXED)
    model.model.embed_tokens = nn.Embedding(*shape, dtype=torch.bfloat16)
    assert Captured.of(model, cache_of(model)) is None
    model.model.embed_tokens = PackedEmbedding(whole_numbers(*shape, False, 16), torch.bfloat16)
    assert Captured.of(model, cache_of(model)) is None


def test_an_embedding_that_is_to_hold_a_norm_is_noticed() -> None:
    model = packed(MIXED)
    cache = cache_of(model)
    ours = captured(model, cache)
    model.model.embed_tokens.max_norm = 0.1
    assert not ours.holds()
    again = captured(model, cache)
    assert again.holds() and not again._call.embeds([1])
    cache.begin([[0]], [0], [2], 2)
    assert torch.equal(in_one(again, [1, 2], [0, 1], [1]), one_by_one(model, cache, [1, 2], [0, 1], [1]))


def test_angles_first_asked_for_in_inference_mode_grow_outside_it() -> None:
    model = packed(MIXED)
    cache = cache_of(model)
    ours = captured(model, cache)
    for position, mode in ((3, True), (2000, False), (5000, True)):
        with torch.inference_mode(mode):
            (cos, _), where = ours._angles([position], None)
        expected, _ = model.model.rope(torch.tensor([[position]]), torch.float32)
        assert torch.equal(cos[where[0]], expected[0, 0])


def test_a_token_that_is_none_is_refused_by_the_models_own_embedding() -> None:
    model = packed(MIXED)
    cache = cache_of(model)
    cache.begin([[0]], [0], [1], 1, None)
    with pytest.raises(IndexError):
        captured(model, cache).run([97], [0], [0])


def whole_numbers(outputs: int, inputs: int, int4: bool, group: int) -> Matrix:
    generator = torch.Generator().manual_seed(outputs)
    if int4:
        data = torch.randint(256, (outputs, inputs // 2), generator=generator).to(torch.uint8)
    else:
        data = torch.randint(-127, 128, (outputs, inputs), generator=generator).to(torch.int8)
    size = 1 / (8 if int4 else 127) / inputs**0.5
    scales = (torch.rand(outputs, inputs // group, generator=generator) + 0.5) * size
    panels, laid = integers.into_panels((data, scales))
    return Matrix(panels, laid, None, outputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matrices_of_every_kind_stand_beside_each_other(dtype: torch.dtype) -> None:
    """As a mixed recipe leaves them: queries of one kind, keys and values of others; an int8 output."""
    model = packed(MIXED, dtype)
    D, F = MIXED.hidden_size, MIXED.intermediate_size
    for number, layer in enumerate(model.model.layers):
        attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
        whole = attention.get_submodule("qkv")
        assert isinstance(whole, PackedLinear)
        (plain,) = whole.matrices()
        bias = torch.linspace(-1, 1, 64).to(dtype)
        parts = (
            whole_numbers(64, D, False, D),
            replace(plain, bias=None, outputs=32),
            whole_numbers(32, D, True, 32),
        )
        attention.set_submodule("qkv", PackedLinear(replace(parts[0], bias=bias), *parts[1:]))
        if number:
            mlp.set_submodule(
                "gate_up", PackedLinear(whole_numbers(F, D, True, 32), whole_numbers(F, D, False, 32))
            )
            mlp.set_submodule("down_proj", PackedLinear(whole_numbers(D, F, False, F)))
    model.lm_head = PackedLinear(whole_numbers(97, D, False, D))  # type: ignore[assignment]
    assert_same_bits(model)


def doubled(model: Llama) -> None:
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.is_floating_point():
                parameter.mul_(2)


def test_an_update_in_place_counts() -> None:
    model = packed(CONFIGS["grouped"])
    cache = cache_of(model)
    ours = captured(model, cache)
    doubled(model)
    assert ours.holds()
    cache.begin([[0]], [0], [2], 2)
    assert torch.equal(in_one(ours, [1, 2], [0, 1], [1]), one_by_one(model, cache, [1, 2], [0, 1], [1]))


def hooked(model: Llama) -> None:
    model.model.layers[1].register_forward_hook(lambda *_: None)


def patched(model: Llama) -> None:
    model.model.forward = model.model.forward  # type: ignore[method-assign]


def wider(model: Llama) -> None:
    model.float()


def replaced(model: Llama) -> None:
    model.model.norm.weight = nn.Parameter(torch.ones_like(model.model.norm.weight))


@pytest.mark.parametrize("change", [unpack, hooked, patched, wider, replaced])
def test_a_model_that_is_another_is_noticed(change: Callable[[Llama], None]) -> None:
    model = packed(CONFIGS["grouped"])
    cache = cache_of(model)
    ours = captured(model, cache)
    change(model)
    assert not ours.holds()
    assert (Captured.of(model, cache) is not None) == (change is replaced)


def test_memory_that_parameters_had_is_read_until_the_next_look() -> None:
    """`share_memory`, or `.data = …`: what is read must not have been given to somebody else."""
    model = packed(CONFIGS["grouped"])
    cache = cache_of(model)
    cache.begin([[0]], [0], [3], 3)
    ours = captured(model, cache)
    before = in_one(ours, [1, 2, 3], [0, 1, 2], [2])
    for parameter in (*model.model.layers.parameters(), *model.lm_head.parameters()):
        parameter.data = torch.zeros_like(parameter)
    taken = [torch.full_like(x, 7) for x in model.parameters() for _ in range(4)]
    assert taken and torch.equal(in_one(ours, [1, 2, 3], [0, 1, 2], [2]), before)
    assert not ours.holds()


def test_a_type_changed_while_it_answers_is_told(llm: LLM) -> None:
    ours = LLM(model_of(llm.config).eval(), llm.tokenizer)
    ours.pack()
    stream = ours.stream("def f(", max_new_tokens=30, temperature=0.0, ignore_eos=True)
    next(stream)
    ours.model.to(torch.bfloat16)
    with pytest.raises(ModelError, match="while it answered"):
        list(stream)
    assert ours.generate([1, 2], max_new_tokens=3, ignore_eos=True).tokens


def test_threads_that_ask_for_the_first_answer_at_once(llm: LLM) -> None:
    greedy = {"max_new_tokens": 4, "temperature": 0.0, "ignore_eos": True}
    for _ in range(3):
        ours = LLM(model_of(llm.config).eval(), llm.tokenizer, packs=True)
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(ours.generate, [1, 2, 3], **greedy) for _ in range(4)]
            found = {tuple(each.result().tokens) for each in asked}
        assert found == {tuple(ours.generate([1, 2, 3], **greedy).tokens)}


def test_what_is_not_all_packed_is_not_captured() -> None:
    plain = model_of(CONFIGS["grouped"], torch.bfloat16).eval()
    assert Captured.of(plain, cache_of(plain)) is None
    double = packed(CONFIGS["grouped"], torch.float64)
    assert Captured.of(double, cache_of(double)) is None
    partly = packed(CONFIGS["grouped"])
    partly.model.layers[0].mlp = plain.model.layers[0].mlp
    assert Captured.of(partly, cache_of(partly)) is None


@pytest.mark.parametrize("change", [unpack, doubled, hooked])
def test_a_stream_goes_on_when_the_model_changes(change: Callable[[Llama], None], llm: LLM) -> None:
    """By what the model is then: as a stream of the modules would."""
    found = []
    for captures in (True, False):
        ours = LLM(model_of(llm.config).eval(), llm.tokenizer)
        ours.pack()
        if not captures:
            ours.model.model.register_forward_hook(lambda *_: None)
        stream = ours.stream("def f(", max_new_tokens=30, temperature=0.0, ignore_eos=True)
        pieces = [next(stream)]
        change(ours.model)
        found.append("".join([*pieces, *stream]))
    assert found[0] == found[1]


def test_an_engine_of_a_packed_model_tries_no_rows(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puna.engine.forward.RowClasses", None)  # calling it would fail
    llm.pack()
    assert isinstance(llm.engine, Engine)
    assert len(llm.generate("x", max_new_tokens=3, temperature=0.0, ignore_eos=True).tokens) == 3

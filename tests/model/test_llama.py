"""The model as a whole: who sees whom, packed = separate, cached = full, dropout, number types, compiling."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from puna.errors import ModelError
from puna.model import llama as llama_module
from puna.model.attention import KERNELS
from puna.model.llama import Llama, RMSNorm
from tests.model.shapes import CONFIGS, ids_of, model_of, summed_loss

LENGTHS = (9, 1, 30)  # of three documents packed into a row of 40; the last is longer than the context

# The compiler looks at .grad of every input, and hides the warning only where warnings are not errors.
QUIET = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


class PlainCache:
    """The least a cache can be: every key and value so far, and the formula over them."""

    def __init__(self, rope_lengths: Tensor | None = None, window: int | None = None) -> None:
        self.rope_lengths = rope_lengths
        self.window = window
        self._held: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        new = (k, v, positions)
        if layer in self._held:
            new = tuple(torch.cat(pair, dim=1) for pair in zip(self._held[layer], new, strict=True))
        self._held[layer] = new
        k, v, held = new
        distance = positions[:, None, :, None] - held[:, None, None, :]  # (B, 1, T, S)
        hidden = (distance < 0) | (distance >= (self.window or torch.inf))
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))  # (B, S, N, H)
        scores = torch.einsum("btnh,bsnh->bnts", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bnts,bsnh->btnh", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def gradients(model: Llama) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def packed_row():
    documents = torch.cat([torch.full((n,), 10 + i) for i, n in enumerate(LENGTHS)])[None]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return documents, positions


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_rows_equal_separate_documents(name, kernel):
    config = CONFIGS[name]
    model = model_of(config, torch.float64, kernel)
    ids, targets = ids_of(config, 1, sum(LENGTHS)), ids_of(config, 1, sum(LENGTHS), seed=1)
    documents, positions = packed_row()

    packed = model(ids, positions, documents)
    summed_loss(packed, targets).backward()
    together = gradients(model)
    separate = [model(part) for part in ids.split(LENGTHS, dim=1)]
    for logits, wanted in zip(separate, targets.split(LENGTHS, dim=1), strict=True):
        summed_loss(logits, wanted).backward()
    apart = gradients(model)

    assert torch.allclose(packed, torch.cat(separate, dim=1), rtol=0, atol=1e-11 * packed.abs().max().item())
    for parameter, gradient in apart.items():
        scale = gradient.abs().max().item()
        assert torch.allclose(together[parameter], gradient, rtol=0, atol=1e-11 * scale), parameter


def test_without_documents_a_row_is_one_sequence():
    config = CONFIGS["grouped"]
    model, ids = model_of(config), ids_of(config, 1, 40)
    documents, _ = packed_row()
    one = torch.full_like(documents, 3)
    whole = model(ids)
    assert torch.allclose(model(ids, documents=one), whole, atol=1e-4)
    assert (model(ids, documents=documents) - whole)[0, 9:].abs().max() > 0.1
    assert torch.allclose(model(ids, documents=documents)[0, :9], whole[0, :9], atol=1e-4)


@pytest.mark.parametrize(("packed", "window"), [(False, None), (True, None), (False, 6), (True, 6)])
def test_layers_are_told_once_where_queries_begin_to_see(monkeypatch, packed, window):
    config = CONFIGS["grouped"].model_copy(update={"sliding_window": window})
    asked = []

    def spy(q, k, v, *, starts, causal, dropout):
        asked.append((starts, causal))
        return KERNELS["fused"](q, k, v, starts=starts, causal=causal, dropout=dropout)

    monkeypatch.setitem(llama_module.KERNELS, "spy", spy)
    documents, positions = packed_row() if packed else (None, None)
    Llama(config, "spy")(ids_of(config, 1, 40), positions, documents)
    assert len(asked) == config.num_hidden_layers and all(causal for _, causal in asked)
    assert len({id(starts) for starts, _ in asked}) == 1
    begin = [0] * 9 + [9] + [10] * 30 if packed else [0] * 40
    expected = [max(first, t - window + 1) if window else first for t, first in enumerate(begin)]
    found = asked[0][0]
    assert found is None if not packed and window is None else found.tolist() == [expected]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_window_as_long_as_the_row_changes_no_bit(packed, kernel):
    config = CONFIGS["grouped"]
    plain = model_of(config, kernel=kernel)
    windowed = model_of(config.model_copy(update={"sliding_window": 40}), kernel=kernel)
    ids, targets = ids_of(config, 1, 40), ids_of(config, 1, 40, seed=1)
    documents, positions = packed_row() if packed else (None, None)
    logits = [model(ids, positions, documents) for model in (plain, windowed)]
    for found in logits:
        summed_loss(found, targets).backward()

    assert torch.equal(*logits)
    expected = gradients(plain)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(windowed).items())


def test_what_left_the_window_of_every_layer_is_forgotten():
    """A layer reaches back window - 1 positions, so two layers of window 6 reach back 10."""
    config = CONFIGS["sliding window"]
    model, ids = model_of(config, torch.float64), ids_of(config, 1, 30)
    other = ids.clone()
    other[0, 4] = (ids[0, 4] + 1) % config.vocab_size
    changed = (model(ids) != model(other)).any(dim=-1)[0]
    assert changed.tolist() == [4 <= position <= 14 for position in range(30)]


@pytest.mark.parametrize("name", ["multi-head", "dynamic", "all at once"])
def test_no_position_sees_the_future(name):
    config = CONFIGS[name]
    model, ids = model_of(config, torch.float64), ids_of(config, 1, 30)
    other = ids.clone()
    other[0, 20] = (ids[0, 20] + 1) % config.vocab_size
    before, after = model(ids), model(other)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_decoding_equals_the_full_forward(name):
    config = CONFIGS[name]
    model, ids = model_of(config, torch.float64), ids_of(config, 3, 40)
    start = torch.tensor([[0], [3], [500]])  # rows are at different places
    positions = start + torch.arange(40)
    lengths = positions[:, -1:] + 1 if name == "dynamic" else None
    cache = PlainCache(lengths, config.sliding_window)
    pieces = [
        model(ids[:, a:b], positions[:, a:b], cache=cache) for a, b in ((0, 25), (25, 26), (26, 33), (33, 40))
    ]
    assert torch.allclose(torch.cat(pieces, dim=1), model(ids, positions), atol=1e-10)


def test_what_a_cache_needs_is_said():
    plain, dynamic = model_of(CONFIGS["multi-head"]), model_of(CONFIGS["dynamic"])
    ids, positions = torch.zeros(1, 4, dtype=torch.long), torch.arange(4)[None]
    with pytest.raises(ModelError, match="needs positions"):
        plain(ids, cache=PlainCache())
    with pytest.raises(ModelError, match="takes no documents"):
        plain(ids, positions, documents=positions, cache=PlainCache())
    with pytest.raises(ModelError, match=r"needs cache\.rope_lengths"):
        dynamic(ids, positions, cache=PlainCache())


def test_an_unknown_kernel_gets_the_nearest_name():
    with pytest.raises(ModelError, match=r"one of reference, fused, got 'fuzed'\. Did you mean 'fused'\?"):
        Llama(CONFIGS["multi-head"], "fuzed")


def test_hidden_states_and_output_projection_are_the_two_halves():
    config = CONFIGS["tied"]
    model, ids = model_of(config), ids_of(config, 2, 5)
    hidden = model.model(ids)
    assert hidden.shape == (2, 5, config.hidden_size)
    assert torch.equal(model.lm_head(hidden), model(ids))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("kind", ["residual_dropout", "attention_dropout"])
def test_dropout_acts_in_training_only_and_is_off_by_default(kind):
    config = CONFIGS["grouped"]
    ids = ids_of(config, 2, 20)
    assert (config.residual_dropout, config.attention_dropout) == (0.0, 0.0)
    plain = model_of(config)
    dropping = model_of(config.model_copy(update={kind: 0.3}))
    torch.manual_seed(0)
    assert torch.equal(plain.train()(ids), plain.eval()(ids))
    assert torch.equal(dropping.eval()(ids), plain(ids))
    once, again = dropping.train()(ids), dropping(ids)
    assert not torch.allclose(once, plain(ids), atol=1e-2)
    assert not torch.allclose(once, again, atol=1e-2)


@pytest.mark.parametrize("silenced", ["self_attn.o_proj", "mlp.down_proj"])
def test_residual_dropout_reaches_each_branch_with_its_rate(silenced):
    """With one branch silent, the stream is unchanged exactly where the other's output was dropped."""
    config = CONFIGS["multi-head"].model_copy(update={"residual_dropout": 0.25})
    block = model_of(config).train().model.layers[0]
    block.get_submodule(silenced).weight.data.zero_()
    torch.manual_seed(0)
    x = torch.randn(8, 16, config.hidden_size)
    cos, sin = torch.ones(1, 16, config.head_dim), torch.zeros(1, 16, config.head_dim)
    unchanged = (block(x, cos, sin) == x).float().mean().item()
    assert unchanged == pytest.approx(0.25, abs=0.03)


def test_norm_is_computed_in_float32():
    torch.manual_seed(0)
    norm = RMSNorm(256, 1e-5)
    x = (torch.randn(4, 256) * 300).half()  # squares overflow float16
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(norm.half()(x).double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("packed", [False, True])
def test_autocast_stays_near_float32_with_float32_parameters(packed):
    config = CONFIGS["grouped"]
    model, ids = model_of(config), ids_of(config, 1, 40)
    documents, positions = packed_row() if packed else (None, None)
    exact = model(ids, positions, documents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(ids, positions, documents)
    summed_loss(rounded.float(), ids).backward()
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().mean() < 0.03 * exact.abs().mean()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_bfloat16_turns_by_float32_angles():
    """At position 100,000 neighbouring bfloat16 numbers are 512 apart; the angle must not be."""
    config = CONFIGS["multi-head"]
    model, ids = model_of(config, torch.bfloat16), ids_of(config, 1, 12)
    near, far = model(ids), model(ids, positions=torch.arange(100_000, 100_012)[None])
    assert (near - far).abs().mean() < 0.05 * near.abs().mean()


@QUIET
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("packed", [False, True])
def test_blocks_compile_into_one_graph_for_all_layers(packed, window):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    config = CONFIGS["all at once"].model_copy(
        update={
            "num_hidden_layers": 4,
            "residual_dropout": 0.1,
            "attention_dropout": 0.1,
            "sliding_window": window,
        }
    )
    model, counter = model_of(config).train(), CompileCounter()
    ids = ids_of(config, 1, 40)
    documents, positions = packed_row() if packed else (None, None)
    for block in model.model.layers:
        block.compile(backend=counter, fullgraph=True)
    for _ in range(2):
        summed_loss(model(ids, positions, documents), ids).backward()
    assert counter.frame_count == 1
    torch._dynamo.reset()


@QUIET
@pytest.mark.parametrize("name", ["all at once", "sliding window"])
def test_compiled_blocks_give_the_same_numbers_and_names(name):
    torch._dynamo.reset()
    config = CONFIGS[name]
    eager, compiled = model_of(config), model_of(config)
    for block in compiled.model.layers:
        block.compile(backend="aot_eager", fullgraph=True)
    ids = ids_of(config, 2, 40)
    ours, expected = compiled(ids), eager(ids)
    summed_loss(ours, ids).backward()
    summed_loss(expected, ids).backward()
    assert torch.allclose(ours, expected, atol=1e-4)
    theirs = gradients(eager)
    for name, gradient in gradients(compiled).items():
        assert torch.allclose(gradient, theirs[name], atol=1e-5 * theirs[name].abs().max().item()), name
    torch._dynamo.reset()


def test_a_published_size_builds_on_the_meta_device_without_memory():
    from puna.model.presets import preset

    with torch.device("meta"):
        model = Llama(preset("llama-65b"))
        logits = model(torch.zeros(1, 16, dtype=torch.long))
    assert logits.shape == (1, 16, 32000)
    assert all(parameter.is_meta for parameter in model.parameters())

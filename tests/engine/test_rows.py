"""A class of rows is used only where it is shown that a row's bits are the same in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from puna.engine import probes
from puna.engine.rows import RowClasses
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from tests.model.shapes import CONFIGS, model_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# The smallest published Llama: none of its widths is a whole number of vectors.
SMALLEST = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=172,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def passed_through(model: Llama, hidden: Tensor, positions: Tensor) -> Tensor:
    """All layers of a model whose queries see nothing but themselves, and its final norm: (M, D)."""
    x, wide = hidden[None], torch.promote_types(hidden.dtype, torch.float32)
    cos, sin = model.model.rope(positions[None], wide)
    for layer in model.model.layers:
        x = layer(x, cos, sin, None, lambda q, k, v: q)
    return model.model.norm(x)[0]


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "threads"), [*((dtype, 1) for dtype in DTYPES), (torch.bfloat16, 2)])
@pytest.mark.parametrize("config", [SMALLEST, CONFIGS["grouped"]], ids=["smallest", "grouped"])
def test_rows_have_the_same_bits_in_every_class(
    config: ModelConfig, dtype: torch.dtype, threads: int
) -> None:
    torch.set_num_threads(threads)
    model = model_of(config, dtype)
    classes = RowClasses(model, 128)
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(300, config.hidden_size, generator=generator).to(dtype)
    positions = torch.randint(config.max_position_embeddings, (300,), generator=generator)
    sizes = sorted({classes.padded(rows) for rows in range(1, classes.largest + 1)})
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    for size in sizes:
        for first in range(0, 150, max(1, size - 1)):
            rows = slice(first, first + size)
            out = passed_through(model, hidden[rows], positions[rows])
            logits = classes.head(out)
            for row in range(size):
                expected = seen.setdefault(first + row, (out[row], logits[row]))
                assert torch.equal(out[row], expected[0]) and torch.equal(logits[row], expected[1])


def test_a_class_holds_what_it_is_asked_for() -> None:
    classes = RowClasses(model_of(CONFIGS["grouped"]), 100)
    assert classes.largest == 100
    assert all(classes.padded(rows) >= rows for rows in range(1, 101))
    assert classes.padded(100) == classes.padded(97) == 100


class Peculiar(nn.Linear):
    """Adds a last bit to the first row when there are many."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if x.shape[-2] > 16:
            out[..., 0, :] = torch.nextafter(out[..., 0, :], torch.full_like(out[..., 0, :], torch.inf))
        return out


def test_a_class_that_differs_is_not_used() -> None:
    model = model_of(CONFIGS["grouped"])
    model.model.layers[1].mlp.down_proj.__class__ = Peculiar
    assert RowClasses(model, 64).largest == 16
    assert RowClasses(model_of(CONFIGS["grouped"]), 64).largest == 64


def test_a_head_that_differs_is_given_fewer_rows_at_a_time() -> None:
    model = model_of(CONFIGS["grouped"])
    model.lm_head.__class__ = Peculiar
    hidden = torch.randn(50, model.config.hidden_size)
    classes = RowClasses(model, 64)
    with torch.no_grad():
        assert torch.equal(classes.head(hidden), torch.cat([classes.head(row[None]) for row in hidden]))


class Unsteady(nn.Linear):
    """Treats no two places alike."""

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[-2], dtype=x.dtype)[:, None]
        return super().forward(x) * (1 + places / 1024)


def test_where_nothing_can_be_shown_a_step_is_one_row() -> None:
    model = model_of(CONFIGS["grouped"])
    model.model.layers[0].self_attn.v_proj.__class__ = Unsteady
    classes = RowClasses(model, 64)
    assert (classes.largest, classes.padded(1)) == (1, 1)


def test_a_sum_in_another_order_shows_in_16_bits() -> None:
    """The same product, its terms added from the other end: random rows hide it, cancelling ones do not."""
    linear = nn.Linear(256, 128, bias=False).to(torch.bfloat16)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(128, 256, generator=source) / 16)

    def differing(x: Tensor) -> int:
        weight = linear.weight.float()
        forward, backward = F.linear(x.float(), weight), F.linear(x.float().flip(1), weight.flip(1))
        return int((forward.to(torch.bfloat16) != backward.to(torch.bfloat16)).any(dim=1).sum())

    with torch.no_grad():
        random = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        assert differing(random) < 16
        assert differing(probes._cancelling(linear, 64)) > 32


def test_the_model_and_the_callers_random_numbers_are_left_as_they_were() -> None:
    model = model_of(CONFIGS["grouped"]).train()
    before = torch.get_rng_state()
    RowClasses(model, 32).padded(5)
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_without_the_promise_nothing_is_padded() -> None:
    model = model_of(CONFIGS["grouped"])
    classes = RowClasses(model, 77, deterministic=False)
    assert [classes.padded(rows) for rows in (1, 5, 77)] == [1, 5, 77]
    hidden = torch.randn(3, model.config.hidden_size)
    assert torch.equal(classes.head(hidden), model.lm_head(hidden))

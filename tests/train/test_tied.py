"""The gradient of a matrix that is both embedding and output layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from puna.model.llama import Llama
from puna.train.compile import prepare_layers
from puna.train.gradients import accumulate
from puna.train.objectives import language_modelling
from puna.train.tied import lookup
from tests.train.tiny import CPU, ROWS, VOCABULARY, TinySource, precision, tiny_model


def gradient_of(
    model: Llama, policy: str, micro_rows: int = ROWS, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The tied matrix's, of one step in as many micro-batches as needed."""
    prepare_layers(model, policy, "off", CPU, lambda: None, pytest.fail)  # type: ignore[arg-type]
    model.zero_grad(set_to_none=True)
    batches = next(TinySource(micro_rows).steps(0)).batches
    accumulate(language_modelling, model, batches, precision(dtype), seeds=range(len(batches)))
    gradient = model.lm_head.weight.grad
    assert gradient is not None and gradient is model.model.embed_tokens.weight.grad
    return gradient


@pytest.mark.parametrize("micro_rows", [ROWS, ROWS // 4])
def test_it_is_the_sum_of_both(micro_rows: int) -> None:
    expected = gradient_of(tiny_model(dtype=torch.float64, tied=True), "none", micro_rows)
    found = gradient_of(tiny_model(dtype=torch.float64, tied=True), "paper", micro_rows)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    untied = tiny_model(dtype=torch.float64)
    untied.lm_head.weight.data = untied.model.embed_tokens.weight.data.clone()
    both = gradient_of_untied(untied)
    torch.testing.assert_close(found if micro_rows == ROWS else expected, both, rtol=1e-10, atol=1e-14)


def gradient_of_untied(model: Llama) -> Tensor:
    prepare_layers(model, "paper", "off", CPU, lambda: None, pytest.fail)
    (batch,) = next(TinySource().steps(0)).batches
    accumulate(language_modelling, model, [batch], precision(torch.float64))
    ends = model.lm_head.weight.grad, model.model.embed_tokens.weight.grad
    assert ends[0] is not None and ends[1] is not None
    return ends[0] + ends[1]


@pytest.mark.parametrize("micro_rows", [ROWS, ROWS // 4])
def test_weights_in_bfloat16_keep_the_type_of_their_gradients(micro_rows: int) -> None:
    model = tiny_model(dtype=torch.bfloat16, tied=True)
    found = gradient_of(model, "paper", micro_rows, torch.bfloat16)
    assert found.dtype == (torch.bfloat16 if micro_rows == ROWS else torch.float32)
    expected = gradient_of(tiny_model(dtype=torch.float64, tied=True), "none", micro_rows)
    assert (found - expected).norm() < 0.03 * expected.norm()


class Tables(TorchDispatchMode):
    """How many tensors of the table's size were made."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        if isinstance(result, Tensor) and result.shape == (VOCABULARY, 32):
            self.made += result.untyped_storage().data_ptr() not in given
        return result


def test_no_second_table_is_made() -> None:
    model = tiny_model(tied=True)
    prepare_layers(model, "paper", "off", CPU, lambda: None, pytest.fail)
    (batch,) = next(TinySource().steps(0)).batches
    with Tables() as tables:
        accumulate(language_modelling, model, [batch], precision())
    assert tables.made == 1  # the output layer's


def test_without_an_output_layer_the_table_gets_its_own() -> None:
    table, ids = nn.Parameter(torch.randn(5, 3)), torch.tensor([[1, 1], [4, 1]])
    lookup(ids, table).sum().backward()
    expected = torch.zeros(5, 3).index_add_(0, ids.flatten(), torch.ones(4, 3))
    assert table.grad is not None and torch.equal(table.grad, expected)
    with torch.no_grad():
        assert not lookup(ids, table).requires_grad
    table.requires_grad_(False)
    assert not lookup(ids, table).requires_grad

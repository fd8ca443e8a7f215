"""What a run needs of memory: held against what layers keep, what updates take, and what is free."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from puna.errors import ResourceError
from puna.model.config import ModelConfig
from puna.model.counts import parameters
from puna.model.initial import initialize
from puna.model.llama import Llama
from puna.model.presets import preset
from puna.train import footprint as footprints
from puna.train.compile import prepare_layers
from puna.train.footprint import KEPT, Run, check_fits, footprint
from puna.train.policies import Policy

CPU = torch.device("cpu")
SHAPE = ModelConfig(
    vocab_size=64,
    hidden_size=96,
    intermediate_size=200,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
)
ROWS, LENGTH = 2, 64
BIG = Run(preset("llama-7b"), 64, 2048, "paper", torch.bfloat16)


def saved(config: ModelConfig, policy: Policy, compute: torch.dtype) -> int:
    """Bytes that a forward pass of the layers leaves for the backward pass, parameters left out."""
    model = Llama(config)
    initialize(model, 0)
    prepare_layers(model, policy, "off", CPU, lambda: None, lambda line: None)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        held.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    ids = torch.randint(0, config.vocab_size, (ROWS, LENGTH))
    casting = torch.autocast("cpu", dtype=compute, enabled=compute != torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), casting:
        model.model(ids)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in held.items() if place not in own)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", ["none", "paper", "block"])
def test_what_a_layer_keeps_is_counted_to_the_byte(policy: Policy, compute: torch.dtype) -> None:
    """Two layers more keep twice what one keeps; what the model keeps only once falls out."""
    more = saved(SHAPE, policy, compute) - saved(
        SHAPE.model_copy(update={"num_hidden_layers": 2}), policy, compute
    )
    run = Run(SHAPE, ROWS, LENGTH, policy, compute)
    casts = (
        2 * 2 * (2 * 96 * 96 + 2 * 96 * 32 + 3 * 96 * 200) if (policy, compute.itemsize) == ("none", 2) else 0
    )
    assert more == 2 * run.tokens * KEPT[policy][0](run) + casts


def test_the_parts_by_hand() -> None:
    total, tokens, words = parameters(SHAPE).total, ROWS * LENGTH, 64 * 96
    run = Run(SHAPE, ROWS, LENGTH, "block", torch.bfloat16)
    found = footprint(run)
    assert (found.weights, found.gradients, found.optimizer) == (4 * total, 4 * total, 8 * total)
    assert found.kept == found.least == 4 * tokens * 96 * 4
    assert found.held == 16 * total
    assert found.total == found.held + found.above
    assert found.at_loss > 4 * total + 4 * words + found.kept
    pure = footprint(replace(run, weights=torch.bfloat16, state=4))
    assert (pure.weights, pure.gradients, pure.optimizer, pure.kept) == (
        2 * total, 2 * total, 4 * total, found.kept // 2,
    )  # fmt: skip


def test_gradients_of_several_micro_batches_are_in_float32() -> None:
    run = Run(SHAPE, ROWS, LENGTH, "block", torch.bfloat16, torch.bfloat16, 4)
    several = footprint(replace(run, micro_batches=2))
    assert (footprint(run).gradients, several.gradients) == (
        2 * parameters(SHAPE).total, 4 * parameters(SHAPE).total,
    )  # fmt: skip
    assert several.unavoidable > footprint(run).unavoidable
    wide = replace(run, weights=torch.float32)
    assert footprint(replace(wide, micro_batches=2)) == footprint(wide)


def test_memory_grows_in_proportion_to_the_tokens() -> None:
    runs = [Run(preset("puna-15m"), 1, length, "paper", torch.bfloat16) for length in (8192, 16384, 32768)]
    first, second, third = (footprint(run).above for run in runs)
    assert third - second == 2 * (second - first)


@pytest.mark.parametrize("policy", ["none", "paper", "block"])
def test_a_run_that_fits_passes(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(SHAPE, ROWS, LENGTH, policy, torch.bfloat16)
    monkeypatch.setattr(footprints, "available_memory", lambda device: footprint(run).unavoidable)
    check_fits(run, CPU)
    monkeypatch.setattr(footprints, "available_memory", lambda device: footprint(run).unavoidable - 1)
    with pytest.raises(ResourceError, match="training 2 rows of 64 tokens at once needs at least"):
        check_fits(run, CPU)


@pytest.mark.parametrize(
    ("run", "free", "advice"),
    [
        (BIG, 200, "batch.micro_rows = 8 would fit"),
        (
            replace(BIG, micro_rows=1, row_length=30_000),
            150,
            'memory.policy = "block" with batch.micro_rows = 1',
        ),
        (replace(BIG, micro_rows=1, row_length=2_000_000), 130, "lower data.row_length"),
        (BIG, 90, "take a smaller model"),
    ],
)
def test_what_would_fit_is_told(run: Run, free: float, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprints, "available_memory", lambda device: int(free * 1e9))
    with pytest.raises(ResourceError) as caught:
        check_fits(run, CPU)
    assert advice in str(caught.value)
    assert f"{free}GB are free on cpu" in str(caught.value)


def test_the_batch_that_is_advised_fits_and_divides(monkeypatch: pytest.MonkeyPatch) -> None:
    run = replace(BIG, micro_rows=48)
    rows = footprints._most_rows(run, int(200e9))
    assert 0 < rows < 48 and 48 % rows == 0
    advised = replace(run, micro_rows=rows, micro_batches=48 // rows)
    assert footprint(advised).total <= 200e9


def test_a_control_groups_limit_counts_and_so_does_its_parents(tmp_path: Path) -> None:
    root, inner = tmp_path / "cgroup", tmp_path / "cgroup" / "a" / "b"
    inner.mkdir(parents=True)
    for place, limit, used in ((inner, "max", 10), (inner.parent, "1000", 700), (root, "5000", 100)):
        (place / "memory.max").write_text(f"{limit}\n")
        (place / "memory.current").write_text(f"{used}\n")
        (place / "memory.stat").write_text("anon 5\ninactive_file 50\n")
    membership = tmp_path / "self"
    membership.write_text("1:cpu:/other\n0::/a/b\n")
    assert footprints._left_in_groups(root, membership) == [350, 4950]
    assert footprints._left_in_groups(root, tmp_path / "none") == []
    assert footprints.available_memory(CPU) > 0

"""The loss of a chunk of logits and its gradient, against the definition in float64 and autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from puna.errors import DataError
from puna.kernels import likelihood
from puna.kernels.library import load
from puna.kernels.likelihood import DTYPES, chunk_loss, plain_chunk_loss

compiled = pytest.mark.skipif(load("likelihood").functions is None, reason=load("likelihood").fault)
VOCABULARIES = [1, 2, 15, 16, 97, 2049, 32_000]
C, Z = 37, 1e-2


def material(vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (C, V), targets (C,), and a mask (C,); ignored targets lie anywhere."""
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(C, vocabulary, generator=generator, dtype=torch.float64)).to(dtype)
    targets = torch.randint(0, vocabulary, (C,), generator=generator)
    mask = torch.rand(C, generator=generator) < 0.8
    return logits, targets.masked_fill(~mask, -100), mask


def by_definition(logits: Tensor, targets: Tensor, mask: Tensor, z: float) -> tuple[Tensor, Tensor, Tensor]:
    """Both sums and their gradient in float64."""
    x = logits.double().requires_grad_()
    logs = x[mask].exp().sum(-1).log()
    loss = (logs - x[mask].gather(-1, targets[mask][:, None])[:, 0]).sum()
    penalty = z * logs.square().sum()
    return loss.detach(), penalty.detach(), torch.autograd.grad(loss + penalty, x)[0]


def compare(
    logits: Tensor, targets: Tensor, mask: Tensor, z: float, run: object, rtol: float, atol: float
) -> None:
    loss, penalty, gradient = by_definition(logits, targets, mask, z)
    given = logits.clone()
    found, more = run(given, targets, mask, z)  # type: ignore[operator]
    assert found.dtype == more.dtype == torch.promote_types(logits.dtype, torch.float32)
    sums = {"rtol": min(rtol, 1e-6), "atol": atol, "check_dtype": False}
    torch.testing.assert_close(found, loss, **sums)  # type: ignore[arg-type]
    torch.testing.assert_close(more, penalty, **sums)  # type: ignore[arg-type]
    torch.testing.assert_close(given.double(), gradient, rtol=rtol, atol=atol)
    assert (given[~mask] == 0).all()


@pytest.mark.parametrize("z", [0.0, Z])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_plain_is_the_definition_in_float64(vocabulary: int, z: float) -> None:
    compare(*material(vocabulary, torch.float64), z, plain_chunk_loss, rtol=1e-10, atol=1e-12)


@compiled
@pytest.mark.parametrize("z", [0.0, Z])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_compiled_is_the_definition_rounded_once(vocabulary: int, dtype: torch.dtype, z: float) -> None:
    unit = torch.finfo(dtype).eps
    # Of the target's gradient, a probability less 1, as many digits are lost as the probability is near 1.
    compare(*material(vocabulary, dtype), z, chunk_loss, rtol=max(unit / 2, 2e-6), atol=1e-6)


@compiled
def test_no_probability_is_lost_among_many() -> None:
    """Equal logits: each of the 128,256 probabilities, and the sum that they are divided by, is known."""
    logits = torch.full((2, 128_256), -3.0)
    loss, penalty = chunk_loss(logits, torch.tensor([0, 5]), torch.ones(2, dtype=torch.bool), Z)
    log = torch.tensor(128_256.0, dtype=torch.float64).log()
    assert loss.item() == pytest.approx(2 * log.item(), rel=1e-7)
    assert penalty.item() == pytest.approx(2 * Z * (log.item() - 3) ** 2, rel=1e-6)
    wanted = (1 + 2 * Z * (log.item() - 3)) / 128_256
    torch.testing.assert_close(logits[0, 1:], torch.full((128_255,), wanted), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("run", [chunk_loss, plain_chunk_loss])
def test_logits_of_any_size(run: object, dtype: torch.dtype) -> None:
    huge, inf, nan = 1e30, torch.inf, torch.nan
    rows = [
        [huge, -huge, 0.0],  # certain, and right
        [huge, huge, huge],
        [0.0, 0.0, -inf],
        [-inf, 0.0, 0.0],  # the target is impossible
        [inf, 0.0, 0.0],
        [-inf, -inf, -inf],
        [nan, 0.0, 0.0],
        [nan, inf, 0.0],  # ignored
    ]
    wanted = [
        [0.0, 0.0, 0.0],
        [-2 / 3, 1 / 3, 1 / 3],
        [-0.5, 0.5, 0.0],
        [-1.0, 0.5, 0.5],
        *[[nan] * 3] * 3,
        [0.0, 0.0, 0.0],
    ]
    losses = []
    for row, gradient in zip(rows, wanted, strict=True):
        logits = torch.tensor([row], dtype=dtype)
        mask = torch.tensor([row is not rows[-1]])
        losses.append(run(logits, torch.tensor([0]), mask)[0].item())  # type: ignore[operator]
        torch.testing.assert_close(
            logits, torch.tensor([gradient], dtype=dtype), rtol=2**-8, atol=0, equal_nan=True
        )
    assert losses == pytest.approx([0, 1.0986123, 0.6931472, inf, nan, nan, nan, 0], nan_ok=True)


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    given = material(2049, dtype)
    results = []
    for threads in (1, 1, 3):
        torch.set_num_threads(threads)
        logits = given[0].clone()
        results.append((logits, *chunk_loss(logits, *given[1:], Z)))
    for found in results[1:]:
        assert all(map(torch.equal, found, results[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("target", [-1, 97])
def test_a_target_outside_the_vocabulary_is_told(target: int, dtype: torch.dtype) -> None:
    logits, targets, mask = material(97, dtype)
    targets[mask.nonzero()[0]] = target
    with pytest.raises(DataError, match=f"expected targets from 0 to 96, got .*{target}"):
        chunk_loss(logits, targets, mask)


@compiled
def test_what_does_not_fit_together_is_not_read() -> None:
    logits, targets, mask = material(97, torch.float32)
    for wrong in ((targets[:-1], mask), (targets, mask[1:]), (targets.int(), mask), (targets, mask.long())):
        with pytest.raises(AssertionError):
            chunk_loss(logits, *wrong)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("z", [0.0, Z])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_cuda_it_is_the_definition(dtype: torch.dtype, z: float) -> None:
    def run(logits: Tensor, targets: Tensor, mask: Tensor, z: float) -> tuple[Tensor, Tensor]:
        there = logits.cuda()
        sums = chunk_loss(there, targets.cuda(), mask.cuda(), z)
        logits.copy_(there)
        return sums[0].cpu(), sums[1].cpu()

    unit = torch.finfo(dtype).eps
    compare(*material(32_000, dtype), z, run, rtol=max(unit / 2, 2e-6), atol=1e-6)


def test_types_that_are_not_compiled_for_go_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets, mask = material(97, torch.float16)
    found, wanted = logits.clone(), logits.clone()
    assert chunk_loss(found, targets, mask, Z) == plain_chunk_loss(wanted, targets, mask, Z)
    assert torch.equal(found, wanted)
    monkeypatch.setattr(likelihood, "_calls", dict)
    logits = logits.float()
    found, wanted = logits.clone(), logits.clone()
    assert chunk_loss(found, targets, mask) == plain_chunk_loss(wanted, targets, mask)
    assert torch.equal(found, wanted)

"""Softmax cross entropy of some rows of logits, and its gradient in their place, in C++ and in plain torch.

C rows   V vocabulary
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from puna.errors import DataError
from puna.kernels.library import NAMES, load

DTYPES = (torch.float32, torch.bfloat16)


def chunk_loss(logits: Tensor, targets: Tensor, mask: Tensor, z: float = 0.0) -> tuple[Tensor, Tensor]:
    """Σ log(Σ e^x) - x[target] over rows where mask is True, and Σ z · log(Σ e^x)² (arXiv 2204.02311, 5).

    Args:
        logits: (C, V), contiguous; replaced by the gradient of both sums together, 0 where mask is False.
        targets: (C,), int64.
        mask: (C,), bool.
        z: the weight of what keeps the normaliser near 1.

    Returns:
        Two scalars in float32 (float64 of float64).

    Raises:
        DataError: the target of a row that counts is no id of the vocabulary.
    """
    call = _calls().get(logits.dtype) if logits.device.type == "cpu" and logits.is_contiguous() else None
    if call is None:
        if logits.device.type == "cpu" and not _within(targets, mask, logits.shape[1]):
            raise _foreign(targets, mask, logits.shape[1])
        return plain_chunk_loss(logits, targets, mask, z)
    # Else C++ would read beyond what there is.
    assert targets.shape == mask.shape == logits.shape[:1]
    assert (targets.dtype, mask.dtype) == (torch.int64, torch.bool)
    targets, mask = targets.contiguous(), mask.contiguous()
    sums = torch.empty(2, len(logits), dtype=torch.float32)
    places = [each.data_ptr() for each in (logits, targets, mask, *sums)]
    if not call(*places, *logits.shape, z, torch.get_num_threads()):
        raise _foreign(targets, mask, logits.shape[1])
    loss, penalty = sums.sum(dim=1)
    return loss, penalty


def plain_chunk_loss(logits: Tensor, targets: Tensor, mask: Tensor, z: float = 0.0) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    kind = torch.promote_types(logits.dtype, torch.float32)
    ignored, place = ~mask[:, None], targets.masked_fill(~mask, 0)[:, None]  # (C, 1)
    shares = logits.log_softmax(dim=-1, dtype=kind)  # the only tensor of (C, V) besides the logits
    losses = -shares.gather(1, place)
    penalties, slope = torch.zeros_like(losses), torch.ones_like(losses)
    if z:
        logs = logits.to(kind).logsumexp(dim=-1, keepdim=True)
        penalties, slope = z * logs.square(), 1 + 2 * z * logs
    gradient = shares.exp_().mul_(slope)
    gradient.scatter_(1, place, gradient.gather(1, place) - 1).masked_fill_(ignored, 0)
    logits.copy_(gradient)
    return losses.masked_fill(ignored, 0).sum(), penalties.masked_fill(ignored, 0).sum()


def _within(targets: Tensor, mask: Tensor, vocabulary: int) -> bool:
    return bool((~mask | ((targets >= 0) & (targets < vocabulary))).all())


def _foreign(targets: Tensor, mask: Tensor, vocabulary: int) -> DataError:
    wanted = targets[mask]
    return DataError(
        f"expected targets from 0 to {vocabulary - 1}, got {wanted.min()} to {wanted.max()}: the text was "
        "made with another tokenizer than the model's"
    )


@cache
def _calls() -> Mapping[torch.dtype, Callable[..., bool]]:
    functions = load("likelihood").functions
    if functions is None:
        return {}
    calls = {}
    for dtype in DTYPES:
        calls[dtype] = call = functions[f"likelihood_{NAMES[dtype]}"]
        call.argtypes = [*[ctypes.c_void_p] * 5, *[ctypes.c_int64] * 2, ctypes.c_double, ctypes.c_int32]
        call.restype = ctypes.c_bool
    return calls

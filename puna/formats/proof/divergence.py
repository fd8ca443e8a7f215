"""How far the logits of two models are apart: relative error, KL divergence, agreement, cross-entropy.

R rows (positions of all sequences)   D width   V vocabulary
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from puna.errors import ModelError
from puna.formats.casting import is_finite
from puna.formats.proof.layerwise import logits
from puna.model.weights import Packed

NO_TARGET = -1
_ROWS = 256  # whose logits are formed at once: 131 MB in float32 at 128,256 words
_WIDE = 1 << 18  # numbers of them in float64 at once: few enough to stay in the caches
_COLUMNS = ("largest", "mean", "difference", "signal", "kl", "agrees", "loss_a", "loss_b")


@dataclass(frozen=True)
class Divergence:
    """The figures, over all positions of all sequences.

    `relative_error` is rms(centred difference) / rms(centred logits of the first model): an offset common to
    all words changes no probability, and the scale of logits differs between models by orders of magnitude.
    KL divergence is KL(first ‖ second) in nats per token, losses are the cross-entropy of the text in nats
    per token, None where there is no text.
    """

    positions: int
    max_difference: float
    mean_difference: float
    relative_error: float
    worst_relative_error: float
    kl_mean: float
    kl_p999: float
    kl_max: float
    top1_agreement: float
    loss_a: float | None
    loss_b: float | None

    def as_dict(self) -> dict[str, Any]:
        """Everything by name."""
        return asdict(self)


@torch.no_grad()
def diverge(
    first: tuple[Tensor, Tensor | Packed],
    second: tuple[Tensor, Tensor | Packed],
    vocabulary: int,
    targets: Tensor,
    sequences: Tensor,
) -> Divergence:
    """Compare two models on the same rows.

    Args:
        first: hidden states (R, D) and output projection (V, D) of the one.
        second: those of the other.
        vocabulary: how many words both have.
        targets: (R,), the next token of the text, or NO_TARGET.
        sequences: (R,), which sequence a row is of.

    Raises:
        ModelError: logits are NaN or infinite.
    """
    parts = []
    for at in range(0, len(targets), _ROWS):
        rows = slice(at, at + _ROWS)
        a, b = (logits(hidden[rows], head, vocabulary) for hidden, head in (first, second))
        step = max(1, _WIDE // vocabulary)
        for inner in range(0, len(a), step):
            some = slice(inner, inner + step)
            parts.append(_measure(a[some], b[some], targets[rows][some]).cpu())
    table = dict(zip(_COLUMNS, torch.cat(parts).unbind(-1), strict=True))
    return _summary(table, vocabulary, targets.cpu(), sequences.cpu())


def _measure(a: Tensor, b: Tensor, targets: Tensor) -> Tensor:
    """Of logits (R, V) of both, the figures of each row, in the order of _COLUMNS: (R, 8)."""
    for name, values in (("first", a), ("second", b)):
        if not is_finite(values):
            raise ModelError(f"the {name} model's logits are not finite: its weights are damaged")
    same = torch.equal(a, b)  # as after most conversions: half of the work is then done
    a = a.double()
    b = a if same else b.double()
    apart = (a - b).abs()
    difference, signal = (x - x.mean(-1, keepdim=True) for x in (a - b, a))
    log_p = a.log_softmax(-1)
    log_q = log_p if same else b.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)
    words = targets.clamp_min(0)[:, None]
    columns = (
        apart.amax(-1),
        apart.mean(-1),
        difference.square().mean(-1),
        signal.square().mean(-1),
        kl,
        (a.argmax(-1) == b.argmax(-1)).double(),
        -log_p.gather(-1, words)[:, 0],
        -log_q.gather(-1, words)[:, 0],
    )
    return torch.stack(columns, dim=-1)


def _summary(table: dict[str, Tensor], vocabulary: int, targets: Tensor, sequences: Tensor) -> Divergence:
    apart, signal = table["difference"], table["signal"]
    worst = max(_relative(apart[sequences == i], signal[sequences == i]) for i in sequences.unique())
    known = (targets != NO_TARGET) & (targets < vocabulary)
    losses = [table[name][known].mean().item() if known.any() else None for name in ("loss_a", "loss_b")]
    return Divergence(
        positions=len(targets),
        max_difference=table["largest"].max().item(),
        mean_difference=table["mean"].mean().item(),
        relative_error=_relative(apart, signal),
        worst_relative_error=worst,
        kl_mean=table["kl"].mean().item(),
        kl_p999=table["kl"].quantile(0.999).item(),
        kl_max=table["kl"].max().item(),
        top1_agreement=table["agrees"].mean().item(),
        loss_a=losses[0],
        loss_b=losses[1],
    )


def _relative(difference: Tensor, signal: Tensor) -> float:
    """√(Σ difference / Σ signal) of squares; of logits that are all equal, against one."""
    below = signal.sum().item() or float(len(signal))
    return math.sqrt(difference.sum().item() / below)

"""Which tokens two models are compared on: pieces of a text, and one sequence past half of their context.

B batch   T positions in the input   R rows (positions of all sequences)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from puna.formats.proof.divergence import NO_TARGET
from puna.formats.proof.layerwise import Tokens
from puna.formats.proof.texts import TEXT
from puna.tokenizer.tokenizer import Tokenizer

_PIECE = 256  # tokens of a piece at most
_PIECES = 8
_PROMPT = 16  # tokens before a greedy continuation
_PROMPTS = 4
_BEYOND = 64  # tokens past a sliding window
_PAST = 1.125  # the long sequence reaches so far past half of the context, as a share of that half


@dataclass(frozen=True)
class ProofTokens:
    """`sequences` are run, the long one last, and `prompts` (P, T) continued.

    `is_text` where a tokenizer made them; `strided` where the positions of the long sequence have gaps;
    `unreached` is a sliding window that no sequence of neighbouring positions is longer than.
    """

    sequences: Sequence[Tokens]
    prompts: Tensor
    is_text: bool
    strided: bool
    unreached: int | None = None

    @property
    def count(self) -> int:
        """Tokens that each model runs."""
        return sum(each.ids.numel() for each in self.sequences)

    @property
    def furthest(self) -> int:
        """The largest position."""
        return max(int(each.positions.max()) for each in self.sequences)

    def targets(self) -> Tensor:
        """(R,): the token after each where the text has one, and its positions no gaps."""
        return torch.cat([self._targets(each).flatten() for each in self.sequences])

    def numbers(self) -> Tensor:
        """(R,): which sequence each row is of."""
        lengths = [len(row) for each in self.sequences for row in each.ids]
        return torch.repeat_interleave(torch.tensor(lengths))

    def _targets(self, tokens: Tokens) -> Tensor:
        targets = torch.full_like(tokens.ids, NO_TARGET)
        if self.is_text and not (self.strided and tokens is self.sequences[-1]):
            targets[:, :-1] = tokens.ids[:, 1:]
        return targets


def proof_tokens(
    tokenizer: Tokenizer | None,
    vocabulary: int,
    context: int,
    total: int,
    device: torch.device,
    window: int | None = None,
) -> ProofTokens:
    """About `total` tokens with ids below `vocabulary`, for models of this context.

    What lies behind a sliding `window` is seen only where a sequence without gaps is longer: one is added
    where `total` leaves room for it.

    Rotary attention knows distances, not positions: moving a whole sequence to the far end of the context
    would show nothing that its beginning does not. So where a sequence of neighbouring positions as long as
    half of the context is too expensive, the positions of a shorter one have gaps: its distances then reach
    as far, and a wrong base or scaling shows in them as it does in a long text.
    """
    ids, bos = _ids(tokenizer, vocabulary, total)
    far = min(context, int(_PAST * (context // 2 + 1)) + _PROMPT)
    strided = far > 0.6 * total
    piece = max(2, min(_PIECE, context, total // 4))
    length = piece if strided else far
    stride = -(-(far - 1) // (length - 1)) if strided else 1
    passing = _passing(window, context, total, piece if strided else length)
    pieces = max(1, min(_PIECES, (total - length - passing) // piece))
    starts = [round(i * (len(ids) - piece) / max(1, pieces - 1)) for i in range(pieces)]
    rows = torch.tensor([[*bos, *ids[at : at + piece]][:piece] for at in starts], device=device)
    long = torch.tensor([[*bos, *ids][:length]], device=device)
    width = min(_PROMPT, max(1, context // 2), piece)
    sequences = [_from_zero(rows), Tokens(long, torch.arange(length, device=device)[None] * stride)]
    if passing:
        sequences.insert(1, _from_zero(torch.tensor([[*bos, *ids][:passing]], device=device)))
    unseen = window is not None and window < context and max(passing, piece if strided else length) <= window
    unreached = window if unseen else None
    return ProofTokens(sequences, rows[:_PROMPTS, :width], tokenizer is not None, strided, unreached)


def _passing(window: int | None, context: int, total: int, longest: int) -> int:
    """Tokens of the sequence that passes the window; 0 where another does, or none can."""
    if window is None or window >= context:
        return 0
    wanted = min(context, window + _BEYOND)
    return wanted if longest < wanted <= total else 0


def _from_zero(ids: Tensor) -> Tokens:
    return Tokens(ids, torch.arange(ids.shape[1], device=ids.device)[None])


def _ids(tokenizer: Tokenizer | None, vocabulary: int, total: int) -> tuple[list[int], list[int]]:
    """Ids to take from, at least `total`, and what each sequence begins with."""
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocabulary, (max(2, total),), generator=generator).tolist(), []
    ids = [index for index in tokenizer.encode(TEXT, bos=False) if index < vocabulary] or [0]
    bos = tokenizer.bos_id
    return ids * -(-total // len(ids)), [] if bos is None or bos >= vocabulary else [bos]

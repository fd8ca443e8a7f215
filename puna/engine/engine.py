"""The step: prefill all prompts, then one token for every row until all are done.

B batch   T positions in the input   D width   V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager

import torch
from torch import Tensor

from puna.engine.cache import ContiguousCache
from puna.engine.sampling import Sampler, logprobs
from puna.engine.sequence import Sequence
from puna.errors import ResourceError
from puna.model.llama import Llama


def run(model: Llama, sequences: Items[Sequence]) -> Iterator[tuple[Sequence, str]]:
    """Complete all sequences as one batch; gives each piece of text as soon as it is certain.

    Between two pieces the model is as it was found: training mode, gradients and random states.

    Raises:
        ResourceError: there is too little memory for keys and values.
        ModelError: the model's logits are not finite.
    """
    batch = _Batch(model, sequences)
    while batch.rows:
        yield from batch.step()


class _Batch:
    """The rows still at work, and what the next pass is given."""

    def __init__(self, model: Llama, sequences: Items[Sequence]) -> None:
        self._model = model
        self._device = model.model.embed_tokens.weight.device
        self.rows = list(sequences)
        by_length = model.model.rope.scaling.by_length
        # The length that a sequence may reach, so that one base serves all of it, as in one whole pass.
        lengths = torch.tensor([row.longest for row in self.rows], device=self._device) if by_length else None
        self._cache = ContiguousCache(
            len(model.model.layers),
            max((row.longest for row in self.rows), default=0),
            lengths,
            model.config.sliding_window,
        )
        self._sampler = Sampler(
            [row.params for row in self.rows],
            [row.prompt for row in self.rows],
            model.config.vocab_size,
            self._device,
        )

    def step(self) -> list[tuple[Sequence, str]]:
        """Sample one token for every row; rows that are done leave the batch."""
        with _generating(self._model):
            logits = self._logits()  # (B, V)
            tokens = self._sampler.sample(logits)
            self._note_logprobs(logits, tokens)
            pieces = [(row, row.push(token)) for row, token in zip(self.rows, tokens, strict=True)]
            self._drop_finished()
        return pieces

    def _logits(self) -> Tensor:
        """Logits for the token after each row's last: (B, V)."""
        fresh = not self.rows[0].tokens
        inputs = [row.prompt if fresh else row.tokens[-1:] for row in self.rows]
        T = max(map(len, inputs))
        ids = torch.tensor([[*row, *[0] * (T - len(row))] for row in inputs], device=self._device)  # (B, T)
        start = [0 if fresh else len(row.prompt) + len(row.tokens) - 1 for row in self.rows]
        positions = torch.tensor(start, device=self._device)[:, None] + torch.arange(T, device=self._device)
        hidden = self._model.model(ids, positions, cache=self._cache)  # (B, T, D)
        last = torch.tensor([len(row) - 1 for row in inputs], device=self._device)
        chosen = hidden[torch.arange(len(inputs), device=self._device), last]  # (B, D)
        return self._model.lm_head(chosen)  # (B, V)

    def _note_logprobs(self, logits: Tensor, tokens: list[int]) -> None:
        counts = [row.params.logprobs for row in self.rows]
        if all(count is None for count in counts):
            return
        for row, found in zip(
            self.rows, logprobs(logits, tokens, [count or 0 for count in counts]), strict=True
        ):
            if row.params.logprobs is not None:
                row.logprobs.append(found)

    def _drop_finished(self) -> None:
        alive = [index for index, row in enumerate(self.rows) if row.finish_reason is None]
        if len(alive) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in alive]
        if alive:
            self._cache.keep(alive)
            self._sampler.keep(alive)


@contextmanager
def _generating(model: Llama) -> Iterator[None]:
    """No gradients, no dropout; both as before afterwards. Too little memory is one line of advice.

    Not `inference_mode`: tensors made in it, such as kept rotary frequencies, could not serve training later.
    """
    training = [module for module in model.modules() if module.training]
    try:
        with torch.no_grad():
            for module in training:
                module.training = False
            yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise ResourceError(
                "out of memory while generating; give fewer or shorter prompts at once, lower "
                "max_new_tokens, or load the model in a smaller dtype"
            ) from None
        raise
    finally:
        for module in training:
            module.training = True

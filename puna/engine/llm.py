"""The object users hold: a model, its tokenizer, and what they do together."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from puna import formats
from puna import tokenizer as tokenizers
from puna.devices import choose_device, choose_dtype
from puna.engine.engine import run
from puna.engine.sampling import SamplingParams, TokenLogprobs
from puna.engine.sequence import FinishReason, Sequence
from puna.engine.text import answer_text
from puna.errors import InputError
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.model.rope import DynamicScaling
from puna.model.weights import Packed, Weights, load_weights, weights_of
from puna.settings import parse
from puna.tokenizer import chat as chats
from puna.tokenizer.tokenizer import Tokenizer

Prompt = str | Items[int]
"""Text, or token ids."""


@dataclass(frozen=True)
class Completion:
    """An answer.

    `text` is the new text only, with its leading space and without end token or stop string; it is empty
    where the model has no tokenizer. `tokens` are all that the model produced, those included that ended the
    answer. `finish_reason` is "stop" for an end token or a stop string, "length" for `max_new_tokens` or the
    end of the context. `logprobs` has an entry for every token, where they were asked for.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None


class LLM:
    """A model and its tokenizer.

    >>> llm = load("path-or-hub-id")                                            # doctest: +SKIP
    >>> llm.generate("Once upon a time", max_new_tokens=200, temperature=0.0)   # doctest: +SKIP
    Completion(text=' there was a little girl…', …)
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer | None = None,
        end_ids: Items[int] | None = None,
        source: str | None = None,
        notes: Items[str] = (),
    ) -> None:
        """A model in memory, as it is: it may be in the middle of its training.

        `end_ids` are the tokens that end an answer, the tokenizer's unless given; `source` says where the
        model is from, for the provenance of what `save` writes; `notes` are what its files left unsaid.
        """
        self.notes = tuple(notes)
        self.model, self.tokenizer, self.source = model, tokenizer, source
        known = () if tokenizer is None else tokenizer.end_ids
        self.end_ids = tuple(known if end_ids is None else end_ids)

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self.model.config

    @property
    def context(self) -> int:
        """The longest sequence, prompt and answer together."""
        return context_length(self.config)

    @overload
    def generate(self, prompt: Prompt, *, specials: bool = False, **sampling: Any) -> Completion: ...
    @overload
    def generate(
        self, prompt: Items[Prompt], *, specials: bool = False, **sampling: Any
    ) -> list[Completion]: ...
    def generate(
        self, prompt: Prompt | Items[Prompt], *, specials: bool = False, **sampling: Any
    ) -> Completion | list[Completion]:
        """Continue a prompt, or each of a list of prompts as one batch.

        Args:
            prompt: text, which BOS is put before ("" is BOS alone), or ids, taken as they are.
            specials: parse special tokens in text.
            **sampling: the fields of SamplingParams.

        Raises:
            SettingsError: impossible sampling settings.
            InputError: a prompt is empty, too long, or not in the vocabulary; or it is text, and there is no
                tokenizer.
            ResourceError: too little memory.
        """
        params = parse(SamplingParams, sampling, "sampling")
        if not _is_batch(prompt):
            return self._complete([self._sequence(prompt, params, specials)])[0]
        return self._complete([self._sequence(one, params, specials) for one in prompt])

    def stream(self, prompt: Prompt, *, specials: bool = False, **sampling: Any) -> Iterator[str]:
        """The text of `generate` in pieces, as soon as each is certain; errors come at once.

        Raises:
            InputError: as `generate` does.
        """
        params = parse(SamplingParams, sampling, "sampling")
        return self._pieces(self._sequence(prompt, params, specials))

    def chat(
        self, messages: Items[Mapping[str, Any]], *, template: str | None = None, **sampling: Any
    ) -> Completion:
        """Answer a conversation: `[{"role": "user", "content": "Hello"}, …]`.

        Args:
            messages: what was said so far.
            template: a name of `puna.tokenizer.chat.TEMPLATES`, or a template; None takes the model's own.
            **sampling: the fields of SamplingParams.

        Raises:
            TokenizerError: there is no template, or it refuses the conversation.
            InputError: as `generate` does.
        """
        return self._complete([self._conversation(messages, template, sampling)])[0]

    def stream_chat(
        self, messages: Items[Mapping[str, Any]], *, template: str | None = None, **sampling: Any
    ) -> Iterator[str]:
        """The text of `chat` in pieces.

        Raises:
            InputError: as `chat` does.
        """
        return self._pieces(self._conversation(messages, template, sampling))

    def save(self, directory: str | Path, overwrite: bool = False) -> None:
        """Write a model directory that `load` and transformers open.

        Raises:
            ModelError: the directory exists, or the weights cannot be stored.
            ResourceError: the disk is full.
        """
        formats.save(
            directory,
            weights_of(self.model),
            self.tokenizer,
            end_ids=self.end_ids,
            source=self.source,
            overwrite=overwrite,
        )

    def _sequence(self, prompt: Any, params: SamplingParams, specials: bool) -> Sequence:
        if isinstance(prompt, str):
            ids = self._with_tokenizer().encode(prompt, bos=True, specials=specials)
            if not ids:
                raise InputError("the prompt is empty, and this tokenizer has no token to begin a text with")
        else:
            ids = _as_ids(prompt)
        return self._begin(ids, params, continues=True)

    def _conversation(
        self, messages: Items[Mapping[str, Any]], template: str | None, sampling: Mapping[str, Any]
    ) -> Sequence:
        params = parse(SamplingParams, sampling, "sampling")
        return self._begin(chats.render(self._with_tokenizer(), messages, template), params, continues=False)

    def _begin(self, ids: list[int], params: SamplingParams, continues: bool) -> Sequence:
        size = self.config.vocab_size
        wrong = next((index for index in ids if not 0 <= index < size), None)
        if wrong is not None:
            raise InputError(f"token id {wrong} is not in the model's vocabulary: expected 0 to {size - 1}")
        if len(ids) >= self.context:
            raise InputError(
                f"the prompt has {len(ids)} tokens; this model takes {self.context}, the answer included; "
                "shorten it"
            )
        if params.stop and self.tokenizer is None:
            raise InputError("stop strings need a tokenizer, and this model has none")
        text = None
        if self.tokenizer is not None:
            text = answer_text(self.tokenizer, ids, params.stop, continues)
        return Sequence(ids, params, self.end_ids, self.context, text)

    def _with_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(
                "this model has no tokenizer, so prompts must be token ids; or name one "
                "(tokenizer=, --tokenizer)"
            )
        return self.tokenizer

    def _complete(self, sequences: list[Sequence]) -> list[Completion]:
        texts: dict[int, list[str]] = {id(sequence): [] for sequence in sequences}
        for sequence, piece in run(self.model, sequences):
            texts[id(sequence)].append(piece)
        return [_completion(sequence, "".join(texts[id(sequence)])) for sequence in sequences]

    def _pieces(self, sequence: Sequence) -> Iterator[str]:
        return (piece for _, piece in run(self.model, [sequence]) if piece)


def load(
    path: str | Path,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str | None = None,
    tokenizer: str | Path | Tokenizer | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> LLM:
    """Open a model: a directory, a file, a run directory (its best export), or an id on the Hugging Face hub.

    Weights stay in the mapped file where type and device allow it.

    Args:
        path: where the model is.
        dtype: float32, bfloat16, float16, float64; auto takes bfloat16 where the hardware multiplies in it.
        device: auto, cpu, cuda or mps.
        quantize: must be None; no scheme is available.
        tokenizer: takes the place of the model's own.
        revision: of a hub id: a branch, tag or commit.
        cache_dir: where downloads from the hub are kept; its usual place unless given.

    Raises:
        ModelError: it is no model, or a damaged or unsupported one.
        TokenizerError: its tokenizer is damaged.
        SettingsError: dtype or device is unknown.
        InputError: `quantize` names a scheme.
    """
    if quantize is not None:
        raise InputError(f"quantize={quantize!r}: no quantization scheme is available; leave it out")
    target = choose_device(device)
    kind = choose_dtype(dtype, target)
    source = formats.open_model(formats.resolve(path, revision=revision, cache_dir=cache_dir))
    chosen = source.tokenizer() if tokenizer is None else tokenizer
    if isinstance(chosen, str | Path):
        chosen = tokenizers.load(chosen)
    with torch.device("meta"):
        model = Llama(source.config).to(kind)
    load_weights(model, _on(target, kind, formats.expanded(source.weights)))
    ends = source.end_ids if chosen is None else (*source.end_ids, *chosen.end_ids)
    return LLM(model.eval(), chosen, tuple(dict.fromkeys(ends)), source=str(path), notes=source.notes)


def context_length(config: ModelConfig) -> int:
    """The longest sequence a model takes.

    `max_position_embeddings`; for dynamic NTK that is the length it was trained at, and the scaling begins
    there: it reaches `factor` times as far.
    """
    scaling = config.rope_scaling
    stretch = scaling.factor if isinstance(scaling, DynamicScaling) else 1
    return int(config.max_position_embeddings * Fraction(stretch))  # exact, however large both are


def _on(device: torch.device, dtype: torch.dtype, weights: Weights) -> Weights:
    """The weights moved to a device, tensor by tensor, so that none is held twice."""

    def moved() -> Iterator[tuple[str, Tensor | Packed]]:
        for name, tensor in weights:
            yield name, tensor if isinstance(tensor, Packed) else tensor.to(device, dtype)

    return Weights(weights.config, moved())


def _completion(sequence: Sequence, text: str) -> Completion:
    assert sequence.finish_reason is not None
    logprobs = None if sequence.params.logprobs is None else tuple(sequence.logprobs)
    return Completion(text, tuple(sequence.tokens), sequence.finish_reason, sequence.prompt, logprobs)


def _is_batch(prompt: Any) -> bool:
    """Whether it is a list of prompts, of texts or of ids. An empty list is taken for an empty prompt."""
    if isinstance(prompt, Tensor | np.ndarray):
        return prompt.ndim > 1
    is_list = isinstance(prompt, Items) and not isinstance(prompt, str) and len(prompt) > 0
    return is_list and isinstance(prompt[0], Items | Tensor | np.ndarray)


def _as_ids(prompt: Any) -> list[int]:
    try:
        ids = [operator.index(item) for item in prompt]
    except TypeError:
        raise InputError(
            f"a prompt must be text or token ids, got {type(prompt).__name__}: {prompt!r:.60}"
        ) from None
    if not ids:
        raise InputError("the prompt is empty; give text, or at least one token id")
    return ids

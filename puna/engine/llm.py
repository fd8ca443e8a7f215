"""The object users hold: a model, its tokenizer, and what they do together."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Items
from fractions import Fraction
from pathlib import Path
from typing import Any, overload

import torch

from puna import formats
from puna.engine.answer import Answer, Request
from puna.engine.completion import Completion, completion
from puna.engine.engine import Engine
from puna.engine.params import SamplingParams
from puna.engine.prompts import Messages, Prompt, as_ids, is_batch, is_conversation, pair
from puna.engine.settings import EngineSettings
from puna.engine.stream import Stream
from puna.errors import InputError, ModelError, PunaError
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.model.rope import DynamicScaling
from puna.model.weights import shapes, weights_of
from puna.quantize import packing
from puna.settings import parse
from puna.tokenizer.tokenizer import Tokenizer

_REBUILDING = threading.RLock()  # several threads may ask for a model's first answer at once


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
        engine: EngineSettings | None = None,
        packs: bool = False,
    ) -> None:
        """A model in memory, as it is: it may be in the middle of its training.

        `end_ids` are the tokens that end an answer, the tokenizer's unless given; `source` says where the
        model is from, for the provenance of what `save` writes; `notes` are what its files left unsaid;
        `engine` says what memory answers may take and how many are made at once; `packs`: whether the model
        is packed when the first answer is asked for, see `pack`.
        """
        self._packs = packs
        self.notes = tuple(notes)
        self.engine_settings = engine or parse(EngineSettings, {})
        self._engine: Engine | None = None
        self._structure: Structure | None = None
        self._versions: list[int] = []
        self.model, self.tokenizer, self.source = model, tokenizer, source
        known = () if tokenizer is None else tokenizer.end_ids
        self.end_ids = tuple(known if end_ids is None else end_ids)

    def __repr__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        whole = "".join(f"{scheme} and " for scheme in packing.schemes(self.model))
        return f"<LLM {self.source or 'in memory'}: {whole}{kind} on {self.device}, context {self.context:,}>"

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The number type that it computes in; its matrices may be of whole numbers."""
        return self.model.model.norm.weight.dtype

    @property
    def context(self) -> int:
        """The longest sequence, prompt and answer together."""
        return context_length(self.config)

    @property
    def engine(self) -> Engine:
        """What computes the answers; made at first use, and anew where the model was rebuilt since.

        Raises:
            ModelError: a tensor of the model is of another type than its norms.
            ResourceError: there is too little memory for keys and values.
        """
        with _REBUILDING:
            return self._engine_as_it_is()

    def _engine_as_it_is(self) -> Engine:
        _check_types(self.model)
        if self._packs:
            self.pack()
        structure = _structure(self.model, self.engine_settings)
        versions = [-1 if p.is_inference() else p._version for p in self.model.parameters()]
        if self._engine is None or self._engine.broken or structure != self._structure:
            self._engine = Engine(self.model, self.tokenizer, self.context, self.engine_settings)
        elif versions != self._versions or -1 in versions:
            self._engine.forget()  # an update of the weights: what was computed by the old ones is wrong
        self._structure, self._versions = structure, versions
        return self._engine

    def pack(self) -> None:
        """Lay the weights out as products on this CPU read them: the same numbers, and faster answers.

        What `save` writes stays as it was; so does what `model(ids)` computes, but for the rounding of sums.
        Does nothing elsewhere than on a CPU, without a compiler, to a model that learns (in training mode, or
        with gradients), or for the second time. A model that `load` opened is packed by itself when its first
        answer is asked for. Packed matrices pass gradients on, and refuse to be trained themselves.
        """
        learns = self.model.training or any(p.grad is not None for p in self.model.parameters())
        if self.device.type == "cpu" and not learns:
            with _REBUILDING:
                packing.pack(self.model)

    def unpack(self) -> None:
        """Undo `pack`, for good: the same weights, bit for bit, in the modules of the model file.

        Those in floating point can be trained; matrices of whole numbers remain what they are, each in a
        layer of its own that passes gradients on.
        """
        with _REBUILDING:
            self._packs = False
            packing.unpack(self.model)

    @overload
    def generate(self, prompt: Prompt, *, specials: bool = False, **sampling: Any) -> Completion: ...
    @overload
    def generate(
        self, prompt: Items[Prompt], *, specials: bool = False, **sampling: Any
    ) -> list[Completion]: ...
    def generate(
        self, prompt: Prompt | Items[Prompt], *, specials: bool = False, **sampling: Any
    ) -> Completion | list[Completion]:
        """Continue a prompt, or each of a list of prompts together; no answer depends on the others.

        Args:
            prompt: text, which BOS is put before ("" is BOS alone), or ids, taken as they are.
            specials: parse special tokens in text.
            **sampling: the fields of SamplingParams.

        Raises:
            SettingsError: impossible sampling settings.
            InputError: a prompt is empty, too long, or not in the vocabulary; it is text, and there is no
                tokenizer; or a constraint cannot be satisfied.
            ResourceError: too little memory.
        """
        params = parse(SamplingParams, sampling, "sampling")
        if not is_batch(prompt):
            return self._complete([self._prompted(prompt, params, specials)])[0]
        return self._complete([self._prompted(one, params, specials) for one in prompt])

    def completions(
        self,
        requests: Iterable[tuple[Prompt | Messages, Mapping[str, Any]]],
        *,
        template: str | None = None,
    ) -> Iterator[tuple[int, Completion | PunaError]]:
        """Answer any number of requests as one continuous batch, each as soon as it is done.

        Args:
            requests: prompts or conversations, each with its own sampling settings. They are taken only as
                fast as they are answered.
            template: for conversations, as in `chat`.

        Returns:
            Pairs of a request's number, from 0, and its answer, or the error of a request at fault: it harms
            no other.
        """
        return (
            (number, _completion_or_error(outcome))
            for number, outcome in self._served(
                (number, self._request_or_error(asked, template)) for number, asked in enumerate(requests)
            )
        )

    def stream(self, prompt: Prompt, *, specials: bool = False, **sampling: Any) -> Stream:
        """The text of `generate` in pieces, as soon as each is certain; errors come at once.

        Raises:
            InputError: as `generate` does; or several answers are asked for.
        """
        params = parse(SamplingParams, sampling, "sampling")
        return self._stream(self._prompted(prompt, params, specials))

    def chat(self, messages: Messages, *, template: str | None = None, **sampling: Any) -> Completion:
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

    def stream_chat(self, messages: Messages, *, template: str | None = None, **sampling: Any) -> Stream:
        """The text of `chat` in pieces.

        Raises:
            InputError: as `chat` and `stream` do.
        """
        return self._stream(self._conversation(messages, template, sampling))

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

    def ids(self, prompt: Prompt, specials: bool = False) -> list[int]:
        """A prompt as `generate` takes it → ids.

        Raises:
            InputError: it is empty; or it is text, and there is no tokenizer.
        """
        if not isinstance(prompt, str):
            return as_ids(prompt)
        ids = self._with_tokenizer().encode(prompt, bos=True, specials=specials)
        if not ids:
            raise InputError("the prompt is empty, and this tokenizer has no token to begin a text with")
        return ids

    def request(self, ids: list[int], params: SamplingParams, continues: bool) -> Request:
        """What the engine is asked for; `continues` says whether the answer's text goes on from the prompt's.

        Raises:
            InputError: there are too many ids, or some are not in the vocabulary.
        """
        self._check_ids("token id", ids)
        self._check_ids("stop_ids:", params.stop_ids)
        self._check_ids("logit_bias:", params.logit_bias)
        if self.context < 2:
            raise InputError("this model's context is one token: there is no room for a prompt and an answer")
        if len(ids) >= self.context and params.overflow == "refuse":
            raise InputError(
                f"the prompt has {len(ids)} tokens; this model takes {self.context}, the answer included; "
                "shorten it, or let overflow be 'truncate' or 'slide'"
            )
        if params.stop and self.tokenizer is None:
            raise InputError("stop strings need a tokenizer, and this model has none")
        begins = self.tokenizer is not None and ids[0] == self.tokenizer.bos_id
        return Request(tuple(ids), params, self.end_ids, continues, anchor=int(begins))

    def _request_or_error(self, asked: Any, template: str | None) -> Request | PunaError:
        try:
            prompt, sampling = pair(asked)
            if is_conversation(prompt):
                return self._conversation(prompt, template, sampling)
            return self._prompted(prompt, parse(SamplingParams, sampling, "sampling"), specials=False)
        except PunaError as error:
            return error

    def _prompted(self, prompt: Any, params: SamplingParams, specials: bool) -> Request:
        return self.request(self.ids(prompt, specials), params, continues=True)

    def _conversation(self, messages: Messages, template: str | None, sampling: Mapping[str, Any]) -> Request:
        from puna.tokenizer import chat as chats  # a library of templates, which few answers need

        params = parse(SamplingParams, sampling, "sampling")
        ids = chats.render(self._with_tokenizer(), messages, template)
        return self.request(ids, params, continues=False)

    def _check_ids(self, what: str, ids: Iterable[int]) -> None:
        size = self.config.vocab_size
        wrong = next((index for index in ids if not 0 <= index < size), None)
        if wrong is not None:
            raise InputError(f"{what} {wrong} is not in the model's vocabulary: expected 0 to {size - 1}")

    def _with_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(
                "this model has no tokenizer, so prompts must be token ids; or name one "
                "(tokenizer=, --tokenizer)"
            )
        return self.tokenizer

    def _complete(self, requests: list[Request]) -> list[Completion]:
        done: dict[int, Completion] = {}
        for number, outcome in self._served(enumerate(requests)):
            if isinstance(outcome, PunaError):
                raise outcome
            done[number] = completion(outcome)
        return [done[number] for number in range(len(requests))]

    def _served(
        self, requests: Iterable[tuple[int, Request | PunaError]]
    ) -> Iterator[tuple[int, Answer | PunaError]]:
        """Each request's answer once it is finished; what was not taken on is its error."""
        engine = self.engine
        ahead = 2 * engine.settings.max_running  # so many are known to the engine: a place never stays empty
        coming, at_work = iter(requests), dict[int, Answer]()
        try:
            while True:
                taken = list(itertools.islice(coming, ahead - len(at_work)))
                for number, request in taken:
                    outcome = _submitted(engine, request)
                    if isinstance(outcome, PunaError):
                        yield number, outcome
                    else:
                        at_work[number] = outcome
                finished = [number for number, answer in at_work.items() if answer.finished]
                yield from ((number, at_work.pop(number)) for number in finished)
                if not taken and not at_work:
                    return
                if not finished:
                    engine.step()
        finally:
            for answer in at_work.values():
                engine.cancel(answer)

    def _stream(self, request: Request) -> Stream:
        if request.params.answers > 1:
            raise InputError("a stream is of one answer: n and best_of must be 1; or use generate")
        engine = self.engine
        return Stream(engine, engine.submit(request))


def context_length(config: ModelConfig) -> int:
    """The longest sequence a model takes.

    `max_position_embeddings`; for dynamic NTK that is the length it was trained at, and the scaling begins
    there: it reaches `factor` times as far.
    """
    scaling = config.rope_scaling
    stretch = scaling.factor if isinstance(scaling, DynamicScaling) else 1
    return int(config.max_position_embeddings * Fraction(stretch))  # exact, however large both are


Structure = tuple[Any, ...]


def _structure(model: Llama, settings: EngineSettings) -> Structure:
    """What an engine is made for; its number types, device, modules and settings."""
    weight = model.model.norm.weight  # not the embedding's, which may be of whole numbers
    return weight.dtype, weight.device, settings, [id(module) for module in model.modules()]


def _check_types(model: Llama) -> None:
    """Products of two types are refused by torch, in words of its own, in the middle of an answer."""
    meant = model.model.norm.weight.dtype
    odd = {name: p.dtype for name, p in model.named_parameters() if p.dtype != meant}
    if not odd:
        return
    own = {*shapes(model.config), "lm_head.weight"}  # packed matrices' scales have types of their own
    name = next((name for name, dtype in odd.items() if name in own and dtype.is_floating_point), None)
    if name is not None:
        raise ModelError(
            f"{name} is {odd[name]} and model.norm.weight {meant}; answers are computed in one type: "
            f"llm.model.to({meant}) gives the model one"
        )


def _submitted(engine: Engine, request: Request | PunaError) -> Answer | PunaError:
    if isinstance(request, PunaError):
        return request
    try:
        return engine.submit(request)
    except PunaError as error:
        return error


def _completion_or_error(outcome: Answer | PunaError) -> Completion | PunaError:
    if isinstance(outcome, PunaError):
        return outcome
    if isinstance(outcome.error, PunaError):
        return outcome.error
    if outcome.error is not None:  # a fault of ours, which must not end the answers of others
        return PunaError(f"the engine failed: {type(outcome.error).__name__}: {outcome.error}")
    return completion(outcome)

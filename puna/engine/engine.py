"""The step: what the scheduler chose goes through the model as one flat pass; each sequence gets a token.

M rows of a pass (tokens of many sequences)   R rows that are sampled   D width   V vocabulary
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Module

from puna.devices import free_memory, is_out_of_memory
from puna.engine.answer import Answer, Request, Track
from puna.engine.blocks import BlockPool
from puna.engine.cache import PagedCache, bytes_per_position
from puna.engine.constraints import Grammars
from puna.engine.figures import Load, Times
from puna.engine.forward import Forward
from puna.engine.sampling import choose, logprobs
from puna.engine.scheduler import Part, Scheduler
from puna.engine.sequence import Sequence
from puna.engine.settings import EngineSettings
from puna.engine.state import Choice, SamplingState
from puna.engine.still import still
from puna.engine.text import answer_text
from puna.errors import InputError, ModelError, ResourceError
from puna.kernels.choosing import chooser_on
from puna.kernels.pages import BLOCK
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.progress import quantity
from puna.tokenizer.tokenizer import Tokenizer

INTERRUPTIONS = (KeyboardInterrupt, SystemExit, GeneratorExit)
PROMPT_ROWS = 64  # prompt tokens whose log-probabilities are formed at once: logits are V numbers each
CACHE_SHARE = {"cpu": 0.25, "cuda": 0.5}  # of the free memory; other devices use the CPU's


class Engine:
    """One model that answers any number of requests at once.

    Call `submit` at any time and `step` until it returns False; pieces of text appear in the answers' tracks.
    Between two steps the model is as it was found: training mode, gradients and random states. Its methods
    may be called from several threads.
    """

    def __init__(
        self, model: Llama, tokenizer: Tokenizer | None, context: int, settings: EngineSettings
    ) -> None:
        """Memory is reserved here, and the model's pass is captured, or what its rows may be is found.

        Raises:
            ResourceError: there is not even memory for one block of keys and values.
        """
        self.settings, self.times = settings, Times()
        self._model, self._tokenizer, self._context = model, tokenizer, context
        config, weight = model.config, model.model.norm.weight
        chooser_on(weight.device)  # compiled now, not while the first token is waited for
        blocks = _block_count(config, context, weight.dtype, weight.device, settings)
        self._cache = PagedCache(config, blocks, weight.dtype, weight.device, settings.cache_dtype == "int8")
        with _generating(()):
            self._forward = Forward(model, self._cache, settings)
        self._pool = BlockPool(blocks, BLOCK, sharing=settings.prefix_sharing)
        self._scheduler = Scheduler(
            self._pool, self._forward.largest, settings.max_running, config.sliding_window
        )
        self._grammars: dict[tuple[int, ...], Grammars] = {}  # by end tokens
        self._tracks: dict[Sequence, Track] = {}
        self._siblings: dict[Sequence, list[Track]] = {}
        self._lock, self._compiling = threading.RLock(), threading.Lock()
        self._stepping = False
        self._given_up: list[Answer] = []
        self.broken = False
        """Whether it was interrupted (Ctrl-C) while it kept its books: it must not be used any more."""

    @property
    def load(self) -> Load:
        """What is running and waiting, and how full the cache is."""
        scheduler, pool = self._scheduler, self._pool
        return Load(scheduler.running, scheduler.waiting, pool.used, pool.count, scheduler.preemptions)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about how it computes here."""
        fault = self._cache.fault
        return (f"attention is computed by plain torch, which is slow: {fault}",) if fault else ()

    def submit(self, request: Request) -> Answer:
        """Take a request on; it is computed by `step`.

        Raises:
            InputError: its constraint cannot be satisfied, or needs what is not there.
            ResourceError: a sequence as long as it may get does not fit into the cache.
        """
        answer = self.prepare(request)
        self.admit(answer)
        return answer

    def prepare(self, request: Request) -> Answer:
        """The answer to a request before anything of it is computed.

        All that may take long, such as compiling a large schema, is done here, and waits for no step.

        Raises:
            InputError: its constraint cannot be satisfied, or needs what is not there.
            ResourceError: a sequence as long as it may get does not fit into the cache.
        """
        answer = Answer(request)
        answer.tracks = [self._track(answer, index) for index in range(request.params.answers)]
        self._scheduler.check(answer.tracks[0].sequence)
        return answer

    def admit(self, answer: Answer) -> None:
        """Let an answer that `prepare` gave be computed; like `cancel`, it waits for the step at hand."""
        first, *others = answer.tracks
        with self._lock, self._books():
            self._scheduler.add(first.sequence)
            # They begin when the prompt is computed, and find its blocks.
            self._siblings[first.sequence] = others
            self._tracks[first.sequence] = first

    def step(self) -> bool:
        """Compute the next rows of what runs; False where there is nothing to do.

        What goes wrong in it ends the answers concerned, with the error as theirs, and no other.
        """
        with self._lock:
            if self.broken:
                raise RuntimeError("this engine was interrupted while it kept its books; make a new one")
            self._stepping = True
            try:
                return self._step()
            finally:
                self._stepping = False
                while self._given_up and not self.broken:
                    self.cancel(self._given_up.pop())

    def cancel(self, answer: Answer) -> None:
        """Give up what is not finished of an answer, at once; it ends with "cancelled"."""
        with self._lock:
            # A stream may be collected in the middle of a step, or of keeping the books, by this very thread.
            if self._stepping or self.broken:
                self._given_up.append(answer)
            else:
                with self._books():
                    self._cancel(answer)

    def forget(self) -> None:
        """Share nothing with what was computed before: the weights have changed."""
        with self._lock, self._books():
            self._pool.forget()

    def _step(self) -> bool:
        began = time.perf_counter()
        with self._books():
            parts = self._scheduler.plan()
        planned = time.perf_counter()
        if not parts:
            return False
        # An interruption of the model's pass changes nothing: what was planned is planned again.
        try:
            choices, computed = self._chosen(parts)
        except INTERRUPTIONS:
            raise
        except BaseException as error:  # a library's panic is no Exception
            with self._books():
                for answer in [self._tracks[part.sequence].answer for part in parts]:
                    self._fail(answer, error)
            return True
        chosen = time.perf_counter()
        with self._books():
            self._scheduler.done(parts)
            self._release_siblings(parts)
            self._advance(parts, choices)
        ended = time.perf_counter()
        self._note(parts, planned - began, computed - planned, chosen - computed, ended - chosen)
        return True

    @contextmanager
    def _books(self) -> Iterator[None]:
        """Around what must happen whole: an interruption (Ctrl-C) in the middle leaves the engine broken."""
        self.broken = True
        try:
            yield
        except Exception:
            self.broken = False
            raise
        self.broken = False

    def _cancel(self, answer: Answer) -> None:
        self._siblings.pop(answer.tracks[0].sequence, None)
        for track in answer.tracks:
            if track.sequence.finish_reason is None:
                if piece := track.sequence.cancel():
                    track.pieces.append(piece)
                self._drop(track)

    def _track(self, answer: Answer, index: int) -> Track:
        request = answer.request
        params, prompt = request.params, request.prompt
        if index > 0:  # the first one's are everyone's
            params = params.model_copy(update={"prompt_logprobs": None})
        text = None
        if self._tokenizer is not None:
            text = answer_text(self._tokenizer, prompt, params.stop, request.continues)
        sequence = Sequence(prompt, params, request.end_ids, self._context, text, anchor=request.anchor)
        sequence.salt = self._salt(sequence)
        constraint = None
        if params.constrained:
            with self._compiling:  # not the other lock: a large schema must not hold up the answers of others
                grammars = self._grammars_for(request.end_ids)
                constraint = grammars.constraint(params, sequence.prompt, request.continues)
        state = SamplingState(params, sequence.prompt, request.end_ids, index, constraint)
        return Track(sequence, state, answer)

    def _grammars_for(self, end_ids: tuple[int, ...]) -> Grammars:
        if self._tokenizer is None:
            raise InputError("constraints need a tokenizer, and this model has none")
        if end_ids not in self._grammars:
            self._grammars[end_ids] = Grammars(self._tokenizer, self._model.config.vocab_size, end_ids)
        return self._grammars[end_ids]

    def _salt(self, sequence: Sequence) -> int | None:
        """Keys turned by different bases are different keys: dynamic NTK's follows from the length."""
        by_length = self._model.model.rope.scaling.by_length
        beyond = sequence.longest > self._model.config.max_position_embeddings
        return sequence.longest if by_length and beyond else None

    def _chosen(self, parts: list[Part]) -> tuple[list[Choice | ModelError], float]:
        """What each sampled part's sequence goes on with, and when the logits were there."""
        if not all(part.sequence.tokens for part in parts):  # a look at all parts costs as much as a layer
            self._forward.look()
        with _generating(self._forward.touched):
            hidden, logits = self._hidden(parts)
            self._note_prompts(parts, _ends(parts), hidden)
            states = [self._tracks[part.sequence].state for part in parts if part.samples]
            computed = time.perf_counter()
            return choose(logits, states) if states else [], computed

    def _hidden(self, parts: list[Part]) -> tuple[Tensor, Tensor]:
        """Hidden states (M, D) of all rows, and the logits (R, V) of those that are sampled."""
        last = [end - 1 for part, end in zip(parts, _ends(parts), strict=True) if part.samples]
        return self._forward.run(parts, last)

    def _note_prompts(self, parts: list[Part], ends: list[int], hidden: Tensor) -> None:
        """Log-probabilities of prompt tokens, of sequences that ask for them: each by the row before it."""
        for part, end in zip(parts, ends, strict=True):
            sequence = part.sequence
            wanted = sequence.params.prompt_logprobs
            if wanted is None:
                continue
            known = len(sequence.prompt_logprobs)  # of tokens 0 … known - 1; row known - 1 gives the next
            stop = min(part.start + part.count, len(sequence.prompt) - 1)
            for first in range(max(part.start, known - 1), stop, PROMPT_ROWS):
                count = min(PROMPT_ROWS, stop - first)
                row = end - part.count + first - part.start
                logits = self._forward.head(hidden[row : row + count])  # (count, V)
                targets = sequence.prompt[first + 1 : first + 1 + count]
                sequence.prompt_logprobs += logprobs(logits, targets, [wanted] * count)

    def _advance(self, parts: list[Part], choices: list[Choice | ModelError]) -> None:
        sampled = [self._tracks[part.sequence] for part in parts if part.samples]
        for track, choice in zip(sampled, choices, strict=True):
            if track.answer.error is not None:
                continue
            if isinstance(choice, ModelError):
                self._fail(track.answer, choice)
                continue
            try:
                self._push(track, choice)
            except INTERRUPTIONS:
                raise
            except BaseException as error:
                self._fail(track.answer, error)

    def _push(self, track: Track, choice: Choice) -> None:
        sequence, state = track.sequence, track.state
        state.note(choice)
        if choice.logprobs is not None:
            sequence.logprobs.append(choice.logprobs)
        constraint = state.constraint
        if constraint is not None:
            constraint.accept(choice.token)
        piece = sequence.push(choice.token, constraint is not None and constraint.complete)
        if piece:
            track.pieces.append(piece)
        if sequence.finish_reason is not None:
            self._drop(track)

    def _release_siblings(self, parts: list[Part]) -> None:
        for part in parts:
            waiting = self._siblings.get(part.sequence)
            if waiting is None or part.sequence.computed < len(part.sequence.prompt):
                continue
            del self._siblings[part.sequence]
            for track in waiting:
                self._tracks[track.sequence] = track
                self._scheduler.add(track.sequence)

    def _fail(self, answer: Answer, error: BaseException) -> None:
        if answer.error is None:
            answer.error = error
            self._cancel(answer)

    def _drop(self, track: Track) -> None:
        if self._tracks.pop(track.sequence, None) is not None:
            self._scheduler.finish(track.sequence)

    def _note(self, parts: list[Part], *seconds: float) -> None:
        self.times.steps += 1
        self.times.rows += sum(part.count for part in parts)
        self.times.tokens += sum(part.samples for part in parts)
        self.times.sequences += len(parts)
        for name, took in zip(self.times.seconds, seconds, strict=True):
            self.times.seconds[name] += took


def _ends(parts: list[Part]) -> list[int]:
    """One more than the last row of each part."""
    ends, end = [], 0
    for part in parts:
        end += part.count
        ends.append(end)
    return ends


def _block_count(
    config: ModelConfig, context: int, dtype: torch.dtype, device: torch.device, settings: EngineSettings
) -> int:
    """As many blocks as the memory holds, and no more than the running sequences can use."""
    each = BLOCK * bytes_per_position(config, dtype, settings.cache_dtype == "int8")
    memory = settings.cache_memory
    if memory is None:
        memory = int(free_memory(device) * CACHE_SHARE.get(device.type, CACHE_SHARE["cpu"]))
    if memory < each:
        raise ResourceError(
            f"{quantity(memory)}B for keys and values do not hold {BLOCK} positions, which take "
            f"{quantity(each)}B; give engine.cache_memory more, or take engine.cache_dtype=int8"
        )
    return min(memory // each, settings.max_running * math.ceil(context / BLOCK))


@contextmanager
def _generating(modules: Iterable[Module]) -> Iterator[None]:
    """The model still; too little memory is one line of advice."""
    try:
        with still(modules):
            yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(
            "out of memory while generating; give fewer or shorter prompts at once, lower "
            "max_new_tokens, or load the model in a smaller dtype"
        ) from None

"""Answers held to a JSON schema, a regular expression, a grammar or a choice: which tokens may come next.

The text that is held to it is the one the user sees: a token counts by the bytes it adds to that text, and a
token without text is never allowed. Where decoding takes away the first token's leading space (SentencePiece,
at the beginning of a text), that token counts without it. End tokens are allowed exactly where the text is
valid as it stands: an answer that ends by itself is valid, and one that its length limit cut says so.

JSON is compact: "," and ":" between, no white space but inside strings, members in the order of the schema,
and in strings few escapes (see `notation`: another spelling of a key would be a second one of the same name).

    V vocabulary
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Items
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from puna.engine.notation import described
from puna.engine.params import SamplingParams
from puna.errors import InputError, MissingExtraError, printable
from puna.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

STACK = 1 << 28  # bytes, of which only what is used is taken; the library recurses along chains of references
KEPT = 64  # compiled constraints
# What one constraint may cost: about 100 MB, a fraction of a second to begin and 10 ms for a token.
LIMITS = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 20_000,
    "max_items_in_row": 5_000,  # an object of 1000 properties has 4007
    "max_lexer_states": 50_000,
    "max_grammar_size": 500_000,
    "verbose_errors": False,
}
# A schema's brackets and commas say what follows; rules may be ambiguous, and an item then costs far more.
NARROWER = {"the grammar": {"step_max_items": 5_000, "max_items_in_row": 2_000}}
_OURS = re.compile(
    r'^error: |^at 1\(8\): (?=failed to|invalid regex)|failed to (compile|parse) "?%?(JSON schema|json)"?: '
)
_NOTHING = "nothing that this model's vocabulary can write satisfies {}"


class Constraint:
    """What one answer may still become."""

    def __init__(self, words: Words, matcher: LLMatcher, what: str, at_start: bool) -> None:
        """`matcher` is its own; `at_start`: decoding takes the leading space of the first token away."""
        self._words, self._matcher, self._what = words, matcher, what
        self._at_start, self._bare = at_start, at_start
        self._ended = False
        self._found: Tensor | None = None
        self._more = True  # whether text may follow, as far as `_found` is known

    def allowed(self) -> Tensor:
        """Which tokens may come next: (V,) of bool, on the CPU; not to be written to.

        Raises:
            InputError: none may, and the answer is not complete; or finding them would take too long.
        """
        if self._found is None:
            self._found = self._find()
        return self._found

    @property
    def complete(self) -> bool:
        """Whether the answer is valid, and nothing but an end token could follow."""
        if not self._ended:
            self.allowed()
        return self._ended or not self._more

    def accept(self, token: int) -> None:
        """Go on by a token that is allowed.

        Raises:
            InputError: it is not, or following it would take too long.
        """
        assert not self._ended, "an end token was accepted already"
        if not bool(self.allowed()[token]):
            raise InputError(f"token {token} does not fit {self._what}; take one of those allowed")
        self._found = None
        if token in self._words.ends:
            self._ended = True
        elif self._at_start and token in self._words.bare:
            self._bare, self._at_start = False, self._words.strips_all
        else:
            word = self._words.stripped.get(token, token) if self._at_start else token
            self._bare = self._at_start = False
            if not self._matcher.consume_token(word):
                raise self._too_complex()

    def _find(self) -> Tensor:
        words = self._words
        if self._ended:
            return words.only_ends
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8) & words.text_bits
        accepting = self._matcher.is_accepting()
        if self._matcher.is_error():  # what was computed then says "end", valid or not
            raise self._too_complex()
        allowed = np.unpackbits(bits, count=words.vocab_size, bitorder="little").view(np.bool_)  # (V,)
        if self._at_start:  # a token that would lose its space is judged by what remains of it
            rests = np.unpackbits(bits, bitorder="little")[words.vocab_size :].view(np.bool_)
            allowed[words.spaced_ids] = rests[: len(words.spaced_ids)]
            allowed[words.bare_ids] = False
        self._more = bool(allowed.any())
        if not accepting and not self._more:
            raise InputError(_NOTHING.format(self._what))
        allowed[words.bare_ids] |= self._bare and self._more
        allowed[words.end_ids] = accepting
        return torch.from_numpy(allowed)

    def _too_complex(self) -> InputError:
        reason = _line(self._matcher.get_error())
        if reason.startswith("NoExtension"):
            return InputError(_NOTHING.format(self._what))
        return InputError(f"{self._what} is too complex to follow any further; simplify it ({reason})")


class Grammars:
    """A model's compiled constraints."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Items[int]) -> None:
        """`vocab_size` is the model's, often larger than the tokenizer's; `end_ids` end its answers."""
        self._tokenizer, self._vocab_size, self._end_ids = tokenizer, vocab_size, tuple(end_ids)
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def constraint(
        self, params: SamplingParams, prompt: Items[int], continues: bool = True
    ) -> Constraint | None:
        """What holds the answer to a prompt, at its beginning; None where nothing is asked for.

        `continues` is that of `answer_text`: whether the answer's text goes on from the prompt's.

        Raises:
            InputError: it is malformed, cannot be satisfied, or is too complex; or the prompt ends within a
                character.
            MissingExtraError: llguidance is not installed.
        """
        found = described(params)
        if found is None:
            return None
        what, grammar = found
        at_start = self._at_start(prompt if continues else ())
        matcher = self._matcher(grammar, what)
        constraint = Constraint(self._words, matcher, what, at_start)
        if not bool(constraint.allowed().any()):
            raise InputError(f"{what} admits only an empty answer, and this model has no end token")
        return constraint

    @cached_property
    def _words(self) -> Words:
        return Words(self._tokenizer, self._vocab_size, self._end_ids)

    def _matcher(self, grammar: str, what: str) -> LLMatcher:
        """A fresh one; those used last are kept compiled."""
        if grammar not in self._compiled:
            library = self._words.library
            self._compiled[grammar] = _with_stack(lambda: _compile(library, grammar, what))
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return self._compiled[grammar].deep_copy()

    def _at_start(self, prompt: Items[int]) -> bool:
        decoder = self._tokenizer.stream()
        for token in prompt:
            if token < self._tokenizer.vocab_size:
                decoder.push(token)
        if decoder.within_character:
            raise InputError(
                "the prompt ends within a character, and a constrained answer cannot complete it"
            )
        return decoder.at_start


class Words:
    """A vocabulary as constraints see it: the bytes that each token adds to a text.

    To the model's ids are added one for each token that may lose its leading space, with what remains of it,
    and one that ends a text in the library's own eyes.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Items[int]) -> None:
        vocabulary = tokenizer.codec.vocabulary
        silent = {*vocabulary.specials.values(), vocabulary.unk_id, *end_ids}
        texts = [b"" if i in silent else bytes(text) for i, text in enumerate(vocabulary.texts[:vocab_size])]
        texts += [b""] * (vocab_size - len(texts))
        strips = vocabulary.leading_space != "none"
        spaced = [i for i, x in enumerate(texts) if strips and x[:1] == b" " and i not in vocabulary.raw]
        rests = {i: texts[i][1:] for i in spaced}
        self.vocab_size = vocab_size
        self.spaced_ids = np.array([i for i in spaced if rests[i]], dtype=np.int64)
        self.stripped = {int(i): vocab_size + n for n, i in enumerate(self.spaced_ids)}
        self.bare = frozenset(i for i in spaced if not rests[i])
        self.bare_ids = np.array(sorted(self.bare), dtype=np.int64)
        self.strips_all = vocabulary.strips == "all"
        self.ends = frozenset(i for i in end_ids if i < vocab_size)
        self.end_ids = np.array(sorted(self.ends), dtype=np.int64)
        self.only_ends = torch.zeros(vocab_size, dtype=torch.bool)  # (V,)
        self.only_ends[self.end_ids] = True
        self._texts = [*texts, *(rests[i] for i in self.stripped), b"<end>"]
        has_text = np.array([bool(text) for text in self._texts[:-1]] + [False])
        self.text_bits = _packed(has_text)

    @cached_property
    def library(self) -> LLTokenizer:
        """The same for llguidance.

        Raises:
            MissingExtraError: it is not installed.
        """
        try:
            from llguidance import LLTokenizer
        except ImportError:
            raise MissingExtraError("llguidance", "serve") from None
        return LLTokenizer(_Vocabulary(self._texts))  # type: ignore[arg-type]


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, texts: list[bytes]) -> None:
        self.tokens = texts
        self.eos_token_id = len(texts) - 1
        self.special_token_ids = [self.eos_token_id]
        self._single = {text: i for i, text in enumerate(texts) if len(text) == 1}

    def __call__(self, text: str | bytes) -> list[int]:
        """Some ids that write the text; only forced text is asked for, and none is."""
        data = text.encode() if isinstance(text, str) else text
        return [self._single[bytes([byte])] for byte in data if bytes([byte]) in self._single]


def _packed(bits: np.ndarray) -> np.ndarray:
    """Bits in the order and the whole 32-bit words that llguidance has them in."""
    return np.packbits(np.pad(bits, (0, -len(bits) % 32)), bitorder="little")


def _with_stack(call: Callable[[], LLMatcher]) -> LLMatcher:
    """What a call gives that needs STACK: a stack that runs out would end the process."""
    before = threading.stack_size(STACK)
    try:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(call).result()
    finally:
        threading.stack_size(before)


def _compile(library: LLTokenizer, grammar: str, what: str) -> LLMatcher:
    """A matcher at its beginning.

    Raises:
        InputError: the grammar is malformed or cannot be satisfied.
    """
    from llguidance import LLMatcher, LLParserLimits

    source = LLMatcher.grammar_from_lark(grammar)
    limits = LLParserLimits(**LIMITS | NARROWER.get(what, {}))  # type: ignore[arg-type]
    matcher = LLMatcher(library, source, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()  # what shows only now: a grammar without a finite sentence
    if matcher.get_error().startswith("NoExtension"):
        raise InputError(_NOTHING.format(what))
    if matcher.is_error():
        raise InputError(f"{what} cannot be used: {_line(matcher.get_error())}")
    return matcher


def beginning(params: SamplingParams, texts: Items[str]) -> str | None:
    """The first of some texts that an answer held to what is asked for may begin with; None: with none.

    This is said of all vocabularies that can write the text.

    Raises:
        InputError: what is asked for is malformed, cannot be satisfied, or is too complex.
        MissingExtraError: llguidance is not installed.
    """
    found = described(params)
    assert found is not None, "nothing is asked for"
    try:
        from llguidance import LLTokenizer
    except ImportError:
        raise MissingExtraError("llguidance", "serve") from None
    what, grammar = found
    matcher = _with_stack(lambda: _compile(LLTokenizer("byte"), grammar, what))
    return next((text for text in texts if _follows(matcher.deep_copy(), text.encode())), None)


def _follows(matcher: LLMatcher, text: bytes) -> bool:
    return bool(matcher.try_consume_tokens(list(text)) == len(text))


def _line(message: str) -> str:
    """What is meaningful in one of llguidance's messages, less the place in a text that we wrote."""
    lines = [line.strip() for line in message.splitlines()]
    chosen = [line for line in lines if line.startswith("error: ")] or [line for line in lines if line]
    line = _OURS.sub("", chosen[0]) if chosen else "no reason given"
    return printable(line, 300)

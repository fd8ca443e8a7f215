"""Whether two tokenizers write and read every text alike, and two chat templates every conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from puna.errors import TokenizerError
from puna.formats.proof.texts import CONVERSATIONS, HARD, TEXT, Conversation
from puna.tokenizer.chat import render
from puna.tokenizer.codec import ParseOptions
from puna.tokenizer.tokenizer import Tokenizer

_SHOWN = 60  # characters of a text, or ids of it, in a report
_NAMES = 32  # special tokens that are looked for in texts: each search takes time by their number


@dataclass(frozen=True)
class Agreement:
    """`first` names the first token or text that differs and what each makes of it.

    `tokens` are compared by the bytes that each id writes and by whether it is special; `strings` by their
    ids, the text of every token among them. `template` is "equal", "different", "only the first has one",
    "only the second has one" or "neither"; `rendered` names the first conversation that differs. `notes` are
    what differs and changes no text.
    """

    tokens: int
    tokens_equal: int
    strings: int
    equal: int
    template: str
    first: str | None
    rendered: str | None
    notes: tuple[str, ...] = ()

    @property
    def tokenizers_differ(self) -> bool:
        """Whether a token or a text is not the same in both."""
        return self.equal < self.strings or self.tokens_equal < self.tokens

    @property
    def template_differs(self) -> bool:
        """Whether a conversation is not the same in both."""
        return self.template not in ("equal", "neither")

    @property
    def holds(self) -> bool:
        """Whether nothing that decides ids differs."""
        return not self.tokenizers_differ and not self.template_differs

    def as_dict(self) -> dict[str, Any]:
        """Everything by name."""
        return {**asdict(self), "notes": list(self.notes)}


@dataclass(frozen=True)
class _Compared:
    """How many were compared and differ, and the first that does."""

    count: int
    differ: int = 0
    first: str | None = None


def agreement(a: Tokenizer, b: Tokenizer) -> Agreement:
    """Compare two tokenizers on every token, on texts, and on conversations."""
    tokens, texts = _Compared(min(a.vocab_size, b.vocab_size)), _Compared(0)
    if a.fingerprint != b.fingerprint:  # equal ones give equal ids
        tokens, texts = _tokens(a, b), _token_texts(a, b)
    strings = _strings(a, b)
    template, rendered, note = _templates(a, b)
    ends = f"tokens that end an answer: {list(a.end_ids)} and {list(b.end_ids)}"
    return Agreement(
        tokens.count,
        tokens.count - tokens.differ,
        texts.count + strings.count,
        texts.count + strings.count - texts.differ - strings.differ,
        template,
        tokens.first or strings.first or texts.first,
        rendered,
        (*([ends] if set(a.end_ids) != set(b.end_ids) else []), *([note] if note else [])),
    )


def _tokens(a: Tokenizer, b: Tokenizer) -> _Compared:
    """What each id writes, and of what kind it is, but for how an unknown character is shown."""
    first, second = a.codec.vocabulary, b.codec.vocabulary
    count = min(len(first.texts), len(second.texts))
    differ = {index for index in range(count) if first.texts[index] != second.texts[index]}
    differ |= set(first.specials.values()) ^ set(second.specials.values())
    differ |= first.raw ^ second.raw
    differ = {index for index in differ - {a.unk_id, b.unk_id} if index < count}
    if not differ:
        return _Compared(count)
    at = min(differ)
    words = f"token {at} is {_described(a, at)} and {_described(b, at)}"
    return _Compared(count, len(differ), words)


def _described(tokenizer: Tokenizer, index: int) -> str:
    text = tokenizer.token_bytes(index)
    special = "special " if index in tokenizer.specials.values() else ""
    return f"{special}{'byte ' if tokenizer.is_byte(index) else ''}{text.decode(errors='backslashreplace')!r}"


def _token_texts(a: Tokenizer, b: Tokenizer) -> _Compared:
    """The text of every token of both, as far as it is text."""
    spelled = dict.fromkeys((*a.codec.vocabulary.texts, *b.codec.vocabulary.texts))
    texts = [text for each in spelled if (text := _text(each)) is not None]
    # To hand so short a text to another thread takes longer than to encode it.
    ids, others = (tokenizer.encode_batch(texts, bos=False, threads=1) for tokenizer in (a, b))
    if ids == others:
        return _Compared(len(texts))
    differ = [i for i in range(len(texts)) if ids[i] != others[i]]
    at = differ[0]
    words = f"{_short(texts[at])} is {_cut(ids[at])} and {_cut(others[at])}"
    return _Compared(len(texts), len(differ), words)


def _text(spelled: bytes) -> str | None:
    try:
        return spelled.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _strings(a: Tokenizer, b: Tokenizer) -> _Compared:
    """Texts, with and without the special tokens in them, there and back."""
    found = [_difference(a, b, text) for text in _texts(a, b)]
    differ = [each for each in found if each is not None]
    return _Compared(len(found), len(differ), differ[0] if differ else None)


def _texts(a: Tokenizer, b: Tokenizer) -> Iterator[str]:
    yield from HARD
    yield TEXT
    names = _names(a, b)
    yield from names
    yield " and ".join(names)
    yield "  ".join(f"a{name}b " for name in names)


def _names(a: Tokenizer, b: Tokenizer) -> list[str]:
    """Some special tokens: those first that reach differently far."""
    names = [*dict.fromkeys((*a.specials, *b.specials))]
    plain, reach = ParseOptions(), [t.codec.vocabulary.parse for t in (a, b)]
    odd = [name for name in names if reach[0].get(name, plain) != reach[1].get(name, plain)]
    step = max(1, len(names) // _NAMES)
    return [*dict.fromkeys((*odd[:_NAMES], *names[::step], *names[-1:]))]


def _difference(a: Tokenizer, b: Tokenizer, text: str) -> str | None:
    """In words, None where both write the text alike and read it back alike."""
    for specials in (False, True):
        ids, others = (tokenizer.encode(text, specials=specials) for tokenizer in (a, b))
        if ids != others:
            return f"{_short(text)} is {_cut(ids)} and {_cut(others)}{' with specials' if specials else ''}"
        # How an unknown character is shown is no part of most formats, and changes no id.
        known = [index for index in ids if index not in (a.unk_id, b.unk_id)]
        read, other = (_outcome(partial(t.decode, known, specials)) for t in (a, b))
        if read != other:
            return f"{_cut(known)} reads {_short(str(read))} and {_short(str(other))}"
    return None


def _templates(a: Tokenizer, b: Tokenizer) -> tuple[str, str | None, str | None]:
    """How the templates compare, the first conversation that they render differently, and a note."""
    if a.chat_template is None or b.chat_template is None:
        if a.chat_template == b.chat_template:
            return "neither", None, None
        return f"only the {'first' if b.chat_template is None else 'second'} has one", None, None
    for each in CONVERSATIONS:
        ids, others = (_outcome(partial(_rendered, t, each)) for t in (a, b))
        if ids != others:
            words = (
                f"the conversation {_short(str(each.messages))}{_how(each)} is {_cut(ids)} and {_cut(others)}"
            )
            return "different", words, None
    if a.chat_template == b.chat_template:
        return "equal", None, None
    return "equal", None, f"the templates are written differently; {len(CONVERSATIONS)} conversations alike"


def _rendered(tokenizer: Tokenizer, each: Conversation) -> list[int]:
    return render(
        tokenizer,
        each.messages,
        add_generation_prompt=each.add_generation_prompt,
        variables=each.variables,
    )


def _how(each: Conversation) -> str:
    """What the template was given besides the messages, where that is not the usual."""
    names = ", ".join(each.variables)
    prompt = "" if each.add_generation_prompt else " without a generation prompt"
    return prompt + (f" with {names}" if names else "")


def _outcome(act: Callable[[], Any]) -> Any:
    """What comes of it; a refusal is an outcome too, and both must refuse."""
    try:
        return act()
    except TokenizerError:
        return "refused"


def _short(text: str) -> str:
    return repr(text) if len(text) <= _SHOWN else f"{text[:_SHOWN]!r}…"


def _cut(ids: Any) -> str:
    return str(ids) if isinstance(ids, str) or len(ids) <= _SHOWN else f"{str(ids[:_SHOWN])[:-1]}, …]"

"""Whether two tokenizers write and read every text alike, and two chat templates every conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from puna.errors import TokenizerError
from puna.formats.proof.texts import CONVERSATIONS, HARD, TEXT
from puna.tokenizer.chat import render
from puna.tokenizer.tokenizer import Tokenizer

_SHOWN = 60  # characters of a text, or ids of it, in a report


@dataclass(frozen=True)
class Agreement:
    """`first` names the first text that differs and what each makes of it.

    `template` is "equal", "different", "only the first has one", "only the second has one" or "neither".
    `notes` are what differs and changes no text: which tokens end an answer.
    """

    strings: int
    equal: int
    template: str
    first: str | None
    notes: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether nothing that decides ids differs."""
        return self.equal == self.strings and self.template in ("equal", "neither")

    def as_dict(self) -> dict[str, Any]:
        """Everything by name."""
        return {
            "strings": self.strings,
            "equal": self.equal,
            "first": self.first,
            "template": self.template,
            "notes": list(self.notes),
        }


def agreement(a: Tokenizer, b: Tokenizer) -> Agreement:
    """Compare two tokenizers on hard strings, on the text of every special token, and on conversations."""
    first, equal, strings = _end(a, b), 0, 0
    for text in _texts(a, b):
        found = _difference(a, b, text)
        strings, equal = strings + 1, equal + (found is None)
        first = first or found
    template, differs = _templates(a, b)
    ends = (f"tokens that end an answer: {list(a.end_ids)} and {list(b.end_ids)}",)
    return Agreement(
        strings, equal, template, first or differs, ends if set(a.end_ids) != set(b.end_ids) else ()
    )


def _texts(a: Tokenizer, b: Tokenizer) -> Iterator[str]:
    yield from HARD
    yield TEXT
    names = [*dict.fromkeys((*a.specials, *b.specials))]
    yield from names
    yield " and ".join(names)


def _end(a: Tokenizer, b: Tokenizer) -> str | None:
    """What ends a text; what begins it is seen where the empty string is encoded."""
    if a.eos_id == b.eos_id:
        return None
    return f"the end of a text is token {a.eos_id} and {b.eos_id}"


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


def _templates(a: Tokenizer, b: Tokenizer) -> tuple[str, str | None]:
    """How the templates compare, and the first conversation that they render differently."""
    if a.chat_template is None or b.chat_template is None:
        if a.chat_template == b.chat_template:
            return "neither", None
        return f"only the {'first' if b.chat_template is None else 'second'} has one", None
    for messages in CONVERSATIONS:
        ids, others = (_outcome(partial(render, t, messages)) for t in (a, b))
        if ids != others:
            return "different", f"the conversation {_short(str(messages))} is {_cut(ids)} and {_cut(others)}"
    return "equal", None


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

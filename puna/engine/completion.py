"""What a user gets back: the text and tokens of an answer, and why it ended."""

from __future__ import annotations

from dataclasses import dataclass

from puna.engine.answer import Answer, Track
from puna.engine.params import TokenLogprobs
from puna.engine.sequence import FinishReason


@dataclass(frozen=True)
class Completion:
    """An answer.

    `text` is the new text only, with its leading space and without end token or stop string; it is empty
    where the model has no tokenizer. `tokens` are all that the model produced, those included that ended the
    answer. `finish_reason` is "stop" for an end token, a stop string or a satisfied constraint, "length" for
    `max_new_tokens` or the end of the context, "cancelled" where it was given up. `prompt_tokens` are those
    that were used; the oldest `dropped` ones were left out where the prompt was truncated. `logprobs` has an
    entry for every token, `prompt_logprobs` for every token of the prompt (None for the first, which nothing
    comes before), where they were asked for. `alternatives` are the other answers where `n` asks for several.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    dropped: int = 0
    alternatives: tuple[Completion, ...] = ()


def completion(answer: Answer) -> Completion:
    """A finished answer, its alternatives inside it.

    Raises:
        Exception: what ended the answer, where something did.
    """
    if answer.error is not None:
        raise answer.error
    first, *others = answer.chosen
    return _completion(first, tuple(_completion(track) for track in others))


def _completion(track: Track, alternatives: tuple[Completion, ...] = ()) -> Completion:
    sequence = track.sequence
    assert sequence.finish_reason is not None
    params = track.answer.request.params
    prompt_logprobs = track.answer.tracks[0].sequence.prompt_logprobs
    return Completion(
        "".join(track.pieces),
        tuple(sequence.tokens),
        sequence.finish_reason,
        sequence.prompt,
        None if params.logprobs is None else tuple(sequence.logprobs),
        None if params.prompt_logprobs is None else tuple(prompt_logprobs),
        sequence.dropped,
        alternatives,
    )

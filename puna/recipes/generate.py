"""Continue the prompts of a command line: one as it is made, several together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from puna.engine.completion import Completion
from puna.engine.llm import LLM
from puna.engine.params import SamplingParams, TokenLogprobs
from puna.settings import parse

Write = Callable[[str], None]


def generate(llm: LLM, prompts: list[str], sampling: dict[str, Any], write: Write) -> dict[str, Any]:
    """Continue each prompt; a single answer streams as it is made.

    Raises:
        InputError: impossible sampling settings, or a prompt that does not fit.
    """
    params = parse(SamplingParams, sampling, "sampling")
    several = len(prompts) > 1 or params.n > 1 or params.best_of is not None
    if several or params.logprobs is not None or params.prompt_logprobs is not None:
        return _all_at_once(llm, prompts, sampling, write)
    answer = llm.stream(prompts[0], **sampling)  # says what is wrong before anything is written
    write(prompts[0])
    pieces = []
    for piece in answer:
        write(piece)
        pieces.append(piece)
    write("\n")
    text = "".join(pieces)
    return {"completions": [{"prompt": prompts[0], "text": text, "finish_reason": answer.finish_reason}]}


def _all_at_once(llm: LLM, prompts: list[str], sampling: dict[str, Any], write: Write) -> dict[str, Any]:
    completions = llm.generate(prompts, **sampling)
    for prompt, completion in zip(prompts, completions, strict=True):
        for one in (completion, *completion.alternatives):
            write(f"{prompt}{one.text}\n{'-' * 40}\n")
    answers = zip(prompts, completions, strict=True)
    return {"completions": [{"prompt": prompt, **answered(completion)} for prompt, completion in answers]}


def answered(completion: Completion) -> dict[str, Any]:
    """An answer as JSON says it; log-probabilities and alternatives only where they were asked for."""
    said: dict[str, Any] = {
        "text": completion.text,
        "tokens": list(completion.tokens),
        "finish_reason": completion.finish_reason,
    }
    if completion.dropped:
        said["dropped"] = completion.dropped
    if completion.logprobs is not None:
        said["logprobs"] = [_logprob(entry) for entry in completion.logprobs]
    if completion.prompt_logprobs is not None:
        said["prompt_logprobs"] = [entry and _logprob(entry) for entry in completion.prompt_logprobs]
    if completion.alternatives:
        said["alternatives"] = [answered(other) for other in completion.alternatives]
    return said


def _logprob(entry: TokenLogprobs) -> dict[str, Any]:
    return {"token": entry.token, "logprob": entry.logprob, "top": [list(pair) for pair in entry.top]}

"""Continue the prompts of a command line: one as it is made, several together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from puna.engine.completion import Completion
from puna.engine.llm import LLM
from puna.engine.params import SamplingParams, TokenLogprobs
from puna.errors import PunaError
from puna.recipes.answering.options import chosen_seed, seed_of
from puna.settings import parse

Write = Callable[[str], None]


def generate(
    llm: LLM, prompts: list[str], sampling: Mapping[str, Any], write: Write, note: Write
) -> dict[str, Any]:
    """Continue each prompt; a single answer streams as it is made. `note` takes what a user should know.

    Raises:
        InputError: impossible sampling settings, or a prompt that does not fit.
    """
    params = parse(SamplingParams, sampling, "sampling")
    first = chosen_seed(params.seed)
    each = [{**sampling, "seed": seed_of(first, number)} for number in range(1, len(prompts) + 1)]
    if len(prompts) == 1 and params.answers == 1:
        completions = [_streamed(llm, prompts[0], each[0], write)]
    else:
        completions = _together(llm, prompts, each, write)
    records = []
    for number, (prompt, own, completion) in enumerate(zip(prompts, each, completions, strict=True), 1):
        which = "" if len(prompts) == 1 else f"prompt {number}: "
        for remark in remarks(completion, params):
            note(f"note: {which}{remark}")
        records.append({"prompt": prompt, "seed": own["seed"], **answered(completion)})
    return {"completions": records}


def _streamed(llm: LLM, prompt: str, sampling: dict[str, Any], write: Write) -> Completion:
    stream = llm.stream(prompt, **sampling)  # says what is wrong before anything is written
    write(prompt)
    for piece in stream:
        write(piece)
    write("\n")
    return stream.completion()


def _together(llm: LLM, prompts: list[str], each: list[dict[str, Any]], write: Write) -> list[Completion]:
    done: dict[int, Completion] = {}
    for number, outcome in llm.completions(zip(prompts, each, strict=True)):
        if isinstance(outcome, PunaError):
            raise outcome
        done[number] = outcome
    completions = [done[number] for number in range(len(prompts))]
    for prompt, completion in zip(prompts, completions, strict=True):
        for one in (completion, *completion.alternatives):
            write(f"{prompt}{one.text}\n{'-' * 40}\n")
    return completions


def remarks(completion: Completion, params: SamplingParams) -> Iterator[str]:
    """What an answer does not show by itself."""
    if completion.dropped:
        yield f"the prompt was too long; its oldest {completion.dropped:,} tokens were left out"
    for one in (completion, *completion.alternatives):
        if is_incomplete(one, params):
            yield (
                f"the answer was cut at {len(one.tokens):,} tokens, before it was complete; raise "
                "max_new_tokens, or bind it closer"
            )


def is_incomplete(completion: Completion, params: SamplingParams) -> bool:
    """Whether the limit cut an answer that a constraint says the whole form of."""
    return params.constrained and completion.finish_reason == "length"


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

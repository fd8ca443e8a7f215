"""Continue a prompt, or hold a conversation, in the terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from puna.engine.llm import LLM, Completion
from puna.errors import InputError

Write = Callable[[str], None]


def generate(llm: LLM, prompts: list[str], sampling: dict[str, Any], write: Write) -> dict[str, Any]:
    """Continue each prompt; a single one streams as it is made.

    Raises:
        InputError: impossible sampling settings, or a prompt that does not fit.
    """
    if len(prompts) == 1 and "logprobs" not in sampling:
        answer = llm.stream(prompts[0], **sampling)  # says what is wrong before anything is written
        write(prompts[0])
        pieces = []
        for piece in answer:
            write(piece)
            pieces.append(piece)
        write("\n")
        return {"completions": [{"prompt": prompts[0], "text": "".join(pieces)}]}
    completions = llm.generate(prompts, **sampling)
    for prompt, completion in zip(prompts, completions, strict=True):
        write(f"{prompt}{completion.text}\n{'-' * 40}\n")
    return {
        "completions": [
            {
                "prompt": prompt,
                "text": completion.text,
                "tokens": list(completion.tokens),
                "finish_reason": completion.finish_reason,
                **_logprobs(completion),
            }
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
    }


def _logprobs(completion: Completion) -> dict[str, Any]:
    """One entry for every token, where they were asked for."""
    if completion.logprobs is None:
        return {}
    return {
        "logprobs": [
            {"token": entry.token, "logprob": entry.logprob, "top": [list(pair) for pair in entry.top]}
            for entry in completion.logprobs
        ]
    }


def chat(
    llm: LLM,
    sampling: dict[str, Any],
    system: str | None,
    template: str | None,
    read: Callable[[], str | None],
    write: Write,
) -> None:
    """Read a line, answer it with everything said before, until an empty line or the end of input.

    Raises:
        InputError: the model has no chat template and none was named.
    """
    history: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    while line := read():
        history.append({"role": "user", "content": line})
        pieces = []
        try:
            for piece in llm.stream_chat(history, template=template, **sampling):
                write(piece)
                pieces.append(piece)
        except InputError as error:
            # The conversation outgrew the context: say so, and let the user go on with a new one.
            if len(history) <= 2:
                raise
            write(f"[{error}; starting a new conversation]\n")
            del history[1 if system else 0 :]
            continue
        write("\n")
        history.append({"role": "assistant", "content": "".join(pieces)})

"""What a model writes while it learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from puna.engine.llm import LLM
from puna.errors import InputError, SettingsError
from puna.model.llama import Llama
from puna.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sample:
    """A prompt and what the model went on with."""

    prompt: str
    text: str


def check_prompts(model: Llama, tokenizer: Tokenizer, prompts: Sequence[str]) -> None:
    """Raises SettingsError where the model cannot go on from a prompt."""
    llm = LLM(model, tokenizer)
    for prompt in prompts:
        try:
            llm.stream(prompt)  # nothing is computed before the first piece is asked for
        except InputError as error:
            raise SettingsError(f"samples.prompts: {error}") from None


def write_samples(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    new_tokens: int,
    temperature: float,
    seed: int,
) -> list[Sample]:
    """One continuation of each prompt; the same model and seed write the same text."""
    llm = LLM(model, tokenizer)
    completions = llm.generate(
        list(prompts), max_new_tokens=new_tokens, temperature=temperature, top_p=0.95, seed=seed
    )
    return [Sample(prompt, answer.text) for prompt, answer in zip(prompts, completions, strict=True)]

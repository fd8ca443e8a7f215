"""What a model writes while it learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from puna.engine.llm import LLM
from puna.model.llama import Llama
from puna.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sample:
    """A prompt and what the model went on with."""

    prompt: str
    text: str


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

"""What a constraint costs: the vocabulary once, each constraint once, and every token.

    python benchmarks/constraints.py TOKENIZER... [--tokens 2000]

The answer is drawn at random from what is allowed; a token's cost is going on by it (`accept`) and finding
what may come next (`allowed`). Where an answer is complete, the next begins. One thread, one line for each.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import puna.tokenizer
from puna.engine.constraints import Grammars
from puna.engine.params import SamplingParams

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "mail": {"type": "string", "pattern": "^[a-z.]+@[a-z]+[.](com|org)$"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 5},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street", "zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "address"],
    "additionalProperties": False,
}
CASES: dict[str, dict[str, Any]] = {
    "any object": {"json_schema": True},
    "person": {"json_schema": PERSON},
    "regex": {"regex": r"[A-Z]\w+( \w+){2,20}\."},
    "digits": {"regex": r"\d{3}-\d{3}-\d{4}"},
    "choice": {"choice": [f"label number {i}" for i in range(1000)]},
    "grammar": {"grammar": 'start: sum\nsum: term (("+" | "-") term)*\nterm: /[0-9]{1,9}/ | "(" sum ")"'},
}


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    for path in options.tokenizers:
        tokenizer = puna.tokenizer.load(path)
        grammars = Grammars(tokenizer, tokenizer.vocab_size, tokenizer.end_ids)
        prompt = tokenizer.encode("Answer:")
        began = time.perf_counter()
        grammars.constraint(SamplingParams(regex="first"), prompt)
        first = time.perf_counter() - began
        print(json.dumps({"tokenizer": str(path), "V": tokenizer.vocab_size, "first use s": round(first, 3)}))
        for name, fields in CASES.items():
            print(
                json.dumps({"constraint": name, **_measure(grammars, fields, prompt, options.tokens)}),
                flush=True,
            )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokenizers", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=2000)
    return parser.parse_args()


def _measure(grammars: Grammars, fields: dict[str, Any], prompt: list[int], tokens: int) -> dict[str, float]:
    """Milliseconds to compile and to begin again, microseconds per token."""
    params = SamplingParams(**fields)
    began = time.perf_counter()
    constraint = grammars.constraint(params, prompt)
    compiled = time.perf_counter()
    grammars.constraint(params, prompt)
    ended = time.perf_counter()
    ms_compile, ms_again = (round(x * 1e3, 2) for x in (compiled - began, ended - compiled))
    generator = random.Random(0)
    costs = []
    while len(costs) < tokens:
        assert constraint is not None
        token = int(generator.choice(constraint.allowed().nonzero()[:, 0]))
        began = time.perf_counter()
        constraint.accept(token)
        constraint.allowed()
        costs.append(time.perf_counter() - began)
        if constraint.complete:
            constraint = grammars.constraint(params, prompt)
    costs.sort()
    return {
        "compile ms": ms_compile,
        "begin again ms": ms_again,
        "median us": round(statistics.median(costs) * 1e6, 1),
        "p99 us": round(costs[int(0.99 * len(costs))] * 1e6, 1),
        "most us": round(costs[-1] * 1e6, 1),
    }


if __name__ == "__main__":
    main()

"""`puna serve` beside llama.cpp's `llama-server` and `transformers serve`, on equal terms in one run.

    python benchmarks/serving.py DIRECTORY --tokenizer FILE --llama-server PROGRAM
        [--transformers-python PYTHON] [--preset puna-110m] [--format bfloat16] [--clients 1 4 16]
        [--rates 0.5] [--requests 32] [--prompt 16 256] [--new 16 128] [--rounds 3] [--threads N]
        [--parallel 16] [--who puna llama-server transformers]

Writes a model of random weights to DIRECTORY (where it is not there already) as a Hugging Face directory and
as a GGUF file, both with the tokenizer in FILE, whose vocabulary must be the preset's (that of Llama 2 for
those of 32,000), then starts a server of each program with the same weights in the same format, one of
benchmarks/same_weights.py (transformers: bfloat16 and float32 only), and as many threads. All get the same
requests from the same client: prompts of words, greedy streams, answers of a number of tokens that nothing
ends early. They take turns, and those that wait are stopped meanwhile (SIGSTOP); what is compared is the same
round's. Times are the client's: to the first text, and from one token to the next.

- puna: `puna serve` with its defaults, so that answers do not depend on each other.
- llama-server: continuous batching, its default, in so many slots (`--parallel`); keys and values in float16,
  its default; no cache of prompts, since none comes twice. Built from the source inside llama-cpp-python's
  source package, for this processor:
      cmake -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON && cmake --build build --target llama-server
- transformers: `transformers serve --continuous-batching`; transformers-alone: without that option, so that
  requests are answered one after another. They need fastapi, uvicorn, openai and accelerate; the Python that
  has them may be another one than this (`--transformers-python`).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from same_weights import FORMATS, Weights

from puna import tokenizer
from puna.plan.measure import measure_reading
from puna.recipes.bench.figures import percentile
from puna.recipes.bench.load import Load, answered
from puna.recipes.bench.load_generator import Outcome, Target, completion
from puna.recipes.bench.server_process import ServerProcess, free_port, running
from puna.train.run import environment

CPU = torch.device("cpu")
SHARES = (0.5, 0.95, 0.99)
WARM = 4  # tokens of the answers of a round that does not count
BLOCK = 256  # to a multiple of which llama-server rounds the length of a slot


@dataclass(frozen=True)
class Program:
    """How a server is started on a port, where it says that it is ready, what its requests have besides."""

    command: Callable[[argparse.Namespace, int], list[str]]
    ready: str
    fields: dict[str, Any] = field(default_factory=dict)


def puna(options: argparse.Namespace, port: int) -> list[str]:
    model, waiting = str(_served(options)), f"max_waiting={max(options.requests, *options.clients)}"
    command = [sys.executable, "-m", "puna", "serve", model, waiting, "--port", str(port)]
    return [*command, "--device", "cpu", "--dtype", options.weights.dtype]


def llama_server(options: argparse.Namespace, port: int) -> list[str]:
    slot = -(-_longest(options) // BLOCK) * BLOCK
    command = [options.llama_server, "-m", str(options.weights.gguf)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--no-webui", "--cache-ram", "0"]
    command += ["--parallel", str(options.parallel), "-c", str(options.parallel * slot)]
    command += ["-t", str(options.threads), "-tb", str(options.threads)]
    return command + (["-ctk", "f32", "-ctv", "f32"] if options.format == "float32" else [])


def transformers(options: argparse.Namespace, port: int) -> list[str]:
    blocks = -(-_longest(options) // BLOCK) * options.parallel
    return [*transformers_alone(options, port), "--continuous-batching", "--cb-block-size", str(BLOCK),
            "--cb-num-blocks", str(blocks)]  # fmt: skip


def transformers_alone(options: argparse.Namespace, port: int) -> list[str]:
    command = [options.transformers_python, "-m", "transformers.cli.transformers", "serve"]
    command += [str(options.directory / "hf"), "--device", "cpu"]
    return [*command, "--dtype", options.format, "--host", "127.0.0.1", "--port", str(port)]


# No token has the id -1: none ends an answer.
GREEDY = {"generation_config": json.dumps({"do_sample": False, "eos_token_id": -1, "pad_token_id": 0})}
PROGRAMS = {
    "puna": Program(puna, "/ready", {"ignore_eos": True}),
    "llama-server": Program(llama_server, "/health", {"ignore_eos": True, "cache_prompt": False}),
    "transformers": Program(transformers, "/health", GREEDY),
    "transformers-alone": Program(transformers_alone, "/health", GREEDY),
}


@dataclass(frozen=True)
class Task:
    """Prompts with the lengths of their answers, and how they come: from clients, or at times."""

    prompts: list[str]
    new: list[int]
    load: Load
    seed: str

    def run(self, target: Target, fields: dict[str, Any]) -> list[Outcome]:
        pairs = zip(self.prompts, self.new, strict=True)
        queries = [completion(prompt, new, temperature=0, **fields) for prompt, new in pairs]
        return answered(target, queries, self.load, self.seed)


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    _make(options)
    hidden = ("directory", "tokenizer", "weights")
    about = {name: str(value) for name, value in vars(options).items() if name not in hidden}
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "transformers", "llama_cpp_python")
    }
    print(json.dumps({**about, **environment(CPU), "versions": versions}), flush=True)
    words = _words(options.tokenizer)
    with _servers(options) as servers:
        for clients in options.clients:
            _compare(options, servers, words, Load(clients=clients))
        for rate in options.rates:
            _compare(options, servers, words, Load(rate=rate))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--llama-server", default="llama-server")
    parser.add_argument("--transformers-python", default=sys.executable)
    parser.add_argument("--preset", default="puna-110m")
    parser.add_argument("--format", default="bfloat16", choices=FORMATS)
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--rates", type=float, nargs="*", default=[])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, nargs=2, default=[16, 256])
    parser.add_argument("--new", type=int, nargs=2, default=[16, 128])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--parallel", type=int, default=16)
    parser.add_argument(
        "--who", nargs="+", choices=PROGRAMS, default=["puna", "llama-server", "transformers"]
    )
    options = parser.parse_args()
    if options.format not in ("bfloat16", "float32"):
        options.who = [name for name in options.who if not name.startswith("transformers")]
    options.weights = Weights(options.directory, options.format)
    return options


def _longest(options: argparse.Namespace) -> int:
    """Tokens of a request, with some room: a word may be more than one."""
    return int(options.prompt[1] * 1.25) + options.new[1] + 8


def _make(options: argparse.Namespace) -> None:
    options.weights.make(options.preset, _longest(options), options.tokenizer)
    rounded = _served(options)
    if options.weights.quantize is not None and not rounded.exists():
        options.weights.load().save(rounded)


def _served(options: argparse.Namespace) -> Path:
    """What Puna serves: a command opens what is on disk, and so what is rounded is saved first."""
    return options.weights.puna if options.weights.quantize is None else options.directory / options.format


def _words(path: Path) -> list[str]:
    """The vocabulary's words, which are a token each where nothing stands before them but a space."""
    vocabulary = tokenizer.load(path)
    texts = (vocabulary.decode([index], continuation=True) for index in range(vocabulary.vocab_size))
    found = {text[1:] for text in texts if text[:1] == " " and len(text) > 2 and text[1:].isascii()}
    return sorted(word for word in found if word.isalpha())


@contextlib.contextmanager
def _servers(options: argparse.Namespace) -> Iterator[dict[str, ServerProcess]]:
    """A server of each program, stopped until its turn comes."""
    unset = ("PUNA_API_KEYS",)
    surroundings = {name: value for name, value in os.environ.items() if name not in unset}
    surroundings |= {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    with contextlib.ExitStack() as stack:
        servers = {}
        for name in options.who:
            program, port, log = PROGRAMS[name], free_port(), options.directory / f"{name}.log"
            command = program.command(options, port)
            servers[name] = stack.enter_context(running(command, port, log, surroundings, program.ready))
            servers[name].pause()
        yield servers


def _compare(
    options: argparse.Namespace, servers: dict[str, ServerProcess], words: list[str], load: Load
) -> None:
    """Print a row for each program: medians of its rounds, and what Puna reaches of it in the same round."""
    rounds, reading = [], []
    for number in range(options.rounds + 1):
        task = _task(options, words, load, number)
        order = list(servers) if number % 2 else list(reversed(servers))
        results = {name: _turn(servers[name], task, PROGRAMS[name].fields) for name in order}
        if number:
            rounds.append(results)
            reading.append(measure_reading(CPU).rate)
    told = {"clients": load.clients} if load.rate is None else {"requests/s": load.rate}
    for name in servers:
        row = told | {"program": name} | _figures([results[name] for results in rounds])
        if "puna" in servers and name != "puna":
            row |= _beside([(results["puna"], results[name]) for results in rounds])
        print(json.dumps(row), flush=True)
    print(json.dumps({**told, "memory read, GB/s, by round": [round(r / 1e9) for r in reading]}), flush=True)


def _task(options: argparse.Namespace, words: list[str], load: Load, number: int) -> Task:
    """Round 0 is to warm up: two requests for each client, with short answers."""
    count = max(options.requests, 2 * (load.clients or 1)) if number else 2 * (load.clients or 4)
    draw = random.Random(f"{load.clients} {load.rate} {number}")
    prompts = [" ".join(draw.choices(words, k=draw.randint(*options.prompt))) for _ in range(count)]
    new = [draw.randint(*options.new) if number else WARM for _ in range(count)]
    return Task(prompts, new, load, f"arrivals {number}")


def _turn(server: ServerProcess, task: Task, fields: dict[str, Any]) -> list[Outcome]:
    server.go_on()
    outcomes = task.run(server.target, fields)
    server.pause()
    for one, new in zip(outcomes, task.new, strict=True):
        if one.error is not None or one.tokens != new:
            raise SystemExit(f"{server.process.args}: {one.error or f'{one.tokens} tokens, not {new}'}")
    return outcomes


def _figures(rounds: Sequence[Sequence[Outcome]]) -> dict[str, Any]:
    """Tokens per second, the median of the rounds; times over all their requests, in milliseconds."""
    outcomes = [one for results in rounds for one in results]
    first = [one.first for one in outcomes if one.first is not None]
    each = [one.each for one in outcomes if one.each is not None]
    return {
        "tokens/s": _digits(statistics.median(map(_rate, rounds))),
        "ms to first text, 50/95/99%": [_digits(1000 * percentile(first, share)) for share in SHARES],
        "ms per token, 50/95/99%": [_digits(1000 * percentile(each, share)) for share in SHARES],
        "prompt tokens": sum(one.prompt_tokens for one in outcomes),
        "requests": len(outcomes),
    }


def _beside(rounds: Sequence[tuple[Sequence[Outcome], Sequence[Outcome]]]) -> dict[str, Any]:
    """Puna's rate, and the other's median times, as multiples; how many answers begin alike."""
    ratios = [_rate(ours) / _rate(theirs) for ours, theirs in rounds]
    pairs = [pair for ours, theirs in rounds for pair in zip(ours, theirs, strict=True)]
    return {
        "puna/it": f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        "first text, it/puna": _digits(_median_first(rounds, 1) / _median_first(rounds, 0)),
        "begins like puna's": _digits(
            statistics.mean(_begins(one) == _begins(other) for one, other in pairs)
        ),
    }


def _begins(outcome: Outcome) -> str:
    """Too few characters for roundings to matter; some servers leave out the first space."""
    return outcome.text.lstrip()[:6]


def _median_first(rounds: Sequence[tuple[Sequence[Outcome], ...]], which: int) -> float:
    return statistics.median(one.first for pair in rounds for one in pair[which] if one.first is not None)


def _rate(outcomes: Sequence[Outcome]) -> float:
    seconds = max(one.ended for one in outcomes) - min(one.sent for one in outcomes)
    return sum(one.tokens for one in outcomes) / seconds


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    main()

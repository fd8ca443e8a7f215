"""Puna's engine beside transformers and llama.cpp, on equal terms in one run.

    python benchmarks/decoding.py DIRECTORY [--preset puna-110m] [--dtype bfloat16] [--streams 1 4 16]
                                  [--prompt 64] [--new 64] [--rounds 5] [--threads N] [--who puna llama.cpp]

Writes a model of random weights to DIRECTORY (where it is not there already) as a Hugging Face directory and
as a GGUF file, then gives each program the same weights in the same type, the same prompts as ids, the same
number of greedy tokens and of threads. Each runs in a process of its own that keeps its model; they take
turns, so that whatever disturbs the machine disturbs all alike, and what is compared is the same round's.
Timed are steps in which every stream gets one token; prompts are timed apart, compiling is not.

- puna: the engine with its defaults, so that answers do not depend on each other.
- transformers: a StaticCache, and the decoding step compiled for the number of streams with weights frozen
  (packed for the processor); prompts run eagerly.
- llama.cpp: `llama_decode` on batches of all streams, through llama-cpp-python.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.metadata
import json
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from puna import formats
from puna.formats.convert import convert
from puna.formats.huggingface.directory import HuggingFaceSettings
from puna.model.initial import initial_weights
from puna.model.presets import preset
from puna.plan.measure import measure_reading
from puna.settings import parse
from puna.train.run import environment

WARM = 4  # tokens of a task that is not counted
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Task:
    """Prompts to answer together, with `new` timed tokens each after a first one."""

    prompts: list[list[int]]
    new: int


@dataclass(frozen=True)
class Result:
    """Seconds up to every stream's first token, seconds of the `new` steps after it, and the tokens."""

    prompts: float
    decoding: float
    tokens: list[list[int]]


Run = Callable[[Task], Result]


def puna(options: argparse.Namespace) -> Run:
    """One engine; the prompts of every task are new to it."""
    from puna.engine.answer import Request
    from puna.engine.engine import Engine
    from puna.engine.loading import load
    from puna.engine.params import SamplingParams
    from puna.engine.settings import EngineSettings

    llm = load(options.directory / "hf", dtype=options.dtype, device="cpu")
    llm.pack()
    settings = parse(EngineSettings, {"max_running": max(64, *options.streams)})
    engine = Engine(llm.model, None, llm.context, settings)

    def run(task: Task) -> Result:
        ahead = len(task.prompts)  # streams whose prompts come first go on while the others' are computed
        params = SamplingParams(temperature=0.0, max_new_tokens=task.new + ahead + 1)
        began = time.perf_counter()
        answers = [engine.submit(Request(tuple(prompt), params)) for prompt in task.prompts]
        sequences = [answer.tracks[0].sequence for answer in answers]
        while not all(sequence.tokens for sequence in sequences):
            engine.step()
        ready = time.perf_counter()
        for _ in range(task.new):
            engine.step()
        ended = time.perf_counter()
        assert not any(answer.finished for answer in answers)
        tokens = [list(sequence.tokens) for sequence in sequences]
        for answer in answers:
            engine.cancel(answer)
        return Result(ready - began, ended - ready, tokens)

    return run


def transformers(options: argparse.Namespace) -> Run:
    """The step is compiled once for each number of streams, and each has a cache of its own."""
    import torch._inductor.config
    from transformers import AutoModelForCausalLM, StaticCache

    model = AutoModelForCausalLM.from_pretrained(
        options.directory / "hf", dtype=getattr(torch, options.dtype)
    )
    model.eval()
    length = options.prompt + options.new + WARM + 2
    torch._inductor.config.freezing = (
        True  # weights packed for the processor: 1.7 times as fast with one stream
    )
    compiled = torch.compile(model.forward, dynamic=False, fullgraph=True)
    caches: dict[int, StaticCache] = {}

    @torch.no_grad()
    def run(task: Task) -> Result:
        streams = len(task.prompts)
        cache = caches.setdefault(streams, StaticCache(config=model.config, max_cache_len=length))
        cache.reset()
        began = time.perf_counter()
        ids = torch.tensor(task.prompts)  # (B, T)
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        last = logits[:, -1].argmax(-1, keepdim=True)  # (B, 1)
        made = [last]
        ready = time.perf_counter()
        for step in range(task.new):
            positions = torch.full((streams, 1), ids.shape[1] + step)
            logits = compiled(last, past_key_values=cache, position_ids=positions, use_cache=True).logits
            last = logits[:, -1].argmax(-1, keepdim=True)
            made.append(last)
        ended = time.perf_counter()
        return Result(ready - began, ended - ready, torch.cat(made, dim=1).tolist())

    return run


def llama_cpp(options: argparse.Namespace) -> Run:
    """A context for each number of streams; keys and values in float16, its default, or in float32."""
    import llama_cpp as lib
    import numpy as np

    lib.llama_backend_init()
    lib.llama_log_set(_SILENT, ctypes.c_void_p(0))
    path = options.directory / f"{options.dtype}.gguf"
    model = lib.llama_model_load_from_file(bytes(path), lib.llama_model_default_params())
    size = preset(options.preset).vocab_size
    length = options.prompt + options.new + WARM + 2
    contexts: dict[int, Any] = {}

    def context(streams: int) -> Any:
        if streams not in contexts:
            params = lib.llama_context_default_params()
            params.n_seq_max, params.n_ctx = streams, streams * (-(-length // 256) * 256)
            params.n_batch = max(params.n_batch, streams * options.prompt)
            params.n_threads = params.n_threads_batch = options.threads
            if options.dtype == "float32":
                params.type_k = params.type_v = lib.GGML_TYPE_F32
            contexts[streams] = lib.llama_init_from_model(model, params)
        return contexts[streams]

    def choices(held: Any, rows: Sequence[int]) -> list[int]:
        pointers = (lib.llama_get_logits_ith(held, row) for row in rows)
        return [int(np.ctypeslib.as_array(pointer, (size,)).argmax()) for pointer in pointers]

    def run(task: Task) -> Result:
        streams, prompt = len(task.prompts), len(task.prompts[0])
        held = context(streams)
        lib.llama_memory_clear(lib.llama_get_memory(held), True)
        batch = lib.llama_batch_init(streams * prompt, 0, 1)
        began = time.perf_counter()
        _fill(batch, [(ids[at], at, row, at == prompt - 1) for row, ids in enumerate(task.prompts)
                      for at in range(prompt)])  # fmt: skip
        assert lib.llama_decode(held, batch) == 0
        last = choices(held, [(row + 1) * prompt - 1 for row in range(streams)])
        made = [[token] for token in last]
        ready = time.perf_counter()
        for step in range(task.new):
            _fill(batch, [(token, prompt + step, row, True) for row, token in enumerate(last)])
            assert lib.llama_decode(held, batch) == 0
            last = choices(held, range(streams))
            for tokens, token in zip(made, last, strict=True):
                tokens.append(token)
        ended = time.perf_counter()
        lib.llama_batch_free(batch)
        return Result(ready - began, ended - ready, made)

    return run


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _SILENT(level: int, text: bytes, data: Any) -> None:  # noqa: N802 — a constant that must not be collected
    pass


def _fill(batch: Any, rows: Sequence[tuple[int, int, int, bool]]) -> None:
    """Each row: token, position, stream, and whether its logits are wanted."""
    batch.n_tokens = len(rows)
    for index, (token, position, stream, wanted) in enumerate(rows):
        batch.token[index], batch.pos[index], batch.logits[index] = token, position, wanted
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = stream


PROGRAMS: dict[str, tuple[str, Callable[[argparse.Namespace], Run]]] = {  # its package, and how it is run
    "puna": ("puna", puna),
    "transformers": ("transformers", transformers),
    "llama.cpp": ("llama_cpp_python", llama_cpp),
}


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    _make(options)
    versions = {name: importlib.metadata.version(PROGRAMS[name][0]) for name in options.who}
    print(json.dumps({"model": options.preset, "dtype": options.dtype, "prompt": options.prompt,
                      "new": options.new, **environment(CPU), "versions": versions}), flush=True)  # fmt: skip
    with _workers(options) as workers:
        for streams in options.streams:
            _compare(options, workers, streams)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--preset", default="puna-110m")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--who", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    return parser.parse_args()


def _make(options: argparse.Namespace) -> None:
    directory, gguf = options.directory / "hf", options.directory / f"{options.dtype}.gguf"
    if not directory.exists():
        options.directory.mkdir(parents=True, exist_ok=True)
        settings = HuggingFaceSettings(dtype="bfloat16")  # what float32 holds too: the numbers are the same
        formats.save(directory, initial_weights(preset(options.preset), seed=0), settings=settings)
    if not gguf.exists() and "llama.cpp" in options.who:
        convert(formats.open_model(directory), gguf, "gguf", {"dtype": options.dtype}, verify=None)


@contextlib.contextmanager
def _workers(options: argparse.Namespace) -> Iterator[dict[str, Connection]]:
    """A process for each program, with its end of a pipe."""
    # Those that wait must not spin on the cores that another needs; read when the library is loaded.
    os.environ |= {"GOMP_SPINCOUNT": "2000", "OMP_NUM_THREADS": str(options.threads)}
    starting = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name in options.who:
        pipes[name], theirs = starting.Pipe()
        processes.append(starting.Process(target=_work, args=(name, options, theirs), daemon=True))
        processes[-1].start()
        theirs.close()  # so that one that fails is noticed
    try:
        yield pipes
    finally:
        for pipe, process in zip(pipes.values(), processes, strict=True):
            pipe.close()
            process.join()


def _work(name: str, options: argparse.Namespace, pipe: Connection) -> None:
    torch.set_num_threads(options.threads)
    run = PROGRAMS[name][1](options)
    with contextlib.suppress(EOFError):  # nobody asks any more
        while True:
            pipe.send(run(pipe.recv()))


def _compare(options: argparse.Namespace, workers: dict[str, Connection], streams: int) -> None:
    """Print a row for each program: its median rates, and the median of what Puna reaches of them."""
    rounds, reading = [], []
    for number in range(options.rounds + 1):
        task = Task(_prompts(options, streams, number), options.new if number else WARM)
        results = {}
        for name, pipe in workers.items():
            pipe.send(task)
            results[name] = pipe.recv()
        if number:
            rounds.append(results)
            reading.append(measure_reading(CPU).rate)
    for name in workers:
        row = {
            "streams": streams,
            "program": name,
            "tokens/s": _median(streams * options.new / results[name].decoding for results in rounds),
            "prompt tokens/s": _median(
                streams * options.prompt / results[name].prompts for results in rounds
            ),
        }
        if "puna" in workers and name != "puna":
            ratios = [results[name].decoding / results["puna"].decoding for results in rounds]
            row["puna/it"] = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            row["puna/it, prompts"] = _median(r[name].prompts / r["puna"].prompts for r in rounds)
            row["same tokens as puna"] = _median(_agreement(r[name], r["puna"]) for r in rounds)
        print(json.dumps(row), flush=True)
    print(json.dumps({"streams": streams, "memory read, GB/s, by round": [round(r / 1e9) for r in reading]}))


def _prompts(options: argparse.Namespace, streams: int, number: int) -> list[list[int]]:
    draw, size = random.Random(f"{streams} {number}"), preset(options.preset).vocab_size
    return [draw.choices(range(size), k=options.prompt) for _ in range(streams)]


def _agreement(one: Result, other: Result) -> float:
    """The share of streams whose first tokens are equal: all run the same model, and round differently."""
    pairs = list(zip(one.tokens, other.tokens, strict=True))
    return sum(a[:2] == b[:2] for a, b in pairs) / len(pairs)


def _median(values: Iterator[float]) -> float:
    return float(f"{statistics.median(values):.4g}")


if __name__ == "__main__":
    main()

"""The programs that benchmarks/decoding.py compares: each makes answers to the same prompts, timed by itself.

llama.cpp's fastest setting is not the same for every task: flash attention is tried as it is by default
(auto), on, and off, with the streams and the prompt of the task, and what was fastest is what counts.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from same_weights import Step, Weights, step_of_file, step_of_model

from puna.engine.cache import bytes_per_position
from puna.model.presets import preset

WARM = 4  # tokens of a task that is not counted
TRIAL = 16  # and of one that decides about a setting
FLASH = {"auto": -1, "off": 0, "on": 1}  # llama.cpp's enumeration


@dataclass(frozen=True)
class Task:
    """Prompts to answer together, with `new` timed tokens each after a first one."""

    prompts: list[list[int]]
    new: int

    @property
    def length(self) -> int:
        return len(self.prompts[0])

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.prompts), self.length


@dataclass(frozen=True)
class Result:
    """Seconds up to every stream's first token, seconds of the `new` steps after it, and the tokens."""

    prompts: float
    decoding: float
    tokens: list[list[int]]
    setting: str = ""


Run = Callable[[Task], Result]
Opened = tuple[Run, Step]
"""How it answers, and what each of its steps must read."""


def puna(options: argparse.Namespace, weights: Weights) -> Opened:
    """One engine; the prompts of every task are new to it."""
    from puna.engine.answer import Request
    from puna.engine.engine import Engine
    from puna.engine.params import SamplingParams
    from puna.engine.settings import EngineSettings
    from puna.settings import parse

    llm = weights.load()
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

    position = bytes_per_position(llm.config, llm.dtype, False)
    return run, step_of_model(llm, step_of_file(weights.gguf, 0).weights, position)


def transformers(options: argparse.Namespace, weights: Weights) -> Opened:
    """The step is compiled once for each number of streams, and each has a cache of its own."""
    import torch._inductor.config
    from transformers import AutoModelForCausalLM, StaticCache

    kind = getattr(torch, weights.dtype)
    model = AutoModelForCausalLM.from_pretrained(weights.directory / "hf", dtype=kind)
    model.eval()
    torch._inductor.config.freezing = (
        True  # weights packed for the processor: 1.7 times as fast with one stream
    )
    compiled = torch.compile(model.forward, dynamic=False, fullgraph=True)
    caches: dict[tuple[int, int], StaticCache] = {}

    @torch.no_grad()
    def run(task: Task) -> Result:
        streams, length = len(task.prompts), task.length + options.new + WARM + 2
        cache = caches.setdefault(task.shape, StaticCache(config=model.config, max_cache_len=length))
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

    read = replace(step_of_file(weights.gguf, 0), position_bytes=_position(options, kind))
    return run, replace(read, weight_bytes=read.weights * kind.itemsize)


def llama_cpp(options: argparse.Namespace, weights: Weights) -> Opened:
    """A context for each number of streams; keys and values in float16, its default, or in float32."""
    import llama_cpp as lib
    import numpy as np

    lib.llama_backend_init()
    lib.llama_log_set(_SILENT, ctypes.c_void_p(0))
    model = lib.llama_model_load_from_file(bytes(weights.gguf), lib.llama_model_default_params())
    size = preset(options.preset).vocab_size
    chosen: dict[tuple[int, int], tuple[str, Any]] = {}

    def context(shape: tuple[int, int], flash: str) -> Any:
        streams, prompt = shape
        params = lib.llama_context_default_params()
        params.n_seq_max, params.n_ctx = streams, streams * _slot(options, prompt)
        params.n_batch = max(params.n_batch, streams * prompt)
        params.n_threads = params.n_threads_batch = options.threads
        params.flash_attn_type = FLASH[flash]
        if weights.dtype == "float32":
            params.type_k = params.type_v = lib.GGML_TYPE_F32
        return lib.llama_init_from_model(model, params)

    def choices(held: Any, rows: Sequence[int]) -> list[int]:
        pointers = (lib.llama_get_logits_ith(held, row) for row in rows)
        return [int(np.ctypeslib.as_array(pointer, (size,)).argmax()) for pointer in pointers]

    def run(task: Task) -> Result:
        if task.shape not in chosen:
            contexts = {flash: context(task.shape, flash) for flash in FLASH}
            flash = fastest({name: lambda task, held=held: answer(held, task)  # type: ignore[misc]
                             for name, held in contexts.items()}, task)  # fmt: skip
            chosen[task.shape] = flash, contexts.pop(flash)
            for held in contexts.values():
                lib.llama_free(held)
        flash, held = chosen[task.shape]
        return replace(answer(held, task), setting=f"flash attention {flash}")

    def answer(held: Any, task: Task) -> Result:
        streams, prompt = task.shape
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

    return run, _file_step(options, weights)


def batched_bench(options: argparse.Namespace, weights: Weights) -> Opened:
    """llama.cpp's own program, started anew for every task: random tokens, and nobody looks at the logits."""
    chosen: dict[tuple[int, int], str] = {}

    def run(task: Task) -> Result:
        ways = {flash: lambda task, flash=flash: answer(task, flash) for flash in FLASH}  # type: ignore[misc]
        if task.shape not in chosen:
            chosen[task.shape] = fastest(ways, task)
        flash = chosen[task.shape]
        return replace(ways[flash](task), setting=f"flash attention {flash}")

    def answer(task: Task, flash: str) -> Result:
        streams, prompt = task.shape
        room = streams * _slot(options, prompt)
        command = [options.batched_bench, "-m", str(weights.gguf), "-c", str(room), "-fa", flash]
        command += ["-t", str(options.threads), "-tb", str(options.threads), "--output-format", "jsonl"]
        command += ["-b", str(max(2048, streams * prompt)), "-npp", str(prompt), "-ntg", str(task.new)]
        command += ["-npl", str(streams)]
        if weights.dtype == "float32":
            command += ["-ctk", "f32", "-ctv", "f32"]
        while not (
            said := subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        ):
            pass  # its log is written aside, and at times the program ends before
        found = json.loads(said.splitlines()[-1])
        return Result(found["t_pp"], found["t_tg"], [])

    return run, _file_step(options, weights)


def fastest(ways: dict[str, Run], task: Task) -> str:
    """The name of the way that is fastest with what the task times; they take turns."""
    decodes = task.new > 1
    trial = replace(task, new=TRIAL if decodes else 1)
    rounds = [{name: run(trial) for name, run in ways.items()} for _ in range(4)][1:]

    def seconds(name: str) -> float:
        return min(results[name].decoding if decodes else results[name].prompts for results in rounds)

    return min(ways, key=seconds)


PROGRAMS: dict[str, tuple[str, Callable[[argparse.Namespace, Weights], Opened]]] = {
    # its package, and how it is opened
    "puna": ("puna", puna),
    "transformers": ("transformers", transformers),
    "llama.cpp": ("llama_cpp_python", llama_cpp),
    "llama-batched-bench": ("llama_cpp_python", batched_bench),
}


def _slot(options: argparse.Namespace, prompt: int) -> int:
    """Positions of a stream, which llama.cpp rounds up to 256."""
    return -(-(prompt + max(options.new, TRIAL) + WARM + 2) // 256) * 256


def _file_step(options: argparse.Namespace, weights: Weights) -> Step:
    kind = torch.float32 if weights.dtype == "float32" else torch.float16
    return step_of_file(Path(weights.gguf), _position(options, kind))


def _position(options: argparse.Namespace, kind: torch.dtype) -> int:
    return bytes_per_position(preset(options.preset), kind, False)


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

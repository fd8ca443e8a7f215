"""Puna's engine beside transformers and llama.cpp, on equal terms in one run.

    python benchmarks/decoding.py DIRECTORY [--preset puna-110m] [--format bfloat16 q8_0 int8 q4_0]
        [--streams 1 4 16] [--prompt 64] [--new 64] [--prefill 512] [--rounds 5] [--threads N]
        [--who puna llama.cpp] [--batched-bench PROGRAM]

Writes a model of random weights to DIRECTORY (where it is not there already), then gives each program the
same weights in the same format (benchmarks/same_weights.py), the same prompts as ids, the same number of
greedy tokens and of threads. Each runs in a process of its own that keeps its model; they take turns, in the
reverse order every other round, those that wait are stopped meanwhile (SIGSTOP), and what is compared is the
same round's: whatever disturbs the machine disturbs all alike. Timed are steps in which every stream gets one
token, and apart from them prompts; compiling is not.

- puna: the engine with its defaults, so that answers do not depend on each other.
- transformers: a StaticCache, and the decoding step compiled for the number of streams with weights frozen
  (packed for the processor); prompts run eagerly. In bfloat16 and float32 only.
- llama.cpp: `llama_decode` on batches of all streams, through llama-cpp-python built for this processor
  (GGML_NATIVE); all threads; weights repacked for its vector units as they are loaded, its default; flash
  attention as it is fastest.
- llama-batched-bench: llama.cpp's own program (`--who … llama-batched-bench --batched-bench PROGRAM`), to see
  that going through Python costs it nothing. Built from the source inside llama-cpp-python's source package:
      cmake -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON
      cmake --build build --target llama-batched-bench

Rows are JSON, and a table comes at the end. `puna/it` is the rate of Puna as a multiple of the program's, the
median of the rounds, with the lowest and the highest. `of the read limit` is the share of the rate at which
reading weights, keys and values would take all the time; reading is measured beside every round, and `bits`
are those of a weight that a step reads, scales included.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import random
import signal
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from programs import PROGRAMS, WARM, Result, Task
from same_weights import FORMATS, Step, Weights

from puna.model.presets import preset
from puna.plan.measure import measure_reading
from puna.train.run import environment

CPU = torch.device("cpu")
PLAIN = ("bfloat16", "float32")
COLUMNS = ("format", "task", "program", "bits", "tokens/s", "of the read limit", "puna/it", "setting")


@dataclass(frozen=True)
class Work:
    """What a row of the table times: `new` tokens of streams that have a prompt; or, with one, the prompt."""

    streams: int
    prompt: int
    new: int

    @property
    def prefills(self) -> bool:
        return self.new == 1

    def __str__(self) -> str:
        return f"prefill {self.prompt}" if self.prefills else f"decode {self.streams}"

    def task(self, vocabulary: int, number: int) -> Task:
        """Random ids, others in every round; round 0 is to warm up."""
        draw = random.Random(f"{self.streams} {self.prompt} {number}")
        prompts = [draw.choices(range(vocabulary), k=self.prompt) for _ in range(self.streams)]
        return Task(prompts, self.new if number or self.prefills else WARM)

    def seconds(self, result: Result) -> float:
        return result.prompts if self.prefills else result.decoding

    def rate(self, result: Result) -> float:
        return self.streams * (self.prompt if self.prefills else self.new) / self.seconds(result)

    def floor(self, step: Step, rate: float) -> float:
        """Seconds that reading alone takes: the weights once for a prompt, and for each of the steps."""
        if self.prefills:
            return step.seconds(0, rate)
        # The first token came with the prompt: the steps attend to prompt + 1 positions and more.
        return self.new * step.seconds(self.streams * (self.prompt + (self.new + 1) / 2), rate)


class Worker:
    """A program in a process of its own, stopped until its turn comes."""

    def __init__(self, process: Any, pipe: Connection) -> None:
        self.process, self.pipe = process, pipe
        self.step: Step = pipe.recv()
        self.pause()

    def run(self, task: Task) -> Result:
        os.kill(self.process.pid, signal.SIGCONT)
        self.pipe.send(task)
        result: Result = self.pipe.recv()
        self.pause()
        return result

    def pause(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    versions = {name: importlib.metadata.version(PROGRAMS[name][0]) for name in options.who}
    print(json.dumps({"model": options.preset, "prompt": options.prompt, "new": options.new,
                      **environment(CPU), "versions": versions}), flush=True)  # fmt: skip
    works = [Work(streams, options.prompt, options.new) for streams in options.streams]
    works += [Work(1, length, 1) for length in options.prefill]
    rows = []
    for form in options.format:
        weights = Weights(options.directory, form)
        weights.make(options.preset, max(options.prefill, default=0) + 64)
        with _workers(options, weights) as workers:
            for work in works:
                rows += _compare(options, workers, work, form)
    print(_table(rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--preset", default="puna-110m")
    parser.add_argument("--format", nargs="+", default=["bfloat16"], choices=FORMATS)
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--prefill", type=int, nargs="*", default=[512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--who", nargs="+", choices=PROGRAMS, default=["puna", "transformers", "llama.cpp"])
    parser.add_argument("--batched-bench", default="llama-batched-bench")
    return parser.parse_args()


@contextlib.contextmanager
def _workers(options: argparse.Namespace, weights: Weights) -> Iterator[dict[str, Worker]]:
    """A process for each program, with its end of a pipe."""
    # Those that wait must not spin on the cores that another needs; read when the library is loaded.
    os.environ |= {"GOMP_SPINCOUNT": "2000", "OMP_NUM_THREADS": str(options.threads)}
    starting = multiprocessing.get_context("spawn")
    workers: dict[str, Worker] = {}
    try:
        for name in options.who:
            if name == "transformers" and weights.format not in PLAIN:
                continue
            pipe, theirs = starting.Pipe()
            process = starting.Process(target=_work, args=(name, options, weights, theirs), daemon=True)
            process.start()
            theirs.close()  # so that one that fails is noticed
            workers[name] = Worker(process, pipe)
        yield workers
    finally:
        for worker in workers.values():
            worker.pipe.close()
            os.kill(worker.process.pid, signal.SIGCONT)
            worker.process.join()


def _work(name: str, options: argparse.Namespace, weights: Weights, pipe: Connection) -> None:
    torch.set_num_threads(options.threads)
    run, step = PROGRAMS[name][1](options, weights)
    with contextlib.suppress(EOFError):  # nobody asks any more
        pipe.send(step)
        while True:
            pipe.send(run(pipe.recv()))


def _compare(
    options: argparse.Namespace, workers: Mapping[str, Worker], work: Work, form: str
) -> list[dict[str, Any]]:
    """A row for each program: its median rate, its share of the read limit, and Puna's rate as a multiple."""
    vocabulary = preset(options.preset).vocab_size
    rounds: list[dict[str, Result]] = []
    reading = []
    for number in range(options.rounds + 1):
        order = list(workers) if number % 2 else list(reversed(workers))
        task, before = work.task(vocabulary, number), measure_reading(CPU).rate
        results = {name: workers[name].run(task) for name in order}
        if number:
            rounds.append(results)
            reading.append(max(before, measure_reading(CPU).rate))
    rows = []
    for name, worker in workers.items():
        mine = [results[name] for results in rounds]
        shares = [
            work.floor(worker.step, rate) / work.seconds(result)
            for rate, result in zip(reading, mine, strict=True)
        ]
        row: dict[str, Any] = {"format": form, "task": str(work), "program": name}
        row |= {"bits": round(worker.step.bits, 2), "tokens/s": _median(map(work.rate, mine))}
        row |= {"of the read limit": _median(shares), "setting": mine[-1].setting}
        if "puna" in workers and name != "puna":
            row |= _beside(work, [(results["puna"], results[name]) for results in rounds])
        print(json.dumps(row), flush=True)
        rows.append(row)
    by_round = [round(rate / 1e9, 1) for rate in reading]
    print(
        json.dumps({"format": form, "task": str(work), "memory read, GB/s, by round": by_round}), flush=True
    )
    return rows


def _beside(work: Work, rounds: Sequence[tuple[Result, Result]]) -> dict[str, Any]:
    ratios = [work.seconds(its) / work.seconds(ours) for ours, its in rounds]
    row = {"puna/it": f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"}
    pairs = [pair for ours, its in rounds for pair in zip(ours.tokens, its.tokens, strict=False)]
    if pairs:  # all run the same model, and round differently
        same = statistics.mean(a[:2] == b[:2] for a, b in pairs)
        return {**row, "same first tokens as puna": float(f"{same:.3g}")}
    return row


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """For a page of figures."""
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    lines += [[str(row.get(name, "")) for name in COLUMNS] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _median(values: Any) -> float:
    return float(f"{statistics.median(values):.4g}")


if __name__ == "__main__":
    main()

"""From the start of a process to its first token, and the memory that takes: Puna beside llama.cpp.

    python benchmarks/loading.py DIRECTORY --tokenizer FILE [--preset tinyllama-1.1b] [--format bfloat16 q8_0]
        [--rounds 5] [--threads N] [--prompt 8] [--llama PROGRAM] [--who puna "puna generate" llama.cpp]

Writes a model of random weights to DIRECTORY (where it is not there already) in each format of
benchmarks/same_weights.py, with the tokenizer in FILE, whose vocabulary must be the preset's. Every round
starts each program anew, one after another, in the reverse order every other round. Round 0 does not count:
it leaves the files in the page cache and Puna's kernels compiled, as any use before has.

- puna: `puna.load` and one token of `generate`, in Python; the process ends when it has told.
- puna generate: the command, to the end of its process.
- llama.cpp: the same through llama-cpp-python: the model is loaded, a context made, the prompt decoded.
- llama-batched-bench: the native program (`--llama`), which warms up, computes the prompt and one token; to
  the end of its process.

`seconds` are from the start of the process to the first token as its parent learns of it (or to its end, see
above): medians, with the lowest and the highest. `processor seconds` are those of all its threads and of the
system for it, to its end: on a machine that others use too their lowest tells most. Memory is the most that
was held at any moment: `anonymous`, which is the process's alone, and `resident`, with the pages of mapped
files, which others share and the system may take back; `of the file` compares them with the bytes of the
weights. Linux only. The directory may be that of benchmarks/serving.py, but not that of decoding.py, whose
model has no tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from same_weights import FORMATS, Weights

from puna.train.run import environment

READY = "first token"

PUNA = """
import json, sys
import puna
path, dtype, quantize, prompt = json.loads(sys.argv[1])
llm = puna.load(path, dtype=dtype, device="cpu", quantize=quantize)
llm.generate(prompt, max_new_tokens=1, temperature=0.0, ignore_eos=True)
print("first token", flush=True)
"""
LLAMA = """
import json, sys
import llama_cpp as lib
path, threads, prompt = json.loads(sys.argv[1])
lib.llama_backend_init()
model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
params = lib.llama_context_default_params()
params.n_ctx, params.n_threads, params.n_threads_batch = 512, threads, threads
context = lib.llama_init_from_model(model, params)
tokens = (lib.llama_token * len(prompt))(*prompt)
assert lib.llama_decode(context, lib.llama_batch_get_one(tokens, len(prompt))) == 0
logits = lib.llama_get_logits_ith(context, -1)
size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
max(range(size), key=lambda token: logits[token])
print("first token", flush=True)
"""


@dataclass(frozen=True)
class Start:
    """What one start took: seconds, those of processors, and the most bytes that were held."""

    seconds: float
    processor: float
    anonymous: int
    resident: int


def puna(options: argparse.Namespace, weights: Weights) -> list[str]:
    asked = [str(weights.puna), weights.dtype, weights.quantize, _prompt(options)]
    return [sys.executable, "-c", PUNA, json.dumps(asked)]


def puna_generate(options: argparse.Namespace, weights: Weights) -> list[str]:
    """The command takes texts; so many words are at least so many tokens."""
    command = [sys.executable, "-m", "puna", "generate", str(weights.puna), "--dtype", weights.dtype]
    command += ["--tokenizer", str(options.tokenizer)]  # GGUF files that were made elsewhere may lack one
    command += ["--device", "cpu", "--prompt", " ".join(["time"] * (options.prompt - 1))]
    command += [] if weights.quantize is None else ["--quantize", weights.quantize["scheme"]]
    return [*command, "--max-new-tokens", "1", "--temperature", "0"]


def llama_cpp(options: argparse.Namespace, weights: Weights) -> list[str]:
    asked = [str(weights.gguf), options.threads, _prompt(options)]
    return [sys.executable, "-c", LLAMA, json.dumps(asked)]


def batched_bench(options: argparse.Namespace, weights: Weights) -> list[str]:
    command = [options.llama, "-m", str(weights.gguf), "-c", "512", "-npp", str(options.prompt), "-ntg", "1"]
    return [*command, "-npl", "1", "-t", str(options.threads), "-tb", str(options.threads)]


PROGRAMS: dict[str, Callable[[argparse.Namespace, Weights], list[str]]] = {
    "puna": puna,
    "puna generate": puna_generate,
    "llama.cpp": llama_cpp,
    "llama-batched-bench": batched_bench,
}


def main() -> None:
    options = _options()
    about = {"model": options.preset, "threads": options.threads, **environment(torch.device("cpu"))}
    print(json.dumps(about), flush=True)
    for form in options.format:
        weights = Weights(options.directory, form)
        weights.make(options.preset, tokenizer=options.tokenizer)
        rounds = []
        for number in range(options.rounds + 1):
            order = options.who if number % 2 else list(reversed(options.who))
            rounds.append({name: _start(PROGRAMS[name](options, weights), options) for name in order})
        for name in options.who:
            print(json.dumps(_row(weights, name, rounds[1:])), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--preset", default="tinyllama-1.1b")
    parser.add_argument("--format", nargs="+", default=["bfloat16", "q8_0"], choices=FORMATS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prompt", type=int, default=8)
    parser.add_argument("--llama", default="llama-batched-bench")
    parser.add_argument("--who", nargs="+", choices=PROGRAMS, default=["puna", "puna generate", "llama.cpp"])
    return parser.parse_args()


def _prompt(options: argparse.Namespace) -> list[int]:
    return list(range(3, 3 + options.prompt))


def _start(command: list[str], options: argparse.Namespace) -> Start:
    surroundings = os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=surroundings
    )
    most = Most(process.pid)
    assert process.stdout is not None
    seconds = None
    for line in process.stdout:
        if line.strip() == READY:
            seconds = time.perf_counter() - began
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    ended = time.perf_counter() - began
    if status:
        raise SystemExit(f"{command[:6]} ended with status {process.returncode}")
    return Start(seconds or ended, used.ru_utime + used.ru_stime, *most.end())


class Most:
    """The most memory that a process holds, looked at every five milliseconds until it ends."""

    def __init__(self, pid: int) -> None:
        self._status = Path("/proc") / str(pid) / "status"
        self._anonymous = self._resident = 0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def end(self) -> tuple[int, int]:
        """Anonymous and resident bytes."""
        self._thread.join()
        return self._anonymous, self._resident

    def _watch(self) -> None:
        while self._look():
            time.sleep(0.005)

    def _look(self) -> bool:
        try:
            lines = self._status.read_text(encoding="ascii").splitlines()
        except OSError:
            return False
        sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith(" kB")}
        if "VmHWM" not in sizes:  # it has ended, and waits to be asked how
            return False
        self._anonymous = max(self._anonymous, int(sizes["RssAnon"]) * 1024)
        self._resident = max(self._resident, int(sizes["VmHWM"]) * 1024)
        return True


def _row(weights: Weights, name: str, rounds: list[dict[str, Start]]) -> Mapping[str, object]:
    starts = [results[name] for results in rounds]
    seconds = [start.seconds for start in starts]
    size = weights.gguf.stat().st_size
    row: dict[str, object] = {
        "format": weights.format,
        "program": name,
        "seconds": _spread(seconds),
        "processor seconds": _spread([start.processor for start in starts]),
        "anonymous MB": round(statistics.median(start.anonymous for start in starts) / 1e6),
        "resident MB": round(statistics.median(start.resident for start in starts) / 1e6),
        "weights MB": round(size / 1e6),
        "anonymous, of the file": round(statistics.median(start.anonymous for start in starts) / size, 2),
        "resident, of the file": round(statistics.median(start.resident for start in starts) / size, 2),
    }
    if name != "puna" and "puna" in rounds[0]:
        ratios = [results[name].seconds / results["puna"].seconds for results in rounds]
        row["seconds, it/puna"] = _spread(ratios)
    return row


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()

"""Puna's training beside transformers and litgpt, on equal terms in one run.

    python benchmarks/training.py [--model puna-15m] [--vocab 32000] [--untied] [--rows 8] [--row-length 256]
        [--precision mixed|pure] [--rounds 5] [--updates N] [--threads N] [--memory]
        [--who puna transformers litgpt] [--litgpt-python PYTHON]

Every program trains a model of the same shape on random tokens: the same rows, number types (mixed: products
in bfloat16 under autocast, all else float32; pure: everything bfloat16), threads, clipping and fused AdamW,
compiled, with its own fastest loss (benchmarks/trainers.py). Each runs in a process of its own; they take
turns, in the reverse order every other round, those that wait are stopped meanwhile (SIGSTOP), and what is
compared is the same round's. Compiling is not timed.

litgpt runs in the interpreter that `--litgpt-python` names, since it wants other versions of what it shares
with Puna; without one it is left out, and that is said.

Rows are JSON, and a table comes at the end. `of the matrix rate` is model FLOPs utilisation: 6 operations for
every weight of a matrix and token, causal attention at half, as a share of the rate of products measured
around each round. `puna/it` is the rate of Puna as a multiple of the program's, the median of the rounds
with the lowest and the highest; in the row `fastest` of that of each round's fastest other program. `memory`
is the most that two updates held above weights, gradients and the optimizer's state.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from trainers import SIDES

from puna.model.config import ModelConfig
from puna.model.counts import flops_per_token, parameters
from puna.model.presets import preset
from puna.plan.measure import measure_peak
from puna.progress import quantity
from puna.train.run import environment

CPU = torch.device("cpu")
PRECISIONS = {"mixed": "float32", "pure": "bfloat16"}  # the type of the weights
SECONDS = 5.0  # of a program's turn, about
COLUMNS = (
    "model",
    "task",
    "program",
    "tokens/s",
    "of the matrix rate",
    "puna/it",
    "memory",
    "memory it/puna",
)


class Worker:
    """A program in a process of its own, stopped until its turn comes."""

    def __init__(self, python: str, name: str, options: Mapping[str, Any]) -> None:
        script = str(Path(__file__).with_name("trainers.py"))
        # Those that wait must not spin on the cores that another needs; read when the library is loaded.
        around = os.environ | {"GOMP_SPINCOUNT": "2000", "OMP_NUM_THREADS": str(options["threads"])}
        self.name = name
        self.process = subprocess.Popen(
            [python, script, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=around
        )
        self.ready: dict[str, Any] = self._ask(options)
        self.pause()

    def run(self, updates: int) -> float:
        """Seconds that it takes."""
        self.process.send_signal(signal.SIGCONT)
        seconds = float(self._ask(updates))
        self.pause()
        return seconds

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def end(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.communicate()

    def _ask(self, value: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(value), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended with status {self.process.wait()}; what it said stands above")
        return json.loads(line)


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    config = _config(options)
    pythons = _pythons(options)
    asked = {
        "model": options.model, "vocab": config.vocab_size, "tied": config.tie_word_embeddings,
        "rows": options.rows, "row_length": options.row_length, "dtype": "bfloat16",
        "weights": PRECISIONS[options.precision], "policy": options.policy, "threads": options.threads,
        "shape": config.model_dump(mode="json"),
    }  # fmt: skip
    workers = {name: Worker(python, name, asked) for name, python in pythons.items()}
    versions = {name: worker.ready["version"] for name, worker in workers.items()}
    print(json.dumps({**environment(CPU), "versions": versions}), flush=True)
    rows = _memory(workers)
    if not options.memory:
        rows = _compare(options, config, workers, rows)
    for worker in workers.values():
        worker.end()
    task = f"{options.precision}, {options.rows} × {options.row_length}, V {config.vocab_size:,}"
    print(_table({"model": options.model, "task": task, **row} for row in rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="puna-15m")
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--untied", action="store_true")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--row-length", type=int, default=256)
    parser.add_argument("--precision", choices=PRECISIONS, default="mixed")
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, help="of a turn; without it as many as take five seconds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory", action="store_true", help="memory alone, without rounds")
    parser.add_argument("--who", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--litgpt-python", help="an interpreter that has litgpt")
    return parser.parse_args()


def _config(options: argparse.Namespace) -> ModelConfig:
    changes = {
        "vocab_size": options.vocab,
        "tie_word_embeddings": not options.untied,
        "max_position_embeddings": options.row_length,
    }
    return preset(options.model).model_copy(update=changes)


def _pythons(options: argparse.Namespace) -> dict[str, str]:
    """The interpreter of each program that is there."""
    own = {name: sys.executable for name in options.who if name != "litgpt"}
    if "litgpt" not in options.who:
        return own
    if options.litgpt_python is None or shutil.which(options.litgpt_python) is None:
        print(f"litgpt is left out: --litgpt-python names no interpreter ({options.litgpt_python})")
        return own
    return own | {"litgpt": options.litgpt_python}


def _memory(workers: Mapping[str, Worker]) -> list[dict[str, Any]]:
    rows = []
    for name, worker in workers.items():
        row = {"program": name, "memory": f"{quantity(worker.ready['above'])}B", "most": worker.ready["most"]}
        if "puna" in workers and name != "puna":
            row["memory it/puna"] = f"{worker.ready['above'] / workers['puna'].ready['above']:.2f}"
        print(json.dumps({**row, "above": worker.ready["above"]}), flush=True)
        rows.append(row)
    return rows


def _compare(
    options: argparse.Namespace,
    config: ModelConfig,
    workers: Mapping[str, Worker],
    rows: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Rates of every round: each program's median, its share of the matrix rate, Puna's as a multiple."""
    tokens = options.rows * options.row_length
    flops = tokens * flops_per_token(config, options.row_length, training=True)
    updates = {
        name: options.updates or max(1, round(SECONDS / worker.run(1))) for name, worker in workers.items()
    }
    rounds: list[dict[str, float]] = []  # updates per second
    shares: list[dict[str, float]] = []
    for number in range(options.rounds):
        order = list(workers) if number % 2 else list(reversed(workers))
        before = measure_peak(CPU, torch.bfloat16, 0.4).flops
        rates = {name: updates[name] / workers[name].run(updates[name]) for name in order}
        peak = max(before, measure_peak(CPU, torch.bfloat16, 0.4).flops)
        rounds.append(rates)
        shares.append({name: rate * flops / peak for name, rate in rates.items()})
        told = {name: round(rate * tokens) for name, rate in rates.items()}
        print(json.dumps({"round": number + 1, "tokens/s": told, "peak": f"{peak:.4g}"}), flush=True)
    full = [
        {
            **row,
            "tokens/s": f"{tokens * statistics.median(rates[row['program']] for rates in rounds):,.0f}",
            "of the matrix rate": f"{statistics.median(share[row['program']] for share in shares):.1%}",
            **_beside([(rates.get("puna"), rates[row["program"]]) for rates in rounds], row["program"]),
        }
        for row in rows
    ]
    others = [[rate for name, rate in rates.items() if name != "puna"] for rates in rounds]
    if "puna" in workers and len(workers) > 1:
        pairs = [(rates["puna"], max(rest)) for rates, rest in zip(rounds, others, strict=True)]
        full.append({"program": "fastest", **_beside(pairs, "fastest")})
    for row in full:
        print(json.dumps({**row, "parameters": parameters(config).total}), flush=True)
    return full


def _beside(pairs: Iterable[tuple[float | None, float]], name: str) -> dict[str, str]:
    ratios = [ours / its for ours, its in pairs if ours is not None]
    if name == "puna" or not ratios:
        return {}
    return {"puna/it": f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"}


def _table(rows: Iterable[Mapping[str, Any]]) -> str:
    """For a page of figures."""
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    lines += [[str(row.get(name, "")) for name in COLUMNS] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()

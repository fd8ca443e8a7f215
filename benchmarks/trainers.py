"""The programs that benchmarks/training.py compares: each makes whole updates of one shape, timed by itself.

    PYTHON benchmarks/trainers.py NAME < requests

Requests and answers are lines of JSON: first the options, answered when everything is compiled and warm;
then a number of updates at a time. litgpt's interpreter has no Puna, hence nothing of it is imported here
but by Puna's own side.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WARM = 2  # updates that do not count
ROOM = 2  # updates over which the most memory is taken
BATCHES = 8  # of random ids, in turn
CHUNK = 256  # rows of logits at a time, where litgpt has it fastest

Options = dict[str, Any]
Side = tuple[Callable[[int], None], list[torch.nn.Parameter]]
"""What makes so many updates, and the parameters."""


@contextlib.contextmanager
def puna(options: Options) -> Iterator[Side]:
    """The loop of a run: rows from a loader, a check of every number, a record of every step."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from puna.recipes.bench.training_case import opened
    from puna.recipes.bench.training_settings import TrainBenchSettings
    from puna.settings import parse

    names = ("model", "vocab", "tied", "rows", "row_length", "dtype", "weights", "policy", "threads")
    with opened(parse(TrainBenchSettings, {name: options[name] for name in names})) as case:
        yield case.run, list(case.model.parameters())  # type: ignore[misc]  # it returns seconds


@contextlib.contextmanager
def transformers(options: Options) -> Iterator[Side]:
    """LlamaForCausalLM with labels, model and loss compiled as one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = options["shape"]
    config = LlamaConfig(
        **{name: shape[name] for name in SHAPE},
        max_position_embeddings=options["row_length"],
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    if options["weights"] == "bfloat16":
        model = model.bfloat16()
    compiled = torch.compile(model)

    def loss(ids: Tensor) -> Tensor:
        found: Tensor = compiled(input_ids=ids, labels=ids).loss
        return found

    yield _updates(options, model, loss)


@contextlib.contextmanager
def litgpt(options: Options) -> Iterator[Side]:
    """Its GPT compiled, with the output layer and its chunked loss over rows, which is its fastest form."""
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    shape = options["shape"]
    config = Config(
        name="llama",
        block_size=options["row_length"],
        vocab_size=shape["vocab_size"],
        padded_vocab_size=shape["vocab_size"],
        n_layer=shape["num_hidden_layers"],
        n_head=shape["num_attention_heads"],
        n_query_groups=shape["num_key_value_heads"],
        n_embd=shape["hidden_size"],
        head_size=shape["head_dim"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=shape["rms_norm_eps"],
        mlp_class_name="LLaMAMLP",
        intermediate_size=shape["intermediate_size"],
    )
    model = GPT(config)
    if shape["tie_word_embeddings"]:
        model.lm_head.weight = model.transformer.wte.weight
    if options["weights"] == "bfloat16":
        model = model.bfloat16()
    compiled = torch.compile(model)

    def loss(ids: Tensor) -> Tensor:
        logits = compiled(ids, lm_head_chunk_size=CHUNK)
        found: Tensor = chunked_cross_entropy(logits, ids.roll(-1, dims=1), chunk_size=0)
        return found

    yield _updates(options, model, loss)


SHAPE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "tie_word_embeddings",
)  # fmt: skip
SIDES = {"puna": puna, "transformers": transformers, "litgpt": litgpt}


def _updates(options: Options, model: torch.nn.Module, loss: Callable[[Tensor], Tensor]) -> Side:
    """Forward, backward, clipping and AdamW as users of torch write them."""
    words, rows, length = options["shape"]["vocab_size"], options["rows"], options["row_length"]
    batches = [torch.randint(0, words, (rows, length)) for _ in range(BATCHES)]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    mixed = options["dtype"] == "bfloat16" and options["weights"] == "float32"

    def run(count: int) -> None:
        for number in range(count):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
                found = loss(batches[number % BATCHES])
            found.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run, list(model.parameters())


def _room(side: Side) -> dict[str, int]:
    """Bytes of weights, and the most that some updates hold above weights, gradients and optimizer.

    As puna/recipes/bench/training_case.py takes it: above what stands between two updates, less gradients.
    """
    run, parameters = side
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    kept = sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run(ROOM)
    weights = sum(parameter.nbytes for parameter in parameters)
    most = _status("VmHWM")
    return {"weights": weights, "most": most, "above": most - before - (weights - kept)}


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    # Libraries print what they like; answers go where nothing else does.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    name, options = sys.argv[1], json.loads(sys.stdin.readline())
    torch.set_num_threads(options["threads"])
    torch.manual_seed(0)
    with SIDES[name](options) as side:
        run, _ = side
        run(WARM)
        answer({"version": importlib.metadata.version(name), **_room(side)})
        for line in sys.stdin:
            began = time.perf_counter()
            run(json.loads(line))
            answer(time.perf_counter() - began)


if __name__ == "__main__":
    main()

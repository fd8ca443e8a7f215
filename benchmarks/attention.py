"""Attention of training, forward and backward: Puna's beside torch's, whole rows and packed documents.

    python benchmarks/attention.py [--threads N] [--rounds 30] [--dtype bfloat16]
        [--rows 8x256 2x1024 1x4096] [--documents 1 4] [--heads 12] [--keys 12] [--width 64]

Both sides begin with queries, keys and values as one projection gives them, turn queries and keys by their
positions, attend, and give the gradient of the projection. Puna's is one call each way. torch's is
`scaled_dot_product_attention`, compiled with the turning: causal by itself where a row is one document, by a
mask of truths (B, 1, T, T) where it holds several, as torch has no other way on a CPU. In every round the two
take turns.

Milliseconds are medians of all rounds; `ratio` is torch's over Puna's. `share` is what a row of several
documents takes of the same row as one; scores alone would be one part in so many.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from puna.kernels import causal
from puna.kernels.causal_plain import turn
from puna.model.attention import first_keys
from puna.model.rope import NoScaling, Rope
from puna.train.run import environment

BASE = 10_000.0
Times = dict[str, dict[str, float]]  # of each side: milliseconds forward and backward


@dataclass(frozen=True)
class Case:
    """Rows of so many tokens, each of so many documents of one length."""

    rows: int
    length: int
    documents: int

    def ids(self) -> Tensor:
        """Of the documents (B, T)."""
        each = -(-self.length // self.documents)
        return (torch.arange(self.length) // each).expand(self.rows, -1)


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    about = {"threads": options.threads, "dtype": options.dtype, **environment(torch.device("cpu"))}
    print(json.dumps(about), flush=True)
    for rows, length in (map(int, text.split("x")) for text in options.rows):
        whole: Times = {}
        for documents in options.documents:
            found = measured(Case(rows, length, documents), options)
            whole = whole or found
            _tell(Case(rows, length, documents), found, whole)


def measured(case: Case, options: argparse.Namespace) -> Times:
    """Medians of turns that both sides take, after each was compiled and run once."""
    heads = causal.Heads(options.heads, options.keys, options.width)
    torch.manual_seed(0)
    width = (heads.queries + 2 * heads.keys) * heads.width
    joint = torch.randn(case.rows, case.length, width).to(getattr(torch, options.dtype))
    grad = torch.randn(case.rows, case.length, heads.queries, heads.width).to(joint.dtype)
    rope = Rope(BASE, heads.width, case.length, NoScaling())
    angles = rope(torch.arange(case.length)[None], torch.float32)
    sides = {
        "puna": puna(case, joint, grad, heads, angles),
        "torch": others(case, joint, grad, heads, angles),
    }
    for forward, backward in sides.values():
        forward()
        backward()
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "backward": []} for name in sides}
    for _ in range(options.rounds):
        for name, ways in sides.items():
            for way, call in zip(("forward", "backward"), ways, strict=True):
                began = time.perf_counter()
                call()
                times[name][way].append(1e3 * (time.perf_counter() - began))
    return {
        name: {way: statistics.median(each) for way, each in ways.items()} for name, ways in times.items()
    }


Ways = tuple[Callable[[], object], Callable[[], object]]


def puna(case: Case, joint: Tensor, grad: Tensor, heads: causal.Heads, angles: tuple[Tensor, Tensor]) -> Ways:
    starts = None if case.documents == 1 else first_keys(case.length, None, case.ids(), joint.device)
    parts, into = heads.split(joint), torch.empty_like(joint)
    kept: list[Tensor] = []

    def forward() -> None:
        kept[:] = causal.attend(*parts, *angles, starts)

    def backward() -> None:
        out, sums = kept
        causal.attend_backward(grad, *parts, out, sums, *angles, starts, into=into)

    return forward, backward


def others(
    case: Case, joint: Tensor, grad: Tensor, heads: causal.Heads, angles: tuple[Tensor, Tensor]
) -> Ways:
    mask = None
    if case.documents > 1:
        ids = case.ids()
        mask = torch.ones(case.length, case.length, dtype=torch.bool).tril() & (
            ids[:, :, None] == ids[:, None]
        )
        mask = mask[:, None]
    learned, grouped = joint.clone().requires_grad_(), heads.queries != heads.keys
    kept: list[Tensor] = []

    @torch.compile(dynamic=False)
    def attend(joint: Tensor) -> Tensor:
        q, k, v = heads.split(joint)
        q, k = (turn(each, *angles).to(joint.dtype) for each in (q, k))
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
        ).transpose(1, 2)

    def forward() -> None:
        kept[:] = [attend(learned)]

    def backward() -> None:
        learned.grad = None
        kept.pop().backward(grad)

    return forward, backward


def _tell(case: Case, found: Times, whole: Times) -> None:
    row: dict[str, object] = {"rows": case.rows, "length": case.length, "documents": case.documents}
    for way in ("forward", "backward"):
        ours, theirs = found["puna"][way], found["torch"][way]
        row[way] = {"ms": round(ours, 3), "torch_ms": round(theirs, 3), "ratio": round(theirs / ours, 2)}
        row[way] |= {"share": round(ours / whole["puna"][way], 3)} if found is not whole else {}  # type: ignore[operator]
    print(json.dumps(row), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rows", nargs="+", default=["8x256", "2x1024", "1x4096"], metavar="BxT")
    parser.add_argument("--documents", nargs="+", type=int, default=[1, 4], help="the first is the whole")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--keys", type=int, default=12)
    parser.add_argument("--width", type=int, default=64)
    return parser.parse_args()


if __name__ == "__main__":
    main()

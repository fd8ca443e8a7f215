"""One rank of a world: every method of World, what it gave written as JSON. Started as torchrun would."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from puna import parallel


def main(out: Path) -> None:
    parallel.BUCKET_NUMBERS = 5  # several buckets, one of them a single large parameter
    world = parallel.start()
    mine = world.rank + 1.0
    parameters = [
        nn.Parameter(torch.zeros(n, dtype=d))
        for n, d in ((3, torch.float32), (7, torch.float32), (1, torch.float64), (2, torch.float32))
    ]
    for parameter in parameters[:-1]:
        parameter.grad = mine * torch.arange(len(parameter), dtype=parameter.dtype)
    if world.leads:
        parameters[-1].grad = torch.tensor([5.0, 6.0])  # the other rank has none
    world.sum_gradients(parameters)
    copied = nn.Parameter(torch.full((2,), mine))
    world.broadcast([copied])
    world.barrier()
    found = {
        "world": [world.rank, world.size, world.local_rank, world.leads],
        "gradients": [parameter.grad.tolist() for parameter in parameters],
        "sums": world.sum_scalars([mine, 0.1]),
        "any": [world.any(world.rank == 1), world.any(False)],
        "copied": copied.tolist(),
    }
    parallel.stop()
    (out / f"{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

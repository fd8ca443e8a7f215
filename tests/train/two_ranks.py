"""One rank of a short float64 training; writes its weights and losses. Started as torchrun would start it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from puna import parallel
from puna.train.loop import LoopSettings, TrainState, train
from puna.train.objectives import language_modelling
from puna.train.optimizer import OptimizerSettings, build
from tests.train.tiny import ROWS, TinySource, precision, tiny_model

STEPS = 5


def main(out: Path) -> None:
    world = parallel.start()
    model = tiny_model(dtype=torch.float64)
    losses: list[float] = []

    def record(kind: str, **values: object) -> None:
        assert kind == "train", values
        assert isinstance(values["loss"], float)
        losses.append(values["loss"])

    train(
        language_modelling, model, build(model, OptimizerSettings(eps=1e-4)),
        TinySource(ROWS // 4, world.rank, world.size), TrainState(), settings=LoopSettings(steps=STEPS),
        rate=lambda step: 1e-2, precision=precision(torch.float64), world=world, record=record,
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    save_file(tensors, out / f"rank-{world.rank}.safetensors")
    parallel.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

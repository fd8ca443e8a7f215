"""Ranks and what they say to each other: the only file that names `torch.distributed`.

Every rank holds a whole replica of the model. One process is a world of one, in which every method returns at
once, so that no caller asks how many there are. Processes are started by `torchrun`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, nn
from torch import distributed as dist

from puna.errors import SettingsError

BUCKET_NUMBERS = 1 << 24  # 64 MiB of float32: long enough to fill a link, small beside a model
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# While the first rank prepares the text the others wait, for hours where it is long; torch would give them
# half an hour. A rank that dies is noticed at once all the same.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class World:
    """One process among all that train together: the one that asks."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes files and prints."""
        return self.rank == 0

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over ranks, the same bits on all of them.

        Gradients travel in flat buckets, cut by the order of the parameters alone, so that the order of
        additions is the same in every run. A parameter without a gradient on this rank contributes zeros.
        """
        if self.size == 1:
            return
        for bucket in _buckets(parameters):
            gradients = [_gradient(parameter) for parameter in bucket]
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(flat)
            pieces = flat.split([gradient.numel() for gradient in gradients])
            for gradient, piece in zip(gradients, pieces, strict=True):
                gradient.copy_(piece.view_as(gradient))

    def sum_scalars(self, values: Sequence[float]) -> list[float]:
        """Sums over ranks in float64, the same bits on all of them."""
        if self.size == 1:
            return [float(value) for value in values]
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank: a decision that all of them share."""
        return self.sum_scalars([float(flag)])[0] > 0

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Copy rank 0's values into the tensors of all other ranks, in place."""
        if self.size == 1:
            return
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.size > 1:
            self.sum_scalars([0.0])  # NCCL's own barrier would first have to guess a device


def start() -> World:
    """Join the processes that `torchrun` started; a process started alone is a world of one.

    Raises:
        SettingsError: only some of torchrun's variables are set, or they contradict each other.
    """
    given = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    if not given:
        return World()
    if len(given) < len(VARIABLES) or not all(value.isdigit() for value in given.values()):
        raise SettingsError(
            f"expected torchrun to set {', '.join(VARIABLES)} to numbers, got {given}; "
            "start with `torchrun --nproc-per-node N -m puna …`, or unset them"
        )
    world = World(*(int(given[name]) for name in VARIABLES))
    if world.rank >= world.size:
        raise SettingsError(f"RANK must be below WORLD_SIZE, got RANK={world.rank}, WORLD_SIZE={world.size}")
    if world.size > 1:
        _join(world)
    return world


def stop() -> None:
    """Leave the other processes; nothing to do in a world of one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _join(world: World) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank)  # NCCL pairs each rank with the current device
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=PATIENCE)


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Runs of parameters of one type and device, each of about BUCKET_NUMBERS numbers."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        alike = not bucket or (bucket[0].dtype, bucket[0].device) == (parameter.dtype, parameter.device)
        if bucket and (not alike or sum(p.numel() for p in bucket) + parameter.numel() > BUCKET_NUMBERS):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
    return parameter.grad
